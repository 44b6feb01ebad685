"""Noise levels, step rules and the loop, against closed forms."""

import pytest
import torch

from models import sampling

# (shift, list) -> sigmas and timesteps, computed by hand from shift * s / (1 + (shift - 1) * s)
LEVELS = [
    (5, [1000, 750, 500, 250], [1.0, 0.9375, 0.8333333, 0.625]),
    (5, [999, 750, 500, 250], [0.9997998, 0.9375, 0.8333333, 0.625]),
    (8, [1000, 750, 500, 250], [1.0, 0.96, 0.8888889, 0.7272727]),
    (8, [999, 750, 500, 250], [0.9998749, 0.96, 0.8888889, 0.7272727]),
    (3, [1000, 750, 500, 250], [1.0, 0.9, 0.75, 0.5]),
    (3, [999, 750, 500, 250], [0.9996664, 0.9, 0.75, 0.5]),
    (1, [1000, 750, 500, 250], [1.0, 0.75, 0.5, 0.25]),
    (1, [999, 750, 500, 250], [0.999, 0.75, 0.5, 0.25]),
]
STEP_LISTS = [[1000, 750, 500, 250], [999, 750, 500, 250], [1000, 500], [250], [1000, 937, 1]]
SHAPE = (4, 3, 2, 2)


def noise_of(seed, shape=SHAPE):
    return sampling.initial_noise(seed, shape, "cpu")


@pytest.mark.parametrize(("shift", "steps", "sigmas"), LEVELS)
def test_noise_levels_are_the_published_ones(shift, steps, sigmas):
    levels = sampling.noise_levels(steps, shift)
    assert levels.sigmas == pytest.approx(sigmas, abs=2e-7)
    assert all(isinstance(sigma, float) for sigma in levels.sigmas)
    assert levels.timesteps.tolist() == pytest.approx([1000 * s for s in sigmas], abs=1e-3)
    assert levels.timesteps.dtype == torch.float32


def test_timesteps_are_not_rounded():
    timesteps = sampling.noise_levels([1000, 750, 500, 250], 5).timesteps
    assert timesteps.tolist() == pytest.approx([1000, 937.5, 833.33333, 625], abs=1e-3)
    assert timesteps[2] != timesteps[2].round()


def test_eight_steps_at_shift_5():
    levels = sampling.noise_levels([1000, 875, 750, 625, 500, 375, 250, 125], 5)
    published = [1000, 972.2224, 937.5001, 892.8571, 833.3333, 750.0001, 625, 416.6667]
    assert levels.timesteps.tolist() == pytest.approx(published, abs=1e-3)


def test_the_table_falls_from_one_and_never_reaches_zero():
    table = sampling.sigma_table(5)
    assert table.shape == (1000,)
    assert table[0] == 1
    assert table[-1] > 0
    assert (table.diff() < 0).all()


@pytest.mark.parametrize(
    ("steps", "shift", "says"),
    [
        ([], 5, "must not be empty"),
        ([1000, 0], 5, "integers from 1 to 1000, got 0"),
        ([1001], 5, "got 1001"),
        ([937.5], 5, "got 937.5"),
        ([True], 5, "got True"),
        ([250, 500], 5, "must fall"),
        ([500, 500], 5, "must fall"),
        ([1000], 0, "sample_shift must be a positive number"),
        ([1000], -1, "got -1"),
        ([1000], float("nan"), "got nan"),
        ([1000], float("inf"), "got inf"),
    ],
)
def test_what_cannot_be_a_schedule_is_refused(steps, shift, says):
    with pytest.raises(ValueError, match=says):
        sampling.noise_levels(steps, shift)


@pytest.mark.parametrize("steps", STEP_LISTS)
@pytest.mark.parametrize("shift", [1, 3, 5, 8])
def test_euler_is_exact_on_the_straight_line_from_noise_to_picture(steps, shift):
    """v = eps - x0 everywhere: whatever the list, one lands on x0."""
    levels = sampling.noise_levels(steps, shift)
    x0, eps = torch.randn(2, 1, *SHAPE, dtype=torch.float64).unbind(0)
    start = (1 - levels.sigmas[0]) * x0 + levels.sigmas[0] * eps
    end = sampling.denoise(lambda _x, _t: eps - x0, start, levels, step_rule="euler")
    assert (end - x0).abs().max() < 1e-12


