"""What the renderer would do, up to a step that is chosen at random: the only one with gradient."""

# B batch, C latent channels, T H W latent frames, rows, columns

import torch
from torch import Tensor

from models import sampling


def until(
    exit_step: int,
    velocity_fn: sampling.VelocityFn,
    noise_BCTHW: Tensor,
    levels: sampling.NoiseLevels,
    *,
    rule: sampling.StepRule,
    draw_noise: sampling.DrawNoise,
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
    draw_noise: sampling.DrawNoise,
) -> Tensor:
    """The latents after so many steps, at the level of the next one."""
    latents = noise_BCTHW
    for step in range(num_steps):
        velocity = _ask(step, velocity_fn, latents, levels)
        clean = sampling.predict_clean(latents, velocity, levels.sigmas[step])
        next_sigma = levels.sigmas[step + 1]
        latents = sampling.advance(clean, velocity, next_sigma, rule=rule, draw_noise=draw_noise)
    return latents


def _ask(
    step: int, velocity_fn: sampling.VelocityFn, latents: Tensor, levels: sampling.NoiseLevels
) -> Tensor:
    timestep_B = levels.timesteps[step].to(latents.device).expand(latents.shape[0])
    return velocity_fn(latents, timestep_B).to(latents.dtype)
