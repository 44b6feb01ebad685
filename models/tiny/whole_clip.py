"""The autoencoder over whole clips at once, for training: the same numbers as chunk by chunk.

Nothing is cached and nothing is clamped: a clamp would stop the gradient of what is too bright.
"""

# B batch, C channels, T frames, H W rows columns

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import vae
from models.causal_conv import CausalConv3d, Chunked, FrameCache


def encode(network: vae.WanVAE, frames_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the latents, not normalised, of frames in [-1, 1]."""
    encoded = network.conv1(_encoder(network.encoder, frames_BCTHW))
    mean, log_variance = encoded.chunk(2, dim=1)
    return mean, log_variance.clamp(-30.0, 20.0)


def decode(network: vae.WanVAE, latents_BCTHW: Tensor) -> Tensor:
    """Frames of latents that are not normalised; what leaves [-1, 1] stays."""
    decoder = network.decoder
    x = decoder.conv1.of_chunk(network.conv2(latents_BCTHW), FrameCache())
    return _run(decoder.head, _run(decoder.upsamples, _run(decoder.middle, x)))


def _encoder(encoder: vae.Encoder, frames_BCTHW: Tensor) -> Tensor:
    x = encoder.conv1.of_chunk(frames_BCTHW, FrameCache())
    return _run(encoder.head, _run(encoder.middle, _run(encoder.downsamples, x)))


def _run(layers: nn.Sequential, x: Tensor) -> Tensor:
    for layer in layers:
        if isinstance(layer, vae.Downsample):
            x = _downsample(layer, x)
        elif isinstance(layer, vae.Upsample):
            x = _upsample(layer, x)
        elif isinstance(layer, CausalConv3d):
            x = layer.of_chunk(x, FrameCache())
        else:
            x = layer(x, FrameCache()) if isinstance(layer, Chunked) else layer(x)
    return x


def _downsample(layer: vae.Downsample, x_BCTHW: Tensor) -> Tensor:
    x_BCTHW = _each_frame(layer.resample, x_BCTHW)
    if layer.time_conv is None or x_BCTHW.shape[2] == 1:
        return x_BCTHW
    first = x_BCTHW[:, :, :1]
    return torch.cat([first, layer.time_conv(x_BCTHW)], dim=2)


def _upsample(layer: vae.Upsample, x_BCTHW: Tensor) -> Tensor:
    if layer.time_conv is not None and x_BCTHW.shape[2] > 1:
        first, rest = x_BCTHW[:, :, :1], x_BCTHW[:, :, 1:]
        # The chunked form forgets the first frame here: what lies before the second is zero.
        padded = functional.pad(rest, (0, 0, 0, 0, layer.time_conv.num_past_frames, 0))
        doubled = layer.time_conv(padded)
        pairs = einops.rearrange(doubled, "b (two c) t h w -> b c (t two) h w", two=2)
        x_BCTHW = torch.cat([first, pairs], dim=2)
    return _each_frame(layer.resample, x_BCTHW)


def _each_frame(layers: nn.Sequential, x_BCTHW: Tensor) -> Tensor:
    return vae.as_video(layers(vae.as_images(x_BCTHW)), batch=x_BCTHW.shape[0])
