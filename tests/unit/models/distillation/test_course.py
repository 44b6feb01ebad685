"""A training's file is understood to its last key, or the first wrong one is named."""

import dataclasses
from pathlib import Path

import pytest

from models.distillation import course, method

ROOT = Path(__file__).resolve().parents[4]
LEAST = '"model": "tiny", "prompts": "p.txt", "output": "out"'


@pytest.fixture
def read(tmp_path):
    def of(text):
        path = tmp_path / "training.json"
        path.write_text(text)
        return course.read(path)

    return of


def test_only_model_prompts_and_output_must_be_named(read, tmp_path):
    plan = read("{" + LEAST + "} // comments are allowed")
    assert plan.how == method.Method()
    assert plan.student_updates == 600
    assert plan.prompts == tmp_path / "p.txt"
    assert plan.output == tmp_path / "out"


def test_a_model_beside_the_file_goes_before_one_of_that_name(read, tmp_path, monkeypatch):
    (tmp_path / "elsewhere" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read("{" + LEAST + "}").model == "tiny"
    (tmp_path / "tiny").mkdir()
    assert read("{" + LEAST + "}").model == str(tmp_path / "tiny")
    beside = LEAST.replace('"tiny"', '"./tiny"')
    assert read("{" + beside + "}").model == str(tmp_path / "tiny")


def test_defaults_are_the_published_ones():
    how = method.Method()
    assert (how.guidance, how.ratio, how.ema, how.score_shift) == (6.0, 5, 0.99, 5.0)
    assert (how.student.learning_rate, how.critic.learning_rate) == (2e-6, 4e-7)
    assert (how.student.betas, how.student.weight_decay, how.student.clip) == ((0, 0.999), 0.01, 10)
    lora = method.critic_tuning("lora")
    assert (lora.learning_rate, lora.betas, lora.weight_decay) == (2e-5, (0.9, 0.999), 0.001)


def test_every_key_reaches_its_place(read):
    plan = read(
        "{" + LEAST + ', "task": "i2v", "guidance": 7, "score_range": [0.1, 1], "ema": null, '
        '"denoising_step_list": [1000, 500], "student": {"weights": "lora", "targets": ["q", "k"]},'
        '"critic": {"betas": [0.5, 0.9]}, "precision": "fp32"}'
    )
    assert (plan.task, plan.precision, plan.how.guidance) == ("i2v", "fp32", 7.0)
    assert plan.how.score_range == (0.1, 1.0)
    assert plan.how.ema is None
    assert plan.how.denoising_step_list == (1000, 500)
    assert plan.how.student == method.student_tuning("lora", targets=("q", "k"))
    assert plan.how.critic == method.critic_tuning(betas=(0.5, 0.9))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[]", "must hold one object"),
        ("{", "is not JSON"),
        ('{"model": "a", "model": "b"}', "is not JSON.*model"),
        ('{"model": "tiny"}', "prompts is missing"),
        ('{"model": "", "prompts": "p", "output": "o"}', "model must name a model"),
        (LEAST + ', "guidence": 5', "unknown key guidence: did you mean guidance"),
        (
            LEAST + ', "student": {"rnak": 5}',
            r"unknown key student.rnak: did you mean student.rank",
        ),
        (LEAST + ', "student": "lora"', 'student must be an object such as {"weights": "lora"}'),
        (LEAST + ', "student": {"rank": 0}', r"student.rank must be at least 1, got 0"),
        (LEAST + ', "critic": {"betas": [1]}', r"critic.betas must be a list of 2"),
        (LEAST + ', "critic": {"weights": "half"}', "critic.weights must be full or lora"),
        (LEAST + ', "guidance": 0.5', "guidance must be at least 1"),
        (LEAST + ', "guidance": true', "guidance must be a number, got True"),
        (LEAST + ', "guidance": Infinity', "guidance must be at least 1"),
        (LEAST + ', "batch": 1.5', "batch must be a whole number"),
        (LEAST + ', "batch": 0', "batch must be from 1 to 65536"),
        (LEAST + f', "batch": {2**62}', "batch must be from 1 to 65536"),
        (LEAST + ', "rollout": "ode"', "rollout must be euler or renoise, got 'ode'"),
        (LEAST + ', "denoising_step_list": [250, 500]', "denoising_step_list must fall"),
        (LEAST + ', "denoising_step_list": [1000, 0]', "integers from 1 to 1000"),
        (LEAST + ', "denoising_step_list": 4', "denoising_step_list must be a list"),
        (LEAST + ', "score_range": [0.9, 0.1]', "score_range must be"),
        (
            LEAST + ', "ida": 0.97, "critic": {"weights": "lora"}',
            "ida mixes .* both must be 'full'",
        ),
        (LEAST + ', "sgmd": -1', "sgmd must be a weight of 0 or more"),
        (LEAST + ', "target_width": 100', "target_width must be a positive multiple of 16"),
        (LEAST + ', "target_video_length": 80', r"target_video_length must be 4n\+1"),
        (LEAST + ', "student_start": "x", "student": {"weights": "lora"}', "a LoRA starts from"),
        (LEAST.replace('"out"', '" "'), "output must be a path"),
        (LEAST + ', "seed": -1', "seed must be from 0"),
        (LEAST + f', "guidance": {"9" * 400}', "guidance must be a number from"),
        (
            LEAST + f', "batch": -{"9" * 400}',
            "batch must be a number from -9223372036854775807 to 9223372036854775807$",
        ),
        (LEAST + f', "score_range": [0.1, {10**400}]', "score_range must be a number from"),
        (LEAST + f', "critic": {{"clip": {10**400}}}', "critic.clip must be a number from"),
        (LEAST + f', "seed": {"9" * 5000}', "is not JSON: .*digits"),
        (LEAST + ', "save_every": 0', "save_every must be at least 1"),
        (LEAST + f', "description": "{"x" * 70_000}"', "is larger than"),
    ],
)
def test_what_is_wrong_is_named(read, text, told):
    if not text.startswith(("[", "{")):
        text = "{" + text + "}"
    with pytest.raises(course.CourseError, match=told):
        read(text)


def test_a_file_that_is_not_there_says_so(tmp_path):
    with pytest.raises(course.CourseError, match="No such file"):
        course.read(tmp_path / "none.json")


@pytest.mark.parametrize("path", sorted((ROOT / "examples" / "distill").glob("*.json")), ids=str)
def test_the_examples_can_be_read(path):
    assert course.read(path).prompts.is_file()


def test_the_documentation_names_every_key_with_its_default():
    text = (ROOT / "docs" / "distillation.md").read_text()
    for of in (course.Course, method.Method, method.Tuning):
        for field in dataclasses.fields(of):
            assert f"| `{field.name}` |" in text or field.name == "how", field.name
