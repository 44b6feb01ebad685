"""`rushes distill` from its file to a video of the student, on the tiny model."""

import csv
import errno
import fcntl
import json
import os
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from click.testing import CliRunner
from PIL import Image

from jobs import cli, errors, looks, presets
from jobs import settings as job_settings
from models import layout, quantization, quantized_files
from models.distillation import export, saving
from models.tiny import make
from worker import components, distill, group, pipeline, probes, stopwatch, video

TRAINING = {
    "model": "tiny",
    "prompts": "prompts.txt",
    "output": "out",
    "negative_prompt": "grey",
    "target_width": 32,
    "target_height": 16,
    "target_video_length": 5,
    "fps": 8,
    "student_updates": 2,
    "save_every": 1,
    "probe_every": 2,
    "probes": 1,
    "precision": "fp32",
    "ratio": 1,
    "ema": 0.5,
    "ema_start": 0,
    "student": {"learning_rate": 1e-3},
    "critic": {"learning_rate": 1e-3},
}
LORA = {
    "student": {"weights": "lora", "rank": 2, "learning_rate": 1e-2},
    "critic": {"weights": "lora", "rank": 2, "learning_rate": 1e-2},
}

REGRESSION = {"regression": 1, "regression_pairs": 5, "regression_steps": 4}


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory):
    """`tiny` and `tiny_i2v`. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    make.make(folder / "tiny")
    make.make(folder / "tiny_i2v", task=layout.TASKS["i2v"])
    return folder


@pytest.fixture
def known(models_dir, monkeypatch):
    monkeypatch.setenv("RUSHES_MODELS_DIR", str(models_dir))
    monkeypatch.setenv("RUSHES_X264_PRESET", "ultrafast")
    monkeypatch.setenv("RUSHES_DEVICE", "cpu")
    return job_settings.load()


@pytest.fixture
def write(tmp_path):
    """`write(ratio=2)`: a training's file with what the test wants changed, and its prompts."""

    def of(**changes):
        (tmp_path / "prompts.txt").write_text("a red circle\na blue square\na green star\n")
        path = tmp_path / "training.json"
        path.write_text(json.dumps({**TRAINING, **changes}))
        return path

    return of


@pytest.fixture
def run(known):
    """`run(path)` -> (Done, what was told)"""

    def of(path, *, on_update=lambda _update, _count: None):
        notes = []
        return distill.run(distill.read(path), known, told_to(notes, on_update)), notes

    return of


def told_to(notes, on_update=lambda _update, _count: None):
    return distill.Told(
        on_stage=notes.append,
        on_part=lambda _done, _count: None,
        on_update=on_update,
        on_note=notes.append,
    )


def rendered(preset_path, known, cpu, *, image=None):
    """What a worker makes of the preset that a training wrote."""
    look = presets.load(str(preset_path)).look
    warm = components.Components(models_dir=known.models_dir, home=known.home, device=cpu)
    spec = looks.RenderSpec(
        look=look,
        prompt="a red circle",
        negative_prompt=None,
        seed=3,
        image_key=None if image is None else "inputs/image",
    )
    return pipeline.make_latents(
        spec,
        warm.model_for(look),
        device=cpu,
        timings=stopwatch.Timings(),
        reached=lambda *_: None,
        image=None if image is None else lambda: image,
    )


def test_a_complete_student_is_trained_exported_and_rendered(write, run, known, cpu, tmp_path):
    done, _ = run(write())
    out = tmp_path / "out"
    assert done == distill.Done(
        updates=2, weights=out / export.FULL_FILE, preset=out / distill.PRESET_FILE
    )
    of_student = rendered(done.preset, known, cpu)
    preset = json.loads(done.preset.read_text())
    (tmp_path / "other.json").write_text(json.dumps({**preset, "dit_original_ckpt": ""}))
    of_tiny = rendered(tmp_path / "other.json", known, cpu)
    assert of_student.isfinite().all()
    assert not torch.equal(of_student, of_tiny)
    with (out / "metrics.csv").open() as stream:
        assert [row["number"] for row in csv.DictReader(stream)] == ["1", "2"]
    probe = video.probe(out / "probes" / "update_000002_prompt_0.mp4")
    assert (probe.width, probe.height, probe.num_frames, probe.fps) == (32, 16, 5, 8.0)


