"""The rollout is the renderer's own loop, cut short."""

import pytest
import torch

from models import sampling
from models.distillation import rollout

LEVELS = sampling.noise_levels((1000, 750, 500, 250), 5.0)
SHAPE = (16, 2, 4, 4)


def velocity(latents, timestep_B):
    return torch.tanh(latents * 1.3) + timestep_B.view(-1, 1, 1, 1, 1) / 2000


@pytest.mark.parametrize("rule", sampling.STEP_RULES)
def test_all_steps_are_what_the_renderer_makes_of_the_same_noise(rule):
    noise, generator = sampling.initial_noise(7, SHAPE, "cpu")
    rendered = sampling.denoise(velocity, noise, LEVELS, step_rule=rule, generator=generator)
    noise, generator = sampling.initial_noise(7, SHAPE, "cpu")
    made = rollout.until(
        3,
        velocity,
        noise,
        LEVELS,
        rule=rule,
        draw_noise=lambda: torch.randn(noise.shape, generator=generator),
    )
    assert torch.equal(made, rendered)


@pytest.mark.parametrize("exit_step", range(4))
def test_one_forward_of_all_is_seen_by_autograd(exit_step):
    seen = []

    def counted(latents, timestep_B):
        seen.append((torch.is_grad_enabled(), float(timestep_B[0])))
        return velocity(latents, timestep_B)

    noise = torch.randn(1, *SHAPE)
    rollout.until(exit_step, counted, noise, LEVELS, rule="euler", draw_noise=lambda: noise)
    assert [grad for grad, _ in seen] == [False] * exit_step + [True]
    assert [timestep for _, timestep in seen] == LEVELS.timesteps[: exit_step + 1].tolist()
