"""What the renderer would do, up to a step that is chosen at random: the only one with gradient."""

# B batch, C latent channels, T H W latent frames, rows, columns

from collections.abc import Callable

import torch
from torch import Tensor

from models import sampling

DrawNoise = Callable[[], Tensor]
"""Fresh noise in the shape of the latents."""


def until(
    exit_step: int,
    velocity_fn: sampling.VelocityFn,
    noise_BCTHW: Tensor,
    levels: sampling.NoiseLevels,
    *,
    rule: sampling.StepRule,
    draw_noise: DrawNoise,
) -> Tensor:
    """The clean latents that step `exit_step` predicts, after steps 0..exit_step - 1.

    Only the last of these exit_step + 1 forwards is seen by autograd.
    """
    latents = walk(exit_step, velocity_fn, noise_BCTHW, levels, rule=rule, draw_noise=draw_noise)
    velocity = _ask(exit_step, velocity_fn, latents, levels)
    return sampling.predict_clean(latents, velocity, levels.sigmas[exit_step])


@torch.no_grad()
def walk(
    num_steps: int,
    velocity_fn: sampling.VelocityFn,
    noise_BCTHW: Tensor,
    levels: sampling.NoiseLevels,
    *,
    rule: sampling.StepRule,
    draw_noise: DrawNoise,
) -> Tensor:
    """The latents after so many steps, at the level of the next one."""
    latents = noise_BCTHW
    for step in range(num_steps):
        latents = _step(step, velocity_fn, latents, levels, rule, draw_noise)
    return latents


def _step(
    step: int,
    velocity_fn: sampling.VelocityFn,
    latents: Tensor,
    levels: sampling.NoiseLevels,
    rule: sampling.StepRule,
    draw_noise: DrawNoise,
) -> Tensor:
    next_sigma = levels.sigmas[step + 1]
    velocity = _ask(step, velocity_fn, latents, levels)
    clean = sampling.predict_clean(latents, velocity, levels.sigmas[step])
    if rule == "renoise":
        return sampling.mix(clean, draw_noise(), next_sigma)
    return sampling.euler(clean, velocity, next_sigma, None)


def _ask(
    step: int, velocity_fn: sampling.VelocityFn, latents: Tensor, levels: sampling.NoiseLevels
) -> Tensor:
    timestep_B = levels.timesteps[step].to(latents.device).expand(latents.shape[0])
    return velocity_fn(latents, timestep_B).to(latents.dtype)
