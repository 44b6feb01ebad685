"""How a tiny student begins: the teacher's answers, and straight lines to them."""

import dataclasses

import pytest
import torch

from models import sampling
from models.distillation import examples, method, pairs, roles, trainer
from models.tiny import loop, recipes, reflow, teacher, words

SMALL = recipes.Transformer(dim=32, ffn_dim=48, num_heads=2, num_layers=1)
RECIPE = recipes.Reflow(pairs=6, teacher_steps=10, steps=60, batch=4, rate=1e-2)
SHAPE = (16, 2, 4, 4)


@pytest.fixture
def data():
    made = torch.Generator().manual_seed(2)
    contexts = torch.randn(6, words.TEXT_LEN, 64, generator=made)
    negative = torch.randn(1, words.TEXT_LEN, 64, generator=made)
    return examples.MemoryExamples(contexts, negative, latent_shape=SHAPE)


def begun(weights):
    network = teacher.new(SMALL.text_to_video, 0)
    torch.nn.init.normal_(network.head.head.weight, std=0.1)
    student = method.student_tuning(weights)
    how = method.Method(student=student, guidance=2.0, batch=4, gradient_checkpointing=False)
    return roles.of_teacher(network.eval(), how), how


def answers(nets, how, data, folder, *, batch=6):
    wanted = pairs.Pairs(
        folder=folder, made_from="a", how=how, steps=RECIPE.teacher_steps, count=RECIPE.pairs
    )
    pairs.ask(nets.teacher, wanted, data=data, batch=batch, report=lambda done, count: None)
    return wanted


def latents(answered, data):
    return answered.take(range(6), data, torch.device("cpu"))[2]


def train(nets, how, data, answered, path):
    reflow.train(
        nets.student,
        how,
        RECIPE,
        data=data,
        answered=answered,
        path=path,
        say=lambda line: None,
    )


def error(nets, how, data, answered):
    """Of what the student sees in pure noise."""
    batch, noise, answers_ = answered.take(range(6), data, torch.device("cpu"))
    with torch.no_grad():
        velocity = nets.student.velocity(noise, torch.ones(6), batch.context_BSG, None)
    return (noise - velocity - answers_).square().mean()


def test_an_answer_is_the_guided_teachers_whatever_its_batch(data, tmp_path):
    nets, how = begun("full")
    made = answers(nets, how, data, tmp_path / "whole")
    whole = latents(made, data)
    two = answers(nets, how, data, tmp_path / "two", batch=2)
    torch.testing.assert_close(latents(two, data), whole)
    batch = data.batch([3], torch.device("cpu"))

    def velocity(latents, timestep):
        told, untold = (
            nets.teacher.at(context, None)(latents, timestep)
            for context in (batch.context_BSG, batch.negative_BSG)
        )
        return untold + 2 * (told - untold)

    levels = sampling.noise_levels(range(1000, 0, -100), 5.0)
    _, noise, _ = made.take([3], data, torch.device("cpu"))
    alone = sampling.denoise(velocity, noise, levels, step_rule="euler")
    torch.testing.assert_close(whole[3:4], alone)


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_a_student_comes_nearer_to_the_answers_and_the_teacher_stays(weights, data, tmp_path):
    nets, how = begun(weights)
    answered = answers(nets, how, data, tmp_path / "answers")
    before = error(nets, how, data, answered)
    train(nets, how, data, answered, tmp_path / "reflow.pt")
    assert error(nets, how, data, answered) < 0.9 * before
    again = answers(nets, how, data, tmp_path / "again")
    assert torch.equal(latents(again, data), latents(answered, data))


def test_answers_are_made_once_and_those_to_other_questions_are_others(data, tmp_path):
    nets, how = begun("full")
    made = answers(nets, how, data, tmp_path)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*.safetensors")}
    assert len(files) == 6
    lost = made.path(4)
    lost.unlink()
    answers(nets, how, data, tmp_path)
    kept = {path: path.stat().st_mtime_ns for path in files if path != lost}
    assert lost.exists()
    assert kept == {path: time for path, time in files.items() if path != lost}
    other = answers(nets, dataclasses.replace(how, guidance=3.0), data, tmp_path)
    assert not torch.equal(latents(other, data), latents(made, data))


def test_regression_moves_the_student_towards_the_answers(data, tmp_path):
    """The very same updates with a large weight of it end nearer."""
    errors = []
    for weight in (1e-9, 30.0):
        nets, how = begun("full")
        how = dataclasses.replace(
            how,
            regression=weight,
            student=method.student_tuning("full", learning_rate=3e-3),
            ratio=1,
            guidance=2.0,
        )
        answered = answers(nets, how, data, tmp_path / "answers")
        train = trainer.Trainer(how, nets=nets, data=data, answered=answered)
        for _ in range(12):
            train.step()
        errors.append(error(nets, how, data, answered))
    assert errors[1] < 0.9 * errors[0]


def test_a_beginning_that_was_stopped_goes_on_to_the_same_numbers(data, tmp_path, monkeypatch):
    nets, how = begun("lora")
    answered = answers(nets, how, data, tmp_path / "answers")
    train(nets, how, data, answered, tmp_path / "straight.pt")
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0.0)
    flow = reflow.losses.flow
    calls = []

    def stop(*arguments):
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return flow(*arguments)

    monkeypatch.setattr(reflow.losses, "flow", stop)
    stopped, _ = begun("lora")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, how, data, answered, tmp_path / "stopped.pt")
    resumed, _ = begun("lora")
    train(resumed, how, data, answered, tmp_path / "stopped.pt")
    assert len(calls) == 60 + 1
    for name, weight in nets.student.trained.items():
        assert torch.equal(resumed.student.trained[name], weight)