def test_a_lora_for_images_is_trained_exported_and_rendered(write, run, known, cpu, tmp_path):
    Image.new("RGB", (40, 30), (200, 30, 30)).save(tmp_path / "red.png")
    rows = [{"prompt": f"a circle, {number}", "image": "red.png"} for number in range(2)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    done, _ = run(write(model="tiny_i2v", task="i2v", prompts="rows.jsonl", **LORA))
    assert done.weights == tmp_path / "out" / export.LORA_FILE
    look = presets.load(str(done.preset)).look
    assert (look.task, look.base, len(look.loras)) == ("i2v", "original", 1)
    image = torch.full((30, 40, 3), 200, dtype=torch.uint8)
    assert rendered(done.preset, known, cpu, image=image).isfinite().all()


@pytest.mark.parametrize("terms", [{}, REGRESSION])
def test_a_training_that_was_stopped_goes_on_to_the_same_weights(write, run, tmp_path, terms):
    straight, _ = run(write(output="straight", student_updates=3, **terms))

    def stop(update, _count):
        if update.number == 2:  # then there are two checkpoints
            signal_self()

    stopped, _ = run(write(output="stopped", student_updates=3, **terms), on_update=stop)
    assert stopped == distill.Done(updates=2, weights=None, preset=None)
    made = []
    resumed, notes = run(
        write(output="stopped", student_updates=3, **terms),
        on_update=lambda update, _count: made.append(update.number),
    )
    assert made == [3]
    assert f"going on from {tmp_path}/stopped/checkpoints/update_000002" in notes
    assert not any("other prompts" in note for note in notes)
    assert resumed.weights.read_bytes() == straight.weights.read_bytes()
    with (tmp_path / "stopped" / "metrics.csv").open() as stream:
        assert [row["number"] for row in csv.DictReader(stream)] == ["1", "2", "3"]


def signal_self():
    import signal

    signal.raise_signal(signal.SIGTERM)


def test_prompts_are_encoded_once(write, run, tmp_path, monkeypatch):
    run(write(student_updates=1))
    files = sorted((tmp_path / "out" / "examples").iterdir())
    assert len(files) == 3 + 1  # and the negative prompt

    def refuse(*_arguments, **_options):
        raise AssertionError("the encoders are loaded again")

    monkeypatch.setattr(distill.checkpoint, "load_surroundings", refuse)
    run(write(student_updates=2))
    assert sorted((tmp_path / "out" / "examples").iterdir()) == files


def test_other_prompts_get_other_answers(write, run, tmp_path):
    path = write(student_updates=1, **REGRESSION)
    run(path)
    answers = set((tmp_path / "out" / "answers").iterdir())
    assert len(answers) == REGRESSION["regression_pairs"]
    (tmp_path / "prompts.txt").write_text("a yellow ring\n")
    (tmp_path / "again.json").write_text(path.read_text().replace('_updates": 1', '_updates": 2'))
    _, notes = run(tmp_path / "again.json")
    told = "update_000001 was trained with other prompts; it goes on with the new ones"
    assert [note for note in notes if note.endswith(told)]
    assert len(set((tmp_path / "out" / "answers").iterdir()) - answers) == len(answers)


def test_a_teacher_of_another_precision_is_asked_anew(write, run, tmp_path):
    run(write(student_updates=1, **REGRESSION))
    answers = set((tmp_path / "out" / "answers").iterdir())
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    run(write(student_updates=1, precision="bf16", **REGRESSION))
    assert len(set((tmp_path / "out" / "answers").iterdir()) - answers) == len(answers)


def test_an_example_that_was_encoded_again_gets_the_same_answers(write, run, tmp_path):
    run(write(student_updates=1, **REGRESSION))
    answers = set((tmp_path / "out" / "answers").iterdir())
    next((tmp_path / "out" / "examples").iterdir()).unlink()
    run(write(student_updates=2, **REGRESSION))
    assert set((tmp_path / "out" / "answers").iterdir()) == answers


def test_a_checkpoint_that_cannot_be_written_costs_no_student(write, run, monkeypatch, tmp_path):
    """The last one is an error all the same."""
    real, calls = saving.save, []

    def fails_at_first(*arguments, **options):
        calls.append(1)
        if len(calls) == 1:
            raise saving.SavingError(arguments[1], "No space left on device")
        return real(*arguments, **options)

    monkeypatch.setattr(saving, "save", fails_at_first)
    done, notes = run(write())
    assert done.updates == 2
    assert any("No space left on device; the training goes on" in note for note in notes)

    def always_fails(*arguments, **_options):
        raise saving.SavingError(arguments[1], "No space left on device")

    monkeypatch.setattr(saving, "save", always_fails)
    with pytest.raises(errors.RushesError, match="No space left on device"):
        run(write(output="other"))
    assert presets.load(str(tmp_path / "other" / distill.PRESET_FILE)).look.transformer
    assert (tmp_path / "other" / export.FULL_FILE).read_bytes() == done.weights.read_bytes()


class FullVAE(torch.nn.Module):
    """An autoencoder for which there is no room beside the training."""

    def __init__(self):
        super().__init__()
        self.places = []

    def to(self, place):
        self.places.append(str(place))
        return self

    def decode_chunks(self, _latents):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_a_probe_without_room_ends_no_training_and_leaves_the_device(write, known, cpu):
    notes, vae = [], FullVAE()
    plan = distill.read(write())
    probes.Probes(plan, None, cpu, notes.append, vae=vae).write(2, 0, torch.zeros(1))
    assert notes == [
        "no probe video update_000002_prompt_0.mp4: "
        "CPU test: CUDA out of memory. Tried to allocate 2.00 GiB"
    ]
    assert vae.places == ["cpu", "cpu"]


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"batch": 8}, "a smaller batch with more accumulate, LoRAs"),
        ({**LORA, "gradient_checkpointing": False}, "gradient_checkpointing;"),
        (LORA, r"It takes less with more processes \(torchrun\); rushes distill --dry-run"),
    ],
)
def test_a_device_that_is_too_small_comes_with_advice(write, run, monkeypatch, changes, advice):
    def fails(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(distill, "_run", fails)
    with pytest.raises(errors.RushesError, match=f"out of memory.*2.00 GiB.*{advice}"):
        run(write(**changes))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "gone"}, "expected a model folder"),
        ({"model": "tiny_i2v"}, "does not fit the task"),
        ({"prompts": "gone.txt"}, "gone.txt"),
        ({"prompts": "bad.jsonl"}, r"bad.jsonl: line 2: unknown key"),
        ({"prompts": "images.jsonl"}, 'line 1: image: the task is "t2v"'),
        ({"task": "i2v", "model": "tiny_i2v"}, "image is missing"),
        ({"student_start": "gone.safetensors"}, "gone.safetensors"),
        ({"student": {"weights": "lora", "targets": ["qq"]}}, "'qq' is none"),
        ({"regression": 1}, "regression_pairs, such as 1000, go together"),
    ],
)
def test_what_cannot_be_trained_says_why(write, run, tmp_path, changes, told):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "a"}\n{"promt": "b"}\n')
    (tmp_path / "images.jsonl").write_text('{"prompt": "a", "image": "x.png"}\n')
    with pytest.raises(errors.RushesError, match=told):
        run(write(**changes))


