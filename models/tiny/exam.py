"""Ask a transformer of the tiny world for clips of scenes it was not trained on, and mark them."""

# B batch, C channels, T frames, H W rows columns, S text tokens, I image tokens, D width

import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models import image_encoder, sampling, text_encoder, transformer, vae
from models.tiny import autoencoder, clips, loop, readout, world

SHIFT = 5.0
BATCH = 40
FIRST_FRAME_CHANNELS = 4  # of the mask, before the picture's latents
PASSING_SHARE = 0.25  # of the clips
PROJECTIONS = 256  # random directions of the sliced Wasserstein distance


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How a network is asked."""

    steps: tuple[int, ...]
    step_rule: sampling.StepRule = "euler"
    guidance: float = 1.0
    """1 asks once per step, any other twice."""


TEACHER = Sampler(steps=tuple(range(1000, 0, -20)), guidance=2.0)
"""Fifty steps. More guidance makes shapes move faster than they should."""


@dataclass(frozen=True, kw_only=True)
class Paper:
    """Questions: scenes, their contexts and noise; for image-to-video their pictures too."""

    seed: int = 0
    """Of the noise that the step rule `renoise` adds."""

    scenes: Sequence[world.Scene]
    context_BSD: Tensor  # noqa: N815  # named by its axes, as everywhere
    empty_SD: Tensor  # noqa: N815
    noise_BCTHW: Tensor  # noqa: N815
    condition: tuple[Tensor, Tensor] | None = None
    """y [B, 20, T, H, W] and image tokens [B, I, D]"""


@torch.no_grad()
def paper(
    encoder: text_encoder.TextEncoder,
    network: vae.WanVAE,
    *,
    count: int,
    seed: int,
    tower: image_encoder.ImageEncoder | None = None,
) -> Paper:
    """`count` held-back scenes with all of their factors said; `tower`: for image-to-video."""
    dice = loop.dice(seed, -4)
    source = world.stream(dice, world.held_back(world.scenes()), PASSING_SHARE)
    scenes = [next(source) for _ in range(count)]
    shape = network.config.latent_shape(
        num_frames=world.NUM_FRAMES, height=world.SIZE, width=world.SIZE
    )
    condition = None
    if tower is not None:
        firsts = world.draw(scenes, dice, frames=slice(0, 1))[:, :, 0]
        condition = clips.condition(network, tower, firsts)
    return Paper(
        scenes=scenes,
        context_BSD=torch.cat([encoder.encode(world.prompt(scene)) for scene in scenes]),
        empty_SD=encoder.encode("")[0],
        noise_BCTHW=torch.randn((count, *shape), generator=loop.generator(seed, -5)),
        seed=seed,
        condition=condition,
    )


def with_other_noise(asked: Paper, *, seed: int) -> Paper:
    """The same questions from other noise."""
    noise = torch.randn(asked.noise_BCTHW.shape, generator=loop.generator(seed, -5))
    return dataclasses.replace(asked, noise_BCTHW=noise, seed=seed)


@torch.no_grad()
def answer(network: transformer.WanTransformer, asked: Paper, sampler: Sampler) -> Tensor:
    """Clean latents."""
    levels = sampling.noise_levels(sampler.steps, SHIFT)
    generator = loop.generator(asked.seed, -8)
    parts = []
    for first in range(0, len(asked.scenes), BATCH):
        some = slice(first, first + BATCH)
        velocity = _velocity(network, asked, some, sampler.guidance)
        noise, rule = asked.noise_BCTHW[some], sampler.step_rule
        parts.append(sampling.denoise(velocity, noise, levels, step_rule=rule, generator=generator))
    return torch.cat(parts)


def _velocity(
    network: transformer.WanTransformer, asked: Paper, some: slice, guidance: float
) -> sampling.VelocityFn:
    context_BSD = asked.context_BSD[some]
    empty_BSD = asked.empty_SD.expand_as(context_BSD)
    y, tokens = (None, None)
    if asked.condition is not None:
        y, tokens = (part[some] for part in asked.condition)

    def of(latents_BCTHW: Tensor, timestep_B: Tensor) -> Tensor:
        joined = latents_BCTHW if y is None else torch.cat([latents_BCTHW, y], dim=1)
        told: Tensor = network(joined, timestep_B, context_BSD, tokens)
        if guidance == 1.0:
            return told
        untold: Tensor = network(joined, timestep_B, empty_BSD, tokens)
        return untold + guidance * (told - untold)

    return of


def mark(frames_BCTHW: Tensor, latents_BCTHW: Tensor, asked: Paper) -> Mapping[str, float]:
    """Accuracy per factor, motion as a ratio to the truth, and spreads of latents and pixels."""
    readings = readout.read(frames_BCTHW)
    moving = [
        reading.pixels_per_frame / scene.pixels_per_frame
        for reading, scene in zip(readings, asked.scenes, strict=True)
        if scene.pixels_per_frame and reading.direction == scene.direction
    ]
    return {
        **readout.accuracy(readings, asked.scenes),
        "motion": sum(moving) / max(1, len(moving)),
        "latent_std": latents_BCTHW.std().item(),
        "pixel_std": frames_BCTHW.std().item(),
    }


def take(
    network: transformer.WanTransformer,
    decoder: vae.WanVAE,
    asked: Paper,
    sampler: Sampler,
) -> tuple[Mapping[str, float], Tensor, Tensor]:
    """Marks, frames and latents; `seconds` is the time of sampling alone, per clip."""
    began = time.perf_counter()
    latents = answer(network, asked, sampler)
    seconds = (time.perf_counter() - began) / len(latents)
    frames = autoencoder.decode(decoder, latents)
    return {**mark(frames, latents, asked), "seconds": seconds}, frames, latents


def diversity(some: Tensor, others: Tensor) -> float:
    """How far two draws of the same prompts are apart: root mean square, mean of the clips."""
    return (some - others).flatten(1).square().mean(1).sqrt().mean().item()


@torch.no_grad()
def first_frame(decoder: vae.WanVAE, latents_BCTHW: Tensor, asked: Paper) -> float:
    """PSNR in dB of first frames to the pictures that were given, both through the autoencoder."""
    if asked.condition is None:
        raise ValueError("text-to-video is given no pictures")
    given_BCTHW = asked.condition[0][:, FIRST_FRAME_CHANNELS:, :1]
    shown, meant = (
        autoencoder.decode(decoder, part[:, :, :1]) for part in (latents_BCTHW, given_BCTHW)
    )
    return -10 * math.log10((shown - meant).square().mean().item() / 4)


def distance(some: Tensor, others: Tensor) -> float:
    """Sliced Wasserstein-2 between two sets of equally many samples, per number of a sample."""
    a, b = some.flatten(1).float(), others.flatten(1).float()
    directions = torch.randn(a.shape[1], PROJECTIONS, generator=loop.generator(0, -6))
    directions /= directions.norm(dim=0)
    along_a, along_b = ((x @ directions).sort(0).values for x in (a, b))
    return (along_a - along_b).square().mean().sqrt().item()


def table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Marks as text, a line per sampler."""
    columns = list(next(iter(rows.values())))
    width = max(len(name) for name in rows)
    lines = [" ".join([" " * width, *(f"{column[:9]:>9}" for column in columns)])]
    for name, marks in rows.items():
        lines.append(
            " ".join([f"{name:{width}}", *(f"{marks[column]:9.3f}" for column in columns)])
        )
    return "\n".join(lines)
