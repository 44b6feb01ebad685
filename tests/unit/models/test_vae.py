"""The autoencoder's contract beyond the numbers (those are in tests/parity)."""

import pytest
import torch

from models import config, vae


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return vae.WanVAE(config.VAEConfig(base_dim=4, num_res_blocks=1)).requires_grad_(False)


@pytest.mark.parametrize(
    ("video", "latents"),
    [
        ((81, 480, 832), (16, 21, 60, 104)),
        ((81, 720, 1280), (16, 21, 90, 160)),
        ((1, 8, 8), (16, 1, 1, 1)),
    ],
)
def test_latent_shape(network, video, latents):
    num_frames, height, width = video
    assert network.latent_shape(num_frames=num_frames, height=height, width=width) == latents


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"num_frames": 80}, r"4n\+1 \(e.g. 77, 81\), got 80"),
        ({"num_frames": 0}, "got 0"),
        ({"num_frames": -3}, "got -3"),
        ({"height": 100}, "height must be a positive multiple of 8, got 100"),
        ({"width": 0}, "width must be a positive multiple of 8, got 0"),
    ],
)
def test_sizes_that_have_no_latents_are_refused(network, changed, says):
    with pytest.raises(ValueError, match=says):
        network.latent_shape(**{"num_frames": 81, "height": 480, "width": 832} | changed)


def test_frames_that_have_no_latents_are_refused(network):
    with pytest.raises(ValueError, match="got 6"):
        network.encode(torch.zeros(1, 3, 6, 16, 16))


def test_chunks_are_one_frame_and_then_four(network):
    latents = torch.randn(1, 16, 3, 2, 3)
    shapes = [tuple(chunk.shape) for chunk in network.decode_chunks(latents)]
    assert shapes == [(1, 3, 1, 16, 24), (1, 3, 4, 16, 24), (1, 3, 4, 16, 24)]


def test_a_chunk_depends_on_the_past_only(network):
    """Causal: frames already decoded are those of a longer video, bit for bit."""
    latents = torch.randn(1, 16, 4, 2, 2)
    whole = torch.cat(list(network.decode_chunks(latents)), dim=2)
    start = torch.cat(list(network.decode_chunks(latents[:, :, :2])), dim=2)
    assert torch.equal(whole[:, :, :5], start)
    encoded = network.encode(whole)
    assert torch.equal(encoded[:, :, :2], network.encode(whole[:, :, :5]))


def test_stopping_between_chunks_leaves_nothing_behind(network):
    latents = torch.randn(1, 16, 3, 2, 2)
    before = torch.cat(list(network.decode_chunks(latents)), dim=2)
    abandoned = network.decode_chunks(torch.randn(1, 16, 3, 2, 2))
    next(abandoned)
    next(abandoned)
    interleaved = network.decode_chunks(latents)
    frames = [next(interleaved)]
    next(abandoned)
    frames += list(interleaved)
    assert torch.equal(torch.cat(frames, dim=2), before)


def test_bf16_weights_take_and_give_what_the_contract_says(network):
    small = vae.WanVAE(network.config).to(torch.bfloat16).requires_grad_(False)
    chunk = next(small.decode_chunks(torch.randn(1, 16, 1, 2, 2)))
    assert chunk.dtype == torch.bfloat16
    assert chunk.abs().max() <= 1
    assert small.encode(chunk.float()).dtype == torch.float32


def test_a_zero_vector_stays_zero_under_the_norm():
    norm = vae.RMSNorm(8, 3)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 8, 1, 2, 2, dtype=dtype)
        assert torch.equal(norm.to(dtype)(x), x)
