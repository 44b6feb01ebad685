"""Tiled decoding is diffusers', except where four tiles meet, which it blends twice."""

import torch

from models import vae_tiling


def test_tiles_are_those_of_diffusers(vae_pair, draw, relative_error, in_fp64):
    reference, ours = vae_pair(torch.float64)
    for head in (reference.decoder.conv_out, ours.decoder.head[2]):
        head.weight.data *= 0.05  # no pixel is cut off at 1, which diffusers does after blending
    reference.enable_tiling(64, 64, 48, 48)
    reference.tile_sample_min_height = reference.tile_sample_min_width = 64
    latents = draw(1, 16, 3, 11, 16)
    offset, scale = ours._statistics(latents)
    theirs = reference.decode(latents * scale + offset).sample
    chunks = vae_tiling.decode_chunks(ours, latents, tile_pixels=64, stride_pixels=48)
    mine = torch.cat(list(chunks), dim=2)
    rows, columns = torch.arange(88), torch.arange(128)
    meets = ((rows >= 48) & (rows < 64))[:, None] & (columns % 48 < 16) & (columns >= 48)
    mine, theirs = (x.masked_fill(meets, 0.0) for x in (mine, theirs))
    assert theirs.abs().max() < 1
    assert relative_error(mine, theirs) < 1e-12