def test_renoise_with_constant_velocity_has_its_closed_form():
    """x' = (1 - s') (x - s v) + s' eps for each step, eps drawn on from the initial generator."""
    levels = sampling.noise_levels([1000, 750, 500, 250], 5)
    noise, generator = noise_of(5)
    velocity = torch.full_like(noise, 0.3)
    end = sampling.denoise(
        lambda _x, _t: velocity, noise, levels, step_rule="renoise", generator=generator
    )
    again = torch.Generator().manual_seed(5)
    x, *fresh = (torch.randn(1, *SHAPE, generator=again) for _ in range(4))
    for (sigma, following), eps in zip(
        [(1.0, 0.9375), (0.9375, 5 / 6), (5 / 6, 0.625)], fresh, strict=True
    ):
        x = (1 - following) * (x - sigma * 0.3) + following * eps
    assert torch.allclose(end, x - 0.625 * 0.3, atol=1e-6)


def test_renoise_draws_no_noise_after_the_last_step():
    levels = sampling.noise_levels([250], 5)
    noise, _ = noise_of(0)
    end = sampling.denoise(
        lambda x, _t: torch.zeros_like(x), noise, levels, step_rule="renoise", generator=None
    )
    assert torch.equal(end, noise)


def test_renoise_without_its_generator_is_refused():
    levels = sampling.noise_levels([1000, 500], 5)
    with pytest.raises(ValueError, match="needs the generator"):
        sampling.denoise(lambda x, _t: x, noise_of(0)[0], levels, step_rule="renoise")


def test_an_unknown_step_rule_is_refused():
    levels = sampling.noise_levels([1000], 5)
    with pytest.raises(ValueError, match="one of euler, renoise, got 'ddim'"):
        sampling.denoise(lambda x, _t: x, noise_of(0)[0], levels, step_rule="ddim")


@pytest.mark.parametrize("step_rule", sampling.STEP_RULES)
def test_a_seed_fixes_every_bit(step_rule):
    levels = sampling.noise_levels([1000, 750, 500, 250], 5)

    def run(seed):
        noise, generator = noise_of(seed)
        return sampling.denoise(
            lambda x, t: x.sin() * t / 1000,
            noise,
            levels,
            step_rule=step_rule,
            generator=generator,
        )

    assert torch.equal(run(42), run(42))
    assert not torch.equal(run(42), run(43))


def test_noise_is_fp32_with_a_batch_axis_and_independent_of_the_global_seed():
    torch.manual_seed(1)
    first, _ = noise_of(9)
    torch.manual_seed(2)
    second, _ = noise_of(9)
    assert first.shape == (1, *SHAPE)
    assert first.dtype == torch.float32
    assert torch.equal(first, second)
    assert torch.equal(first[0], torch.randn(SHAPE, generator=torch.Generator().manual_seed(9)))


def test_the_network_is_asked_at_each_level_in_order():
    levels = sampling.noise_levels([1000, 750, 500, 250], 5)
    asked, announced = [], []

    def velocity(x, timestep):
        assert timestep.shape == (1,)
        asked.append(timestep.item())
        return torch.zeros_like(x)

    sampling.denoise(
        velocity,
        noise_of(0)[0],
        levels,
        step_rule="euler",
        on_step=lambda k, n: announced.append((k, n, len(asked))),
    )
    assert asked == levels.timesteps.tolist()
    assert announced == [(0, 4, 0), (1, 4, 1), (2, 4, 2), (3, 4, 3)]


def test_what_on_step_raises_ends_the_loop():
    class Cancelled(Exception):  # stands for the worker's own
        pass

    calls = []

    def on_step(step, _num_steps):
        if step == 2:
            raise Cancelled

    def velocity(x, _t):
        calls.append(1)
        return x

    levels = sampling.noise_levels([1000, 750, 500, 250], 5)
    with pytest.raises(Cancelled):
        sampling.denoise(velocity, noise_of(0)[0], levels, step_rule="euler", on_step=on_step)
    assert len(calls) == 2


def test_latents_stay_fp32_under_a_bf16_network():
    levels = sampling.noise_levels([1000, 500], 5)
    seen = []

    def velocity(x, _t):
        seen.append(x.dtype)
        return x.to(torch.bfloat16)

    end = sampling.denoise(velocity, noise_of(0)[0], levels, step_rule="euler")
    assert [*seen, end.dtype] == [torch.float32] * 3
