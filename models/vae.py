"""The causal video autoencoder of Wan2.1; parameters are named as in the official checkpoint.

It works chunk by chunk: the first frame alone, then as many frames as one latent frame covers.
"""

# B batch, C channels (RGB or latent), T frames, H W rows columns, F = B * T frames as a batch

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import einops
import torch
from torch import Tensor, nn
from torch.nn import functional

from models import config, fusion, norms
from models.causal_conv import (
    PIECE_BYTES,
    Activation,
    CausalConv3d,
    Chunked,
    FrameCache,
    frames_like,
    pixels,
    pixels_to_write,
)
from models.norms import ChannelRMSNorm


class ResidualBlock(Chunked):
    def __init__(self, in_dim: int, out_dim: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelRMSNorm(in_dim, 3),
            nn.SiLU(),
            CausalConv3d(in_dim, out_dim, (3, 3, 3)),
            ChannelRMSNorm(out_dim, 3),
            nn.SiLU(),
            nn.Identity(),  # dropout in the official network; keeps the numbering of the names
            CausalConv3d(out_dim, out_dim, (3, 3, 3)),
        )
        needs_shortcut = in_dim != out_dim
        self.shortcut = CausalConv3d(in_dim, out_dim, (1, 1, 1)) if needs_shortcut else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        skipped = x if self.shortcut is None else self.shortcut(x)
        norm, _silu, conv, next_norm, _silu, _dropout, next_conv = _parts(self.residual)
        convolved: Tensor
        convolved, bias = conv.without_bias(conv.see(x, cache, Activation(norm)))
        seen = next_conv.see(convolved, cache, Activation(next_norm, bias))
        del convolved  # not held while the second one computes
        convolved, bias = next_conv.without_bias(seen)
        # Into it, a tensor less; no gradient needs the sum's first part.
        if bias is None:
            return convolved.add_(skipped)
        _add(pixels_to_write(convolved), bias, pixels(skipped))
        return convolved


