"""How a tiny student begins: the teacher's answers, and straight lines to them."""

import pytest
import torch

from models import sampling
from models.distillation import examples, method, roles
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


def answers(nets, how, data, path):
    return reflow.answers(nets.teacher, how, RECIPE, data=data, path=path, say=lambda line: None)


def train(nets, how, data, answered, path):
    reflow.train(
        nets.student,
        how,
        RECIPE,
        data=data,
        answers_NCTHW=answered,
        path=path,
        say=lambda line: None,
    )


def error(nets, how, data, answered):
    """Of what the student sees in pure noise."""
    noise = reflow.noise_for(how.seed, range(6), SHAPE)
    batch = data.batch(range(6), torch.device("cpu"))
    with torch.no_grad():
        velocity = nets.student.velocity(noise, torch.ones(6), batch.context_BSG, None)
    return (noise - velocity - answered).square().mean()


def test_an_answer_is_the_guided_teachers_whatever_its_batch(data, tmp_path, monkeypatch):
    nets, how = begun("full")
    whole = answers(nets, how, data, tmp_path / "whole.pt")
    monkeypatch.setattr(reflow, "BATCH", 2)
    torch.testing.assert_close(answers(nets, how, data, tmp_path / "pairs.pt"), whole)
    batch = data.batch([3], torch.device("cpu"))

    def velocity(latents, timestep):
        told, untold = (
            nets.teacher.at(context, None)(latents, timestep)
            for context in (batch.context_BSG, batch.negative_BSG)
        )
        return untold + 2 * (told - untold)

    levels = sampling.noise_levels(range(1000, 0, -100), 5.0)
    noise = reflow.noise_for(how.seed, range(3, 4), SHAPE)
    alone = sampling.denoise(velocity, noise, levels, step_rule="euler")
    torch.testing.assert_close(whole[3:4], alone)


@pytest.mark.parametrize("weights", ["full", "lora"])
def test_a_student_comes_nearer_to_the_answers_and_the_teacher_stays(weights, data, tmp_path):
    nets, how = begun(weights)
    answered = answers(nets, how, data, tmp_path / "answers.pt")
    before = error(nets, how, data, answered)
    train(nets, how, data, answered, tmp_path / "reflow.pt")
    assert error(nets, how, data, answered) < 0.9 * before
    assert torch.equal(answers(nets, how, data, tmp_path / "again.pt"), answered)


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
