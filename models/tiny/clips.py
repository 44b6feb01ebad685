"""Clips of the tiny world as latents, and what image-to-video is told of their first frames."""

# B batch, C channels, T frames, H W rows columns, I image tokens, D width

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import conditioning, config, image_encoder, vae
from models.tiny import loop, make, world

BATCH = 20


@dataclass(frozen=True, kw_only=True)
class Clips:
    """`y` and `tokens` are what an image-to-video network is told; empty for text-to-video."""

    scenes: Sequence[world.Scene]
    latents: Tensor
    """[N, 16, T, H, W] bf16, normalised means"""
    y: Tensor
    tokens: Tensor

    def take(
        self, rows: Sequence[int], device: torch.device
    ) -> tuple[list[world.Scene], Tensor, Tensor, Tensor]:
        """Scenes, latents, y and image tokens of these rows, in fp32 on the device."""
        index = torch.tensor(rows)

        def of(tensor: Tensor) -> Tensor:
            return tensor[index].to(device).float() if len(tensor) else tensor

        scenes = [self.scenes[row] for row in rows]
        return scenes, of(self.latents), of(self.y), of(self.tokens)


def image_tower(seed: int) -> image_encoder.ImageEncoder:
    """CLIP's tower with the weights of this seed, never trained: `y` carries the picture."""
    generator = torch.Generator().manual_seed(seed)
    tower = make.random_image_encoder(config.TINY_IMAGE_ENCODER, generator)
    return tower.eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def prepare(
    network: vae.WanVAE,
    *,
    count: int,
    seed: int,
    passing_share: float,
    tower: image_encoder.ImageEncoder | None,
    path: Path,
    say: loop.Say,
) -> Clips:
    """Draw and encode, or read what was encoded before. `tower`: for image-to-video."""
    if path.exists():
        kept = torch.load(path, map_location="cpu", weights_only=True)
    else:
        scenes = drawn_scenes(count, seed, passing_share)
        kept = _encode(network, scenes, seed, tower, say)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(kept, partial)
        partial.replace(path)
    return Clips(scenes=drawn_scenes(count, seed, passing_share), **kept)


def drawn_scenes(count: int, seed: int, passing_share: float) -> list[world.Scene]:
    scenes = world.stream(loop.dice(seed, -2), world.trained(world.scenes()), passing_share)
    return [next(scenes) for _ in range(count)]


def _encode(
    network: vae.WanVAE,
    scenes: Sequence[world.Scene],
    seed: int,
    tower: image_encoder.ImageEncoder | None,
    say: loop.Say,
) -> dict[str, Tensor]:
    dice: random.Random = loop.dice(seed, -3)
    device = network.conv1.weight.device
    latents, ys, tokens = [], [], []
    for first in range(0, len(scenes), BATCH):
        frames = world.draw(scenes[first : first + BATCH], dice).to(device)
        latents.append(network.encode(frames).bfloat16().cpu())
        if tower is not None:
            y, image = condition(network, tower, frames[:, :, 0])
            ys.append(y.bfloat16().cpu())
            tokens.append(image.bfloat16().cpu())
        if first % (25 * BATCH) == 0:
            say(f"clips  {first}/{len(scenes)}")
    none = torch.zeros(0)
    return {
        "latents": torch.cat(latents),
        "y": torch.cat(ys) if ys else none,
        "tokens": torch.cat(tokens) if tokens else none,
    }


@torch.no_grad()
def condition(
    network: vae.WanVAE, tower: image_encoder.ImageEncoder, images_BCHW: Tensor
) -> tuple[Tensor, Tensor]:
    """y [B, 4 + 16, T, H, W] and image tokens [B, I, D] of first frames in [-1, 1]."""
    padded = conditioning.pad_in_time(images_BCHW, world.NUM_FRAMES)
    latents = network.encode(padded, still_from=1)
    mask = conditioning.first_frame_mask(latents, channels=network.config.temporal_stride)
    return torch.cat([mask, latents], dim=1), tower.encode(images_BCHW)