def test_weights_are_known_by_what_they_are(tmp_path, models_dir):
    """Not by when and where they were written."""
    files = layout.find(models_dir / "tiny").transformer
    stamp = distill._weights_stamp(files)
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(files[0].read_bytes())
    assert distill._weights_stamp([copy]) == stamp
    content = safetensors.torch.load_file(copy)
    safetensors.torch.save_file({name: 2 * each for name, each in content.items()}, copy)
    assert copy.stat().st_size == files[0].stat().st_size
    assert distill._weights_stamp([copy]) != stamp


def test_another_teacher_or_precision_is_not_continued_with(write, run, known, tmp_path):
    run(write(student_updates=1))
    copy = tmp_path / "other"
    shutil.copytree(known.models_dir / "tiny", copy)
    for path in layout.find(copy, base=True).transformer:
        content = safetensors.torch.load_file(path)
        safetensors.torch.save_file({name: 2 * each for name, each in content.items()}, path)
    told = "negative_prompt was grey, now red; teacher_weights was .*, now .*another output"
    with pytest.raises(errors.RushesError, match=told):
        run(write(model="other", negative_prompt="red"))  # beside the file


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"fps": 240}, "fps must be .* 120"),
        ({"target_video_length": 1001}, "target_video_length must be .* 481"),
        ({"target_width": 8192}, "target_width must be .* 2048"),
        ({"denoising_step_list": list(range(1000, 400, -10))}, "denoising_step_list .* 50"),
        ({"sample_shift": 200.0}, "sample_shift must be .* 100"),
        ({"sample_shift": 0.001}, "sample_shift must be from 0.01"),
        ({"description": "two\nlines"}, "description must be one line of text"),
        ({"model": "../gone"}, "json: model must be below the models folder"),
    ],
)
def test_what_no_preset_can_say_is_not_trained(write, changes, told):
    with pytest.raises(errors.FileUnusable, match=told):
        distill.read(write(**changes))