class AttentionBlock(nn.Module):
    """Single-head attention among the pixels of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(dim, 2)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        qkv_FCHW = self.to_qkv(self.norm(as_images(x_BCTHW)))
        q, k, v = einops.rearrange(qkv_FCHW, "f (n c) h w -> n f 1 (h w) c", n=3)
        attended = functional.scaled_dot_product_attention(q, k, v)
        images = einops.rearrange(attended, "f 1 (h w) c -> f c h w", h=x_BCTHW.shape[-2])
        return x_BCTHW + as_video(self.proj(images), batch=x_BCTHW.shape[0])


class Downsample(Chunked):
    """Halves rows and columns, and with `in_time` also the frames after the first."""

    def __init__(self, dim: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=(2, 2))
        )
        self.time_conv = CausalConv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if in_time else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        return self.in_time(self.in_space(x), cache)

    def in_space(self, x: Tensor) -> Tensor:
        return as_video(self.resample(as_images(x)), batch=x.shape[0])

    def in_time(self, x: Tensor, cache: FrameCache) -> Tensor:
        if self.time_conv is None:
            return x
        if cache.starts(self):
            cache.remember(self.time_conv, x, self.time_conv.num_past_frames)
            return x
        return self.time_conv.of_chunk(x, cache)


class Upsample(Chunked):
    """Doubles rows and columns, halves channels; `in_time` doubles the frames after the first."""

    def __init__(self, dim: int, *, in_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=(2.0, 2.0), mode="nearest-exact"),
            nn.Conv2d(dim, dim // 2, 3, padding=1),
        )
        self.time_conv = CausalConv3d(dim, 2 * dim, (3, 1, 1)) if in_time else None

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        return self.in_space(self.in_time(x, cache))

    def in_time(self, x: Tensor, cache: FrameCache) -> Tensor:
        if self.time_conv is None or cache.starts(self):
            return x
        return _interleaved(self.time_conv.of_chunk(x, cache))

    def in_space(self, x: Tensor) -> Tensor:
        """Band by band, as what is enlarged but not convolved yet is the largest of all tensors."""
        images_FCHW = as_images(x)
        height, width = images_FCHW.shape[2:]
        step = max(1, PIECE_BYTES // (4 * images_FCHW.nbytes // height))
        if step >= height:
            return as_video(self.resample(images_FCHW), batch=x.shape[0])
        batch, channels, frames, *_ = x.shape
        enlarged = frames_like(x, (batch, channels // 2, frames, 2 * height, 2 * width))
        bands = _in_bands(self._enlarged_rows, images_FCHW, step)
        for start, band in zip(range(0, 2 * height, 2 * step), bands, strict=True):
            as_images(enlarged)[:, :, start : start + 2 * step].copy_(band)
        return enlarged

    def _enlarged_rows(self, band_FCHW: Tensor) -> Tensor:
        enlarge, conv = _parts(self.resample)
        # Of the rows above and below, twice as many as the convolution sees.
        rows_FCHW = enlarge(band_FCHW)[:, :, 1:-1]
        return functional.conv2d(rows_FCHW, conv.weight, conv.bias, padding=(0, 1))


class Encoder(Chunked):
    """Frames to mean and log-variance of the latents: [B, 3, T, H, W] -> [B, 2 * z_dim, ...].

    Until some layer makes fewer of them, frames are large and go through the layers one by one.
    """

    def __init__(self, sizes: config.VAEConfig) -> None:
        super().__init__()
        dims = [sizes.base_dim * mult for mult in (1, *sizes.dim_mult)]
        self.conv1 = CausalConv3d(3, dims[0], (3, 3, 3))
        layers: list[nn.Module] = []
        for stage, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
            layers += _residual_blocks(in_dim, out_dim, sizes.num_res_blocks)
            if stage < len(sizes.temporal_downsample):
                layers.append(Downsample(out_dim, in_time=sizes.temporal_downsample[stage]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = _middle(dims[-1])
        self.head = _head(dims[-1], 2 * sizes.z_dim)
        self.halves_time_at = _changes_of_time(layers)[0]

    @property
    def rows(self) -> list[list[CausalConv3d]]:
        """Convolutions that are given one frame, as `FrameCache` asks."""
        return _rows([self.conv1, *_parts(self.downsamples)[: self.halves_time_at]])

    def forward(self, x: Tensor, cache: FrameCache, still: int = 0) -> Tensor:
        """`still` frames before the last one are equal to it: see `WanVAE.encode`."""
        frames = torch.split(x, 1, dim=2)
        num_past = sum(conv.num_past_frames for row in self.rows for conv in row)
        shrunk = [
            cache.repeated(
                self.conv1,
                functools.partial(self._large, frame, cache),
                still=still - later,
                num_frames=1,
                num_past=num_past,
            )
            for later, frame in zip(reversed(range(len(frames))), frames, strict=True)
        ]
        halving, *layers = _parts(self.downsamples)[self.halves_time_at :]
        x = halving.in_time(torch.cat(shrunk, dim=2), cache)
        still = _still_after_halving(still - num_past)
        for layer in (*layers, *_parts(self.middle)):
            x, still = _run_still(layer, x, cache, still)
        return _finish(self.head, x, cache)

    def _large(self, frame: Tensor, cache: FrameCache) -> Tensor:
        *layers, halving = _parts(self.downsamples)[: self.halves_time_at + 1]
        x = self.conv1.of_chunk(frame, cache)
        for layer in layers:  # not `run`, whose caller would keep the first x
            x = layer(x, cache)
        shrunk: Tensor = halving.in_space(x)
        return shrunk


class Decoder(Chunked):
    """Latents to frames: [B, z_dim, T, H, W] -> [B, 3, ...].

    From where there are as many as there will be, frames go through the layers one by one.
    """

    def __init__(self, sizes: config.VAEConfig) -> None:
        super().__init__()
        mults = (sizes.dim_mult[-1], *reversed(sizes.dim_mult))
        dims = [sizes.base_dim * mult for mult in mults]
        in_time = tuple(reversed(sizes.temporal_downsample))
        self.conv1 = CausalConv3d(sizes.z_dim, dims[0], (3, 3, 3))
        self.middle = _middle(dims[0])
        layers: list[nn.Module] = []
        for stage, (in_dim, out_dim) in enumerate(itertools.pairwise(dims)):
            upsampled_dim = in_dim // 2 if stage else in_dim
            layers += _residual_blocks(upsampled_dim, out_dim, sizes.num_res_blocks + 1)
            if stage < len(in_time):
                layers.append(Upsample(out_dim, in_time=in_time[stage]))
        self.upsamples = nn.Sequential(*layers)
        self.head = _head(dims[-1], 3)
        self.doubles_time_at = _changes_of_time(layers)[-1]

    @property
    def rows(self) -> list[list[CausalConv3d]]:
        """Convolutions that are given one frame, as `FrameCache` asks."""
        return _rows(self._large_layers)

    def forward(self, x: Tensor, cache: FrameCache) -> Tensor:
        x = self.conv1.of_chunk(x, cache)
        x = run(self.middle, x, cache)
        x = run(_parts(self.upsamples)[: self.doubles_time_at], x, cache)
        doubling, large = _parts(self.upsamples)[self.doubles_time_at], self._large_layers
        waiting = [frame.clone() for frame in torch.split(doubling.in_time(x, cache), 1, dim=2)]
        done = []
        while waiting:
            x = doubling.in_space(waiting.pop(0))
            for layer in large:  # not `run`, whose caller would keep the first x
                x = layer(x, cache)
            done.append(self._paint(x, cache))
        return torch.cat(done, dim=2)

    def _paint(self, frame: Tensor, cache: FrameCache) -> Tensor:
        """The head, with its last convolution taken apart by the frames that it sees.

        What a frame adds to three pictures is kept instead of the frame. Sums are at least fp32.
        """
        norm, _silu, conv = _parts(self.head)
        if conv.trains(frame):
            return _finish(self.head, frame, cache)
        images_FCHW = as_images(frame)
        weight = einops.rearrange(_at_least_fp32(conv.weight), "o c k h w -> (k o) c h w")
        num_parts = weight.shape[0]
        # Tensor cores take output channels by four, else a GPU would lay everything out anew.
        weight = functional.pad(weight, (0, 0, 0, 0, 0, 0, 0, -num_parts % 4))

        def parts_of(band_FCHW: Tensor) -> Tensor:
            activated_NC = _activated(pixels(band_FCHW), norm.gamma.flatten())
            activated_FHWC = activated_NC.view(band_FCHW.movedim(1, -1).shape)
            return functional.conv2d(activated_FHWC.movedim(-1, 1), weight, padding=(0, 1))

        step = max(1, PIECE_BYTES // (images_FCHW.nbytes // images_FCHW.shape[2]))
        parts = torch.cat(list(_in_bands(parts_of, images_FCHW, step)), dim=2)
        parts = einops.rearrange(
            parts[:, :num_parts], "f (k o) h w -> k f o h w", k=conv.kernel_size[0]
        )
        added_FOHW = cache.add_up(conv, parts) + _at_least_fp32(conv.bias)[:, None, None]
        return added_FOHW.to(frame.dtype).unsqueeze(2)

    @property
    def _large_layers(self) -> list[nn.Module]:
        return _parts(self.upsamples)[self.doubles_time_at + 1 :]


class WanVAE(nn.Module):
    """Videos to normalised latents and back. Each way computes in the dtype of its weights."""

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, sizes: config.VAEConfig) -> None:
        super().__init__()
        self.config = sizes
        self.encoder = Encoder(sizes)
        self.conv1 = CausalConv3d(2 * sizes.z_dim, 2 * sizes.z_dim, (1, 1, 1))
        self.conv2 = CausalConv3d(sizes.z_dim, sizes.z_dim, (1, 1, 1))
        self.decoder = Decoder(sizes)

    @property
    def dtype(self) -> torch.dtype:
        """Of decoding; encoding may be wider, see `parameter_dtype`."""
        return self.conv2.weight.dtype

    def encode(self, frames_BCTHW: Tensor, *, still_from: int | None = None) -> Tensor:
        """Normalised means of the latents, [B, z_dim, T', H', W'], at least fp32.

        Takes RGB frames in [-1, 1]. The mean is taken, nothing is sampled: (mu - mean) / std. From
        frame `still_from` on all are equal: then layers that have seen nothing else for as long as
        they remember are not asked again, with the same bits. Of an image with 80 grey frames that
        is two thirds of the work.
        """
        _, _, num_frames, height, width = frames_BCTHW.shape
        self.config.latent_shape(num_frames=num_frames, height=height, width=width)
        stride = self.config.temporal_stride
        chunks = torch.split(
            _channels_last(frames_BCTHW.to(self.conv1.weight.dtype)),
            [1] + [stride] * (num_frames // stride),
            dim=2,
        )
        cache = FrameCache(self.encoder.rows)
        # The last layer by chunk too: its kernel may round otherwise for another number of frames.
        encoded, last = [], -1
        for chunk in chunks:
            last += chunk.shape[2]
            still = 0 if still_from is None else max(0, last - still_from)
            encoded.append(self.conv1(self.encoder(chunk, cache, still)))
        mean, _log_variance = _at_least_fp32(torch.cat(encoded, dim=2)).chunk(2, dim=1)
        offset, scale = self._statistics(mean)
        return (mean - offset) / scale

    def decode_chunks(self, latents_BCTHW: Tensor) -> Iterator[Tensor]:
        """Yield frames [B, 3, t, H, W] in [-1, 1], t = 1 and then 4, as they are decoded.

        Takes normalised latents. The caller may stop between chunks; the dtype is the weights'.
        """
        latents_BCTHW = _at_least_fp32(latents_BCTHW)
        offset, scale = self._statistics(latents_BCTHW)
        raw_BCTHW = _channels_last((latents_BCTHW * scale + offset).to(self.dtype))
        cache = FrameCache(self.decoder.rows)
        for latent_frame in torch.split(raw_BCTHW, 1, dim=2):
            frames = self.decoder(self.conv2(latent_frame), cache)
            yield frames.clamp(-1.0, 1.0)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (
            like.new_tensor(values).view(-1, 1, 1, 1)
            for values in (self.config.latent_mean, self.config.latent_std)
        )
        return mean, std


def parameter_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a parameter is kept to decode in `dtype`: encoding is at least fp32.

    Latents of an image decide every step of its video; frames are rounded to 8 bits.
    """
    encodes = name.startswith(("encoder.", "conv1."))
    return torch.promote_types(dtype, torch.float32) if encodes else dtype


def to_channels_last(network: WanVAE) -> None:
    """Store convolution weights channels last: the norms already work that way, convs then follow.

    Changes no number beyond rounding; decoding in bf16 on a CPU takes a quarter less time.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.to(memory_format=torch.channels_last)


@fusion.chain_of_rows
def _activated(x_NC: Tensor, gamma_C: Tensor) -> Tensor:
    """SiLU(norm(x)), at least fp32."""
    return _at_least_fp32(functional.silu(norms.over_channels(x_NC, gamma_C)))


@fusion.chain_of_rows
def _add(x_NC: Tensor, bias_C: Tensor, y_NC: Tensor) -> None:
    """x + bias + y, where x is."""
    x_NC.copy_(x_NC + bias_C + y_NC)


def run(layers: Iterable[nn.Module], x: Tensor, cache: FrameCache) -> Tensor:
    """Apply layers in order, handing the cache to those that see the video in chunks."""
    for layer in layers:
        x = layer(x, cache) if isinstance(layer, Chunked) else layer(x)
    return x


def _run_still(layer: nn.Module, x: Tensor, cache: FrameCache, still: int) -> tuple[Tensor, int]:
    """The layer's output, and how many frames before its last one are equal to it."""
    if isinstance(layer, Downsample):
        x = cache.repeated(
            layer, lambda: layer.in_space(x), still=still, num_frames=x.shape[2], num_past=0
        )
        return layer.in_time(x, cache), _still_after_halving(still) if layer.time_conv else still
    convs = (conv for conv in layer.modules() if isinstance(conv, CausalConv3d))
    num_past = sum(conv.num_past_frames for conv in convs)
    made = cache.repeated(
        layer,
        lambda: run([layer], x, cache),
        still=still,
        num_frames=x.shape[2],
        num_past=num_past,
    )
    return made, still - num_past


def _still_after_halving(still: int) -> int:
    """Each frame that is left sees three, of which the last is the first of the next."""
    return (still - 2) // 2


def as_images(x_BCTHW: Tensor) -> Tensor:
    """A view where channels come last; by way of them, else one frame's strides would not show."""
    return x_BCTHW.movedim(1, -1).flatten(0, 1).movedim(-1, 1)


def as_video(x_FCHW: Tensor, *, batch: int) -> Tensor:
    x_FHWC = x_FCHW.movedim(1, -1)
    return x_FHWC.view(batch, -1, *x_FHWC.shape[1:]).movedim(-1, 1)


def _channels_last(x_BCTHW: Tensor) -> Tensor:
    """What norms and convolutions are fastest with; all layers keep it."""
    return x_BCTHW.contiguous(memory_format=torch.channels_last_3d)


def _at_least_fp32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _residual_blocks(in_dim: int, out_dim: int, count: int) -> list[ResidualBlock]:
    return [ResidualBlock(out_dim if block else in_dim, out_dim) for block in range(count)]


def _middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), AttentionBlock(dim), ResidualBlock(dim, dim))


