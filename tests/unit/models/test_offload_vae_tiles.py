"""Tiles are the whole picture where there is one, and near it where there are several."""

import pytest
import torch

from models import checkpoint, layout, vae_tiling
from models.vae_tiling import _spans, _weights


@pytest.fixture
def network(native_root):
    return checkpoint.load_vae(layout.find(native_root), device="cpu", dtype=torch.float32)


@torch.inference_mode()
def decode(network, latents, **options):
    return list(vae_tiling.decode_chunks(network, latents, **options))


def test_one_tile_is_the_whole_picture_bit_for_bit(network):
    latents = torch.randn(1, 16, 3, 8, 8)
    with torch.inference_mode():
        whole = list(network.decode_chunks(latents))
    tiles = decode(network, latents, tile_pixels=64, stride_pixels=48)
    assert [chunk.shape[2] for chunk in tiles] == [1, 4, 4]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tiles, whole, strict=True))


@pytest.mark.parametrize("shape", [(9, 8), (8, 20), (13, 21)])
def test_several_tiles_have_the_shape_and_nearly_the_pixels_of_the_whole(network, shape):
    torch.manual_seed(0)
    latents = torch.randn(1, 16, 1, *shape)
    with torch.inference_mode():
        whole = torch.cat(list(network.decode_chunks(latents)), 2)
    tiles = torch.cat(decode(network, latents, tile_pixels=64, stride_pixels=48), 2)
    assert tiles.shape == whole.shape
    assert tiles.abs().max() <= 1
    assert 0 < (tiles - whole).norm() < 0.35 * (whole - whole.mean()).norm()
    # Far from every seam only the attention in the middle sees less.
    corner = (..., slice(0, 24), slice(0, 24))
    assert (tiles - whole)[corner].norm() < 0.15 * whole[corner].norm()


def test_a_uniform_picture_has_no_seams(network):
    for parameter in network.decoder.head.parameters():
        parameter.data.zero_()
    network.decoder.head[2].bias.data.fill_(0.3)
    tiles = decode(network, torch.randn(1, 16, 1, 13, 21), tile_pixels=64, stride_pixels=48)
    torch.testing.assert_close(tiles[0], torch.full_like(tiles[0], 0.3))


def test_tiles_cover_a_length_with_overlaps_and_weights_of_one():
    for length in range(1, 120):
        spans = _spans(length, 32, 24)
        total = torch.zeros(length, dtype=torch.float64)
        for span in spans:
            total[span] += _weights(span, length, 8)
        torch.testing.assert_close(total, torch.ones_like(total))
        assert spans[-1].stop == length
        assert all(span.stop - span.start > 8 for span in spans[1:])


def test_480p_takes_twelve_tiles_and_720p_twenty_eight():
    for (rows, columns), expected in [((60, 104), 3 * 4), ((90, 160), 4 * 7)]:
        assert len(_spans(rows, 32, 24)) * len(_spans(columns, 32, 24)) == expected


def test_tiles_can_be_stopped_between(network):
    seen = []

    def on_tile(tile, tiles):
        seen.append((tile, tiles))
        if tile == 1:
            raise KeyboardInterrupt

    latents = torch.randn(1, 16, 1, 8, 20)
    with pytest.raises(KeyboardInterrupt):
        decode(network, latents, tile_pixels=64, stride_pixels=48, on_tile=on_tile)
    assert seen == [(0, 3), (1, 3)]


@pytest.mark.parametrize(("tile", "stride"), [(60, 48), (64, 42), (64, 72), (64, 24)])
def test_tiles_that_do_not_fit_are_refused(network, tile, stride):
    with pytest.raises(ValueError, match="pixels"):
        decode(network, torch.randn(1, 16, 1, 8, 8), tile_pixels=tile, stride_pixels=stride)