@pytest.mark.parametrize("changes", [{}, LORA])
def test_a_path_with_dots_in_it_makes_a_good_preset(write, tmp_path, changes):
    (tmp_path / "models" / "mine").mkdir(parents=True)
    (tmp_path / "x").mkdir()
    plan = distill.read(write(model="x/../models/mine", output="x/../out", **changes))
    plan.output.mkdir(parents=True)
    look = presets.read(distill._write_preset(plan, plan.output / "weights")).look
    assert look.model_path == str(tmp_path / "models" / "mine")
    weights = look.loras[0].path if look.loras else look.transformer
    assert weights == str(tmp_path / "out" / "weights")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"regression_pairs": 7}, "regression_pairs was 5, now 7"),
        ({"regression_steps": 8}, "regression_steps was 4, now 8"),
        ({"ratio": 3}, "ratio was 1, now 3"),
    ],
)
def test_what_is_not_continued_with_is_refused_before_the_teacher_is_asked(
    write, run, monkeypatch, changes, told
):
    run(write(student_updates=1, **REGRESSION))

    def refuse(*_arguments):
        raise AssertionError("the prompts are encoded")

    monkeypatch.setattr(distill, "_encoded", refuse)
    with pytest.raises(errors.RushesError, match=f"{told}.*another output"):
        run(write(**{**REGRESSION, **changes}))


def test_a_folder_in_which_another_training_works_is_refused(write, run, monkeypatch, tmp_path):
    path = write(student_updates=1)
    out = tmp_path / "out"
    out.mkdir()
    with (out / distill.LOCK_FILE).open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(errors.FileUnusable, match=f"another rushes distill works in {out}"):
            run(path)
    assert [each.name for each in out.iterdir()] == [distill.LOCK_FILE]

    def refuses(*_arguments):
        raise OSError(errno.ENOLCK, "No locks available")

    with monkeypatch.context() as patched:
        patched.setattr(distill.fcntl, "flock", refuses)
        assert run(path)[0].updates == 1
    assert run(path)[0].updates == 1


@pytest.mark.parametrize("place", ["model", "student_start"])
def test_quantized_weights_are_not_trained(write, run, known, tmp_path, place):
    files = layout.find(known.models_dir / "tiny", base=True)
    path = tmp_path / "quantized.safetensors"
    quantized_files.write(files, path, quantization.Scheme.INT8)
    if place == "model":
        shutil.copytree(known.models_dir / "tiny", tmp_path / "copy")
        path = path.replace(tmp_path / "copy" / files.transformer[0].name)
    changes = {"model": "copy"} if place == "model" else {place: path.name}
    with pytest.raises(errors.FileUnusable, match=f"{path} is quantized"):
        run(write(**changes))


def test_a_critic_begins_as_the_teacher_also_where_the_student_does_not(write, known, tmp_path):
    files = layout.find(known.models_dir / "tiny", base=True)
    content = safetensors.torch.load_file(files.transformer[0])
    name = "blocks.0.self_attn.q.weight"
    start = tmp_path / "start.safetensors"
    safetensors.torch.save_file({**content, name: 2 * content[name]}, start)
    plan = distill.read(write(student_start=start.name))
    nets = distill._networks(plan, files, torch.device("cpu"))
    teacher = nets.teacher.network.get_parameter(name)
    assert torch.equal(nets.critic.trained[name], teacher)
    assert torch.equal(nets.student.trained[name], 2 * teacher)