def _interleaved(pairs_BCTHW: Tensor) -> Tensor:
    """Twice the frames of half the channels, the second half after the first; channels last."""
    pairs_BTHWC = pairs_BCTHW.permute(0, 2, 3, 4, 1)
    frames_BTHWC = einops.rearrange(pairs_BTHWC, "b t h w (two c) -> b (t two) h w c", two=2)
    return frames_BTHWC.contiguous().permute(0, 4, 1, 2, 3)


def _finish(head: nn.Sequential, x: Tensor, cache: FrameCache) -> Tensor:
    norm, _silu, conv = _parts(head)
    finished: Tensor = conv.of_chunk(x, cache, Activation(norm))
    return finished


def _head(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(
        ChannelRMSNorm(in_dim, 3), nn.SiLU(), CausalConv3d(in_dim, out_dim, (3, 3, 3))
    )


def _changes_of_time(layers: list[nn.Module]) -> list[int]:
    """Where among the layers the number of frames changes."""
    return [
        index
        for index, layer in enumerate(layers)
        if isinstance(layer, Downsample | Upsample) and layer.time_conv is not None
    ]


def _parts(layers: nn.Sequential) -> list[Any]:
    """Its layers, of which we know what they are."""
    return list(layers)


def _in_bands(
    work: Callable[[Tensor], Tensor], images_FCHW: Tensor, num_rows: int
) -> Iterator[Tensor]:
    """Work on rows part by part, each with the row above and below; zeros beyond the edges."""
    height = images_FCHW.shape[2]
    for start in range(0, height, num_rows):
        end = start + num_rows
        band = images_FCHW[:, :, max(0, start - 1) : end + 1]
        if start == 0 or end >= height:
            band = functional.pad(band, (0, 0, int(start == 0), int(end >= height)))
        yield work(band)


def _rows(layers: Iterable[nn.Module]) -> list[list[CausalConv3d]]:
    """The convolutions with a past, those together that follow each other with equal inputs."""
    rows: list[list[CausalConv3d]] = [[]]
    for layer in layers:
        if isinstance(layer, Downsample | Upsample):
            rows.append([])
        for conv in layer.modules():
            if isinstance(conv, CausalConv3d) and conv.num_past_frames:
                if rows[-1] and rows[-1][-1].in_channels != conv.in_channels:
                    rows.append([])
                rows[-1].append(conv)
    return [row for row in rows if row]
