"""Decoding in overlapping tiles: the memory of a small picture for almost the same picture.

It is an approximation: a tile does not see what lies beyond its edge, and the attention in the
middle of the decoder sees one tile only. Tiles are 256 pixels wide, every 192 pixels one, and are
blended linearly over the 64 that they share, as in LightX2V and diffusers; where four tiles meet,
by the product of both weights. Each tile runs through all frames with its own cache. Of 832 x 480
pixels about 1.6 times as many are computed.
"""

# B batch, C channels, T frames, H W rows columns

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from models import vae

TILE_PIXELS = 256
STRIDE_PIXELS = 192

OnTile = Callable[[int, int], None]


def _never_stop(_tile: int, _num_tiles: int) -> None:
    return None


def decode_chunks(
    network: vae.WanVAE,
    latents_BCTHW: Tensor,
    *,
    tile_pixels: int = TILE_PIXELS,
    stride_pixels: int = STRIDE_PIXELS,
    on_tile: OnTile = _never_stop,
) -> Iterator[Tensor]:
    """Yield frames as `WanVAE.decode_chunks` does, and bit for bit the same where one tile is all.

    With several tiles the first chunk comes when the last tile is done, and frames lie on the
    host. `on_tile(k, n)` is called before tile k; what it raises ends the decoding.
    """
    per_latent = network.config.spatial_stride
    if stride_pixels % per_latent or tile_pixels % per_latent:
        raise ValueError(f"tiles and their stride must be multiples of {per_latent} pixels")
    if not tile_pixels // 2 <= stride_pixels <= tile_pixels:
        raise ValueError(f"a stride of {stride_pixels} does not fit tiles of {tile_pixels} pixels")
    tile, stride = tile_pixels // per_latent, stride_pixels // per_latent
    rows, columns = (_spans(length, tile, stride) for length in latents_BCTHW.shape[3:])
    tiles = [(row, column) for row in rows for column in columns]
    if len(tiles) == 1:
        on_tile(0, 1)
        yield from network.decode_chunks(latents_BCTHW)
        return
    height, width = (per_latent * length for length in latents_BCTHW.shape[3:])
    overlap = tile_pixels - stride_pixels
    canvases: list[Tensor] = []
    for index, (row, column) in enumerate(tiles):
        on_tile(index, len(tiles))
        down, across = _pixels(row, per_latent), _pixels(column, per_latent)
        weight_HW = torch.outer(_weights(down, height, overlap), _weights(across, width, overlap))
        chunks = network.decode_chunks(latents_BCTHW[..., row, column])
        for number, chunk in enumerate(chunks):
            if index == 0:
                canvases.append(torch.zeros(*chunk.shape[:3], height, width, dtype=chunk.dtype))
            canvases[number][..., down, across] += chunk.cpu() * weight_HW.to(chunk.dtype)
    yield from canvases


def _spans(length: int, tile: int, stride: int) -> list[slice]:
    """Tiles from edge to edge; the last is as long as is left, and longer than an overlap."""
    starts = [0]
    while starts[-1] + tile < length:
        starts.append(starts[-1] + stride)
    return [slice(start, min(start + tile, length)) for start in starts]


def _pixels(span: slice, per_latent: int) -> slice:
    return slice(span.start * per_latent, span.stop * per_latent)


def _weights(span: slice, length: int, overlap: int) -> Tensor:
    """1, but rising from the edge shared with the tile before, falling to the one after."""
    weights = torch.ones(span.stop - span.start, dtype=torch.float64)
    rising = torch.arange(overlap, dtype=torch.float64) / overlap if overlap else weights[:0]
    if span.start > 0:
        weights[:overlap] *= rising
    if span.stop < length:
        weights[len(weights) - overlap :] *= 1 - rising
    return weights