def test_first_frames_are_cropped_and_other_encoders_encode_anew(write, known, tmp_path):
    shutil.copytree(known.models_dir / "tiny_i2v", tmp_path / "copy")
    files = layout.find(tmp_path / "copy", base=True, task=layout.TASKS["i2v"])
    seen = []

    def encode(encoder, *_arguments):
        seen.append(encoder)
        raise EncodedError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(distill.encoding.Encoder, "encode", encode)
        for changed in (None, *files.text_encoder, *files.vae, *files.image_encoder):
            if changed is not None:
                os.utime(changed, (1, 1))
            with pytest.raises(EncodedError):
                distill._encoded(distill.read(write()), files, [], torch.device("cpu"), told_to([]))
    assert all(each.target.crops for each in seen)
    assert len({each.model for each in seen}) == len(seen) >= 4


class EncodedError(Exception):
    """More is not needed."""


@pytest.mark.parametrize(
    ("variables", "is_told"),
    [
        ({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8"}, True),
        ({"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8", group.GRACE_VARIABLE: "1800"}, False),
        ({"WORLD_SIZE": "8"}, False),
        ({}, False),
    ],
)
def test_torchrun_that_would_kill_before_a_checkpoint_is_told_of(monkeypatch, variables, is_told):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    notes = []
    distill._tell_of_grace(told_to(notes))
    assert ["30 s after Ctrl-C" in note for note in notes] == [True] * is_told


# The command line.


def rushes(*arguments):
    return CliRunner().invoke(cli.main, ["distill", *map(str, arguments)])


def test_the_command_tells_whole_paths(write, known, monkeypatch, tmp_path):
    done = distill.Done(updates=2, weights=Path("a/../b/x"), preset=Path("a/../b/y"))
    monkeypatch.setattr(distill, "run", lambda *_: done)
    monkeypatch.chdir(tmp_path)
    told = json.loads(rushes(write(), "-o", "json").stdout)
    assert (told["weights"], told["preset"]) == (f"{tmp_path}/b/x", f"{tmp_path}/b/y")


def test_the_command_trains_and_says_what_to_do_next(write, known, tmp_path):
    result = rushes(write(student_updates=1), "-o", "json")
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    out = tmp_path / "out"
    assert told == {
        "updates": 1,
        "weights": str(out / export.FULL_FILE),
        "preset": str(out / distill.PRESET_FILE),
    }
    again = rushes(write(student_updates=1))
    assert f"--preset {out / distill.PRESET_FILE}" in again.stdout


@pytest.mark.parametrize(("updates", "code"), [(1, 130), (2, 0)])
def test_of_several_processes_only_the_first_talks(write, known, monkeypatch, updates, code):
    monkeypatch.setattr(
        distill, "run", lambda *_: distill.Done(updates=updates, weights=None, preset=None)
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    first = rushes(write(), "-o", "json")
    assert (json.loads(first.stdout)["updates"], first.exit_code) == (updates, code)
    monkeypatch.setenv("RANK", "1")
    for arguments in ([], ["-o", "json"]):
        result = rushes(write(), *arguments)
        assert (result.stdout, result.stderr, result.exit_code) == ("", "", code)


def test_a_bad_file_is_one_line_and_no_traceback(write, known):
    result = rushes(write(guidence=3))
    assert result.exit_code == 2
    assert "unknown key guidence: did you mean guidance?" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_dry_run_needs_no_weights_and_writes_nothing(write, known, tmp_path):
    result = rushes(write(model="Wan2.1-T2V-1.3B"), "--dry-run", "-o", "json")
    assert result.exit_code == 0, result.stderr
    cost = json.loads(result.stdout)
    assert cost["parameters"] == 1_418_996_800
    assert cost["device_bytes"] == sum(cost["static_bytes"].values()) + cost["activation_bytes"]
    assert not (tmp_path / "out").exists()
    shown = rushes(write(model="tiny"), "--dry-run", "--processes", "8")
    assert "processes        8\n" in shown.stdout
    assert rushes(write(), "--processes", "8").exit_code == 2
