"""Random numbers follow from seed and place, and have the right distribution."""

import collections

import torch

from models import sampling
from models.distillation import draws, method, scores

HOW = method.Method()


def at(batch, *, first=0, size=1, total=1, seed=0):
    return draws.Draws(seed, draws.Place(batch=batch, first=first, size=size, total=total))


def test_a_sample_draws_the_same_whichever_process_has_it():
    together = at(5, size=4, total=4)
    first, second = at(5, size=2, total=4), at(5, first=2, size=2, total=4)
    assert together.exit_step(4) == first.exit_step(4) == second.exit_step(4)
    for draw in (lambda d: d.normal((3, 2)), lambda d: d.integers(1000)):
        assert torch.equal(draw(together), torch.cat([draw(first), draw(second)]))


def test_seeds_and_batches_and_samples_draw_differently():
    drawn = [at(1), at(2), at(1, seed=1), at(1, first=1)]
    values = [d.normal((4,)).tolist()[0][0] for d in drawn]
    assert len(set(values)) == 4


def test_the_exit_step_is_even():
    """Chi-square over 4000 draws, 3 degrees of freedom: 16.3 is passed once in a thousand."""
    counts = collections.Counter(at(batch).exit_step(4) for batch in range(4000))
    assert sorted(counts) == [0, 1, 2, 3]
    assert sum((count - 1000) ** 2 / 1000 for count in counts.values()) < 16.3


def test_score_levels_are_shifted_to_noise_and_clamped():
    """Mean timestep 746; every eleventh draw lies at the upper bound, one in 200 at the lower."""
    drawn = at(0, size=10_000, total=10_000)
    timesteps = 1000 * scores.draw_levels(drawn, HOW)
    assert abs(timesteps.mean() - 746) < 10
    assert abs((timesteps == 980).float().mean() - 0.092) < 0.01
    assert abs((timesteps == 20).float().mean() - 0.005) < 0.003
    assert abs(timesteps.median() - 833) < 10


def test_every_example_comes_once_before_any_comes_again():
    def places(batch):
        return draws.examples_of(3, draws.Place(batch=batch, size=2, total=2), 7)

    stream = [place for batch in range(14) for place in places(batch)]
    epochs = [stream[start : start + 7] for start in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1]


def test_students_are_asked_where_the_renderer_asks():
    levels = sampling.noise_levels(HOW.denoising_step_list, HOW.sample_shift)
    expected = torch.tensor([1000, 937.5, 833.3333, 625])
    torch.testing.assert_close(levels.timesteps, expected, rtol=0, atol=1e-3)
