"""Train the tiny autoencoder on the tiny world: single frames first, then clips.

Plain losses do not work here. A shape covers a tenth of the pixels, so the mean error is least for
an empty picture, and a network that starts there stays there: the loss weighs the surroundings of
shapes and the rest alike. The weight of the KL term keeps latents smooth enough to be generated.
"""

# B batch, C channels, T frames, H W rows columns

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import vae
from models.causal_conv import CausalConv3d
from models.tiny import loop, readout, recipes, whole_clip, world

CHROMA = 0.35  # of values in [-1, 1]; grey has none
PAST_SCALE = 0.02  # kernels start almost without a past, so that single frames teach clips


def train(
    recipe: recipes.Autoencoder,
    seed: int,
    *,
    path: Path,
    say: loop.Say,
    device: torch.device | str = "cpu",
) -> vae.WanVAE:
    """Train, or go on training; latents are normalised by their own statistics at the end."""
    torch.manual_seed(seed)
    network = vae.WanVAE(recipe.sizes)
    start(network)
    vae.to_channels_last(network)
    network.to(device)
    optimizer = torch.optim.AdamW(
        network.parameters(), betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    scenes = world.trained(world.scenes())
    steps = sum(phase.steps for phase in recipe.phases)

    def step(number: int) -> Mapping[str, float]:
        phase, place = recipe.phase_at(number)
        dice = loop.dice(seed, number)
        share = recipe.passing_share if phase.passing_share is None else phase.passing_share
        some = [next(world.stream(dice, scenes, share)) for _ in range(phase.batch)]
        first = dice.randint(0, world.NUM_FRAMES - phase.frames)
        clips = world.draw(some, dice, frames=slice(first, first + phase.frames))
        clips = clips.to(device, memory_format=torch.channels_last_3d)
        factor = loop.warm_cosine(place, phase.steps, warmup=50, last=phase.last_rate / phase.rate)
        loop.set_rate(optimizer, phase.rate * factor)
        noise = loop.generator(seed, number, device) if phase.kl_weight else None
        error, kl = losses(
            network, clips, noise, trains_encoder=phase.part == "both", blur=phase.blur
        )
        optimizer.zero_grad()
        (error + phase.kl_weight * kl).backward()  # type: ignore[no-untyped-call]  # torch's stub
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return {"error": error.item(), "kl": kl.item()}

    parts: dict[str, loop.Stateful] = {"network": network, "optimizer": optimizer}
    loop.run("autoencoder", parts, step, steps=steps, path=path, say=say)
    return normalised(network, seed)


def start(network: vae.WanVAE) -> None:
    """Convolutions in time begin as convolutions of the newest frame."""
    with torch.no_grad():
        for name, layer in network.named_modules():
            if not isinstance(layer, CausalConv3d) or layer.kernel_size[0] == 1:
                continue
            if name.endswith("time_conv"):
                layer.weight.zero_()
                for half in layer.weight.split(layer.in_channels):  # type: ignore[no-untyped-call]  # torch's stub
                    half[:, :, -1, 0, 0].diagonal().add_(1.0)
            else:
                layer.weight[:, :, :-1] *= PAST_SCALE
                layer.weight[:, :, -1] *= math.sqrt(3)


def losses(
    network: vae.WanVAE,
    clips_BCTHW: Tensor,
    noise: torch.Generator | None,
    *,
    trains_encoder: bool = True,
    blur: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Balanced error of the reconstruction, and the KL divergence per latent number in nats."""
    with torch.set_grad_enabled(trains_encoder):
        mean, log_variance = whole_clip.encode(network, clips_BCTHW)
    latents = mean
    if noise is not None:
        latents = sampled(mean, log_variance, noise)
        if blur:
            latents = latents + blurring(mean, blur, noise)
    difference = (whole_clip.decode(network, latents) - clips_BCTHW).abs()
    error_BTHW = (difference + 2 * difference.square()).mean(1)
    near = near_shapes(clips_BCTHW)
    balanced = 0.5 * error_BTHW[near].mean() + 0.5 * error_BTHW[~near].mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return balanced, kl


def sampled(mean: Tensor, log_variance: Tensor, noise: torch.Generator) -> Tensor:
    drawn = torch.randn(mean.shape, generator=noise, device=noise.device)
    return mean + (0.5 * log_variance).exp() * drawn.to(mean.device)


def blurring(latents_BCTHW: Tensor, most: float, noise: torch.Generator) -> Tensor:
    """Noise of a random share, up to `most`, of each channel's spread; a share for each clip."""
    spread = latents_BCTHW.detach().std((0, 2, 3, 4), keepdim=True)
    device = latents_BCTHW.device
    share = most * torch.rand((len(latents_BCTHW), 1, 1, 1, 1), generator=noise, device=device)
    return share * spread * torch.randn(latents_BCTHW.shape, generator=noise, device=device)


def near_shapes(clips_BCTHW: Tensor) -> Tensor:
    """True within four pixels of what is coloured: [B, T, H, W].

    That is half a pillar, so all of a shape that passes behind one is near it.
    """
    chroma_BTHW = clips_BCTHW.amax(1) - clips_BCTHW.amin(1)
    return functional.max_pool2d((chroma_BTHW > CHROMA).float(), 9, stride=1, padding=4) > 0


@torch.no_grad()
def normalised(network: vae.WanVAE, seed: int, *, clips: int = 256) -> vae.WanVAE:
    """The same network with the mean and spread of sampled latents in its config.

    Of sampled ones, not of their means: a channel that carries little is then not blown up.
    """
    device = network.conv1.weight.device
    dice, noise = loop.dice(seed, -1), loop.generator(seed, -1)
    scenes = world.trained(world.scenes())
    kept = []
    for _ in range(clips // 16):
        some = [next(world.stream(dice, scenes, 0.3)) for _ in range(16)]
        mean, log_variance = whole_clip.encode(network, world.draw(some, dice).to(device))
        kept.append(sampled(mean, log_variance, noise))
    latents = torch.cat(kept).transpose(0, 1).flatten(1)
    network.config = dataclasses.replace(
        network.config,
        latent_mean=tuple(round(value, 4) for value in latents.mean(1).tolist()),
        latent_std=tuple(round(value, 4) for value in latents.std(1).tolist()),
    )
    return network.eval().requires_grad_(requires_grad=False)


@torch.no_grad()
def check(network: vae.WanVAE, *, num_frames: int, clips: int = 48) -> Mapping[str, float]:
    """PSNR in dB of held-back clips, and for whole clips what is read from the reconstructions."""
    dice = loop.dice(7, num_frames)
    scenes = [next(world.stream(dice, world.held_back(world.scenes()), 0.3)) for _ in range(clips)]
    frames = world.draw(scenes, dice)[:, :, :num_frames]
    shown = decode(network, network.encode(frames))
    psnr = -10 * math.log10((shown - frames).square().mean().item() / 4)
    if num_frames < world.NUM_FRAMES:
        return {"psnr": psnr}
    return {"psnr": psnr, **readout.accuracy(readout.read(shown), scenes)}


@torch.no_grad()
def decode(network: vae.WanVAE, latents_BCTHW: Tensor, *, batch: int = 16) -> Tensor:
    """Frames in [-1, 1] of normalised latents."""
    parts = [
        torch.cat(list(network.decode_chunks(part)), dim=2)
        for part in latents_BCTHW.split(batch)  # type: ignore[no-untyped-call]  # torch's stub
    ]
    return torch.cat(parts)
