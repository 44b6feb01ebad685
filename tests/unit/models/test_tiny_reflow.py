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


def answers(nets, how, data, path, *, batch=6):
    return pairs.make(
        nets.teacher,
        how,
        data=data,
        numbers=range(RECIPE.pairs),
        steps=RECIPE.teacher_steps,
        batch=batch,
        path=path,
        report=lambda done, count: None,
    )


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
    made = answers(nets, how, data, tmp_path / "whole.pt")
    whole = made.answers_NCTHW
    two = answers(nets, how, data, tmp_path / "two.pt", batch=2)
    torch.testing.assert_close(two.answers_NCTHW, whole)
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
    answered = answers(nets, how, data, tmp_path / "answers.pt")
    before = error(nets, how, data, answered)
    train(nets, how, data, answered, tmp_path / "reflow.pt")
    assert error(nets, how, data, answered) < 0.9 * before
    again = answers(nets, how, data, tmp_path / "again.pt")
    assert torch.equal(again.answers_NCTHW, answered.answers_NCTHW)


def test_answers_are_kept_and_those_to_other_questions_refused(data, tmp_path):
    nets, how = begun("full")
    made = answers(nets, how, data, tmp_path / "answers.pt")
    with torch.no_grad():
        nets.teacher.network.head.head.weight.zero_()  # would answer otherwise now
    kept = answers(nets, how, data, tmp_path / "answers.pt")
    assert torch.equal(kept.answers_NCTHW, made.answers_NCTHW)
    with pytest.raises(ValueError, match="remove it"):
        answers(nets, dataclasses.replace(how, guidance=3.0), data, tmp_path / "answers.pt")


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
        answered = answers(nets, how, data, tmp_path / "answers.pt")
        train = trainer.Trainer(how, nets=nets, data=data, answered=answered)
        for _ in range(12):
            train.step()
        errors.append(error(nets, how, data, answered))
    assert errors[1] < 0.9 * errors[0]


def test_a_beginning_that_was_stopped_goes_on_to_the_same_numbers(data, tmp_path, monkeypatch):
    nets, how = begun("lora")
    answered = answers(nets, how, data, tmp_path / "answers.pt")
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
