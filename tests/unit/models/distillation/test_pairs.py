"""The teacher's own answers, and what a student that should give them learns, computed by hand."""

import dataclasses

import pytest
import torch

from models.distillation import draws, examples, method, pairs, roles, trainer

SIGMAS = [1, 0.9375, 5 / 6, 0.625]  # of four steps at shift 5
CPU = torch.device("cpu")
COUNT = 5


class Linear(torch.nn.Module):
    """v = a x + b mean(context) + c s"""

    def __init__(self, *factors):
        super().__init__()
        self.factors = torch.nn.Parameter(torch.tensor(factors))

    def forward(self, latents, timestep_B, context_BSG, _image):
        a, b, c = self.factors
        per_sample = b * context_BSG.mean(dim=(1, 2)) + c * timestep_B / 1000
        return a * latents + per_sample.view(-1, 1, 1, 1, 1)


@pytest.fixture
def begun(tmp_path):
    """`begun(accumulate=2)`: a trainer with regression; five answers to three prompts."""

    def build(**changes):
        how = method.Method(
            **{"batch": 4, "guidance": 3.0, "seed": 7, "regression": 0.5, **changes}
        )
        contexts = torch.arange(1.0, 4.0).view(3, 1, 1).expand(3, 2, 2)
        data = examples.MemoryExamples(contexts, -torch.ones(1, 2, 2), latent_shape=(1, 1, 2, 2))
        nets = roles.of_networks(
            Linear(0.7, 0.1, 0.3), Linear(0.5, 0.2, 0.1), Linear(0.6, 0.3, 0.2)
        )
        wanted = pairs.Pairs(
            folder=tmp_path / "answers", made_from="a", how=how, steps=4, count=COUNT
        )
        pairs.ask(nets.teacher, wanted, data=data, batch=4, report=lambda done, count: None)
        return trainer.Trainer(how, nets=nets, data=data, answered=wanted)

    return build


def answer(number):
    """(noise, answer): four Euler steps of 0.5 x + 0.2 g + 0.1 s, g: the guided context."""
    noise = torch.randn(1, 1, 2, 2, generator=draws.for_pair(7, number))
    guided = -1 + 3 * ((number % 3 + 1) - -1)
    latents = noise
    for sigma, after in zip(SIGMAS, [*SIGMAS[1:], 0], strict=True):
        latents = latents - (sigma - after) * (0.5 * latents + 0.2 * guided + 0.1 * sigma)
    return noise, latents


def test_an_answer_is_what_the_guided_teacher_makes_in_so_many_steps(begun):
    train = begun()
    batch, noise, answers = train.answered.take(range(COUNT), train.data, CPU)
    for number in range(COUNT):
        expected = answer(number)
        assert torch.equal(noise[number], expected[0])
        torch.testing.assert_close(answers[number], expected[1])
        assert batch.context_BSG[number].unique().tolist() == [number % 3 + 1]


def test_pairs_and_seeds_have_noises_of_their_own():
    places = [(0, 0), (0, 1), (1, 0), (1, 1)]
    values = {float(torch.randn((), generator=draws.for_pair(*place))) for place in places}
    assert len(values) == len(places)


def test_other_questions_have_other_answers(begun):
    asked = begun().answered
    others = [
        dataclasses.replace(asked, how=dataclasses.replace(asked.how, **changes))
        for changes in ({"seed": 8}, {"guidance": 2.0}, {"sample_shift": 3.0})
    ]
    others += [dataclasses.replace(asked, steps=5), dataclasses.replace(asked, made_from="b")]
    paths = {each.path(0) for each in (asked, *others)} | {asked.path(1)}
    assert len(paths) == len(others) + 2


def test_the_error_is_that_of_the_velocity_on_the_line_to_the_answer(begun):
    train = begun()
    micro, again = (next(train._micros(action=0)) for _ in range(2))
    numbers, levels = again.drawn.integers(COUNT).tolist(), again.drawn.integers(4).tolist()
    assert len(set(levels)) > 1
    expected = 0.0
    for number, level in zip(numbers, levels, strict=True):
        (noise, end), sigma = answer(number), SIGMAS[level]
        x = (1 - sigma) * end + sigma * noise
        velocity = 0.7 * x + 0.1 * (number % 3 + 1) + 0.3 * sigma
        expected += float((velocity - (noise - end)).square().mean()) / len(numbers)
    error = train._error_to(train.answered, micro)
    assert float(error.detach()) == pytest.approx(expected, rel=1e-5)


def test_the_error_counts_with_its_weight_beside_the_other_loss(begun):
    """The mean over the batches of an update."""
    train = begun(accumulate=2)
    (trained,) = train.student.trained.values()
    gradient = torch.zeros(3)
    for micro in train._micros(action=0):
        loss, _ = train._student_loss(micro)
        loss = loss + 0.5 * train._error_to(train.answered, micro)
        gradient += torch.autograd.grad(loss, trained)[0] / 2
    _, norm = train._update_student()
    assert norm == pytest.approx(float(gradient.norm()), rel=1e-5)
