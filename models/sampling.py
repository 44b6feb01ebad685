"""Noise levels, step rules and the denoising loop of the 4-step distilled models.

A distilled model is told at which noise levels to look; everything else here is arithmetic:
with x = (1 - sigma) * x0 + sigma * eps the network predicts the velocity v = eps - x0.
"""

# B batch, C latent channels, T latent frames, H W latent height and width

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

TABLE_LENGTH = 1000  # training steps; an entry of a step list is an index into this table

StepRule = Literal["euler", "renoise"]
STEP_RULES: tuple[StepRule, ...] = ("euler", "renoise")

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(latents_BCTHW, timestep_B) -> velocity_BCTHW"""
DrawNoise = Callable[[], Tensor]
"""Fresh noise in the shape of the latents."""


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """Where the network is asked, from noise to picture: `timesteps` is 1000 * `sigmas`."""

    sigmas: tuple[float, ...]
    timesteps: Tensor
    """fp32, one per step, not rounded: the network was distilled at 937.5, not at 937."""

    def __len__(self) -> int:
        return len(self.sigmas)


def sigma_table(sample_shift: float) -> Tensor:
    """The 1000 noise levels from 1 down to almost 0, fp32: shift * s / (1 + (shift - 1) * s)."""
    s = torch.linspace(1.0, 0.0, TABLE_LENGTH + 1, dtype=torch.float32)[:-1]
    return sample_shift * s / (1 + (sample_shift - 1) * s)


def noise_levels(denoising_step_list: Sequence[int], sample_shift: float) -> NoiseLevels:
    """Look up a preset's step list: entry x is place 1000 - x of the shifted table.

    `[1000, 750, 500, 250]` at shift 5 gives sigmas 1, .9375, .8333, .625. Raises ValueError for an
    empty list, for entries outside 1..1000 or not falling, and for a shift that is not positive.
    """
    steps = list(denoising_step_list)
    if not steps:
        raise ValueError(
            "denoising_step_list must not be empty; 4-step models use [1000, 750, 500, 250]"
        )
    for step in steps:
        if isinstance(step, bool) or not isinstance(step, int) or not 1 <= step <= TABLE_LENGTH:
            raise ValueError(f"denoising_step_list takes integers from 1 to 1000, got {step!r}")
    if any(later >= earlier for earlier, later in itertools.pairwise(steps)):
        raise ValueError(f"denoising_step_list must fall, e.g. [1000, 750, 500, 250], got {steps}")
    if not 0 < sample_shift < float("inf"):
        raise ValueError(
            f"sample_shift must be a positive number (distilled Wan2.1: 5), got {sample_shift}"
        )
    sigmas = sigma_table(sample_shift)[[TABLE_LENGTH - step for step in steps]]
    return NoiseLevels(sigmas=tuple(sigmas.tolist()), timesteps=1000 * sigmas)


def initial_noise(
    seed: int, shape: tuple[int, int, int, int], device: torch.device | str
) -> tuple[Tensor, torch.Generator]:
    """Noise of a latent shape (C, T, H, W) as [1, C, T, H, W] fp32, and the generator it came from.

    Each call makes a fresh generator, so nothing leaks from one job into the next. It is a CPU
    generator whatever the device: a seed means the same video on every GPU. LightX2V draws on the
    CUDA device, so its video for a seed differs from ours. Hand the generator on to `denoise`:
    the step rule `renoise` draws from it.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    noise = torch.randn((1, *shape), generator=generator, dtype=torch.float32)
    return noise.to(device), generator


def mix(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Noise of a level on clean latents: x = (1 - sigma) * x0 + sigma * eps."""
    return (1 - sigma) * clean + sigma * noise


def predict_clean(latents: Tensor, velocity: Tensor, sigma: float | Tensor) -> Tensor:
    """The clean latents that a velocity points to: x0 = x - sigma * v."""
    return latents - sigma * velocity


def advance(
    clean: Tensor, velocity: Tensor, next_sigma: float, *, rule: StepRule, draw_noise: DrawNoise
) -> Tensor:
    """The latents at the next level.

    `euler` goes along the velocity: x = x0 + sigma' * v. `renoise` mixes the clean prediction with
    fresh noise: x = (1 - sigma') * x0 + sigma' * eps.
    """
    if rule == "renoise":
        return mix(clean, draw_noise(), next_sigma)
    return clean + next_sigma * velocity


def _never_stop(_step: int, _num_steps: int) -> None:
    return None


def denoise(
    velocity_fn: VelocityFn,
    noise_BCTHW: Tensor,
    levels: NoiseLevels,
    *,
    step_rule: StepRule,
    generator: torch.Generator | None = None,
    on_step: Callable[[int, int], None] = _never_stop,
) -> Tensor:
    """Run every step and return the clean latents, fp32 (fp64 noise stays fp64).

    `on_step(k, n)` is called before step k = 0..n-1; what it raises ends the loop (cancelling).
    Latents and arithmetic stay in fp32 between steps whatever the network computes in. The last
    step returns its clean prediction; no noise is added after it.
    """
    if step_rule not in STEP_RULES:
        raise ValueError(f"step_rule must be one of {', '.join(STEP_RULES)}, got {step_rule!r}")
    latents = noise_BCTHW.to(torch.promote_types(noise_BCTHW.dtype, torch.float32))
    timesteps = levels.timesteps.to(latents.device)
    clean = latents

    def draw_noise() -> Tensor:
        if generator is None:
            raise ValueError("step_rule 'renoise' needs the generator that made the initial noise")
        eps = torch.randn(clean.shape, generator=generator, dtype=torch.float32)
        return eps.to(clean)

    for step, sigma in enumerate(levels.sigmas):
        on_step(step, len(levels))
        timestep_B = timesteps[step].expand(latents.shape[0])
        velocity = velocity_fn(latents, timestep_B).to(latents.dtype)
        clean = predict_clean(latents, velocity, sigma)
        if step + 1 < len(levels):
            next_sigma = levels.sigmas[step + 1]
            latents = advance(clean, velocity, next_sigma, rule=step_rule, draw_noise=draw_noise)
    return clean
