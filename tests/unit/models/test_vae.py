"""The autoencoder's contract beyond the numbers (those are in tests/parity)."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from models import causal_conv, config, norms, vae


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
    assert network.config.latent_shape(num_frames=num_frames, height=height, width=width) == latents


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
        network.config.latent_shape(**{"num_frames": 81, "height": 480, "width": 832} | changed)


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


@pytest.mark.parametrize("still_from", [1, 8, 40])
def test_what_does_not_change_any_more_is_computed_once(network, still_from):
    video = torch.randn(1, 3, 81, 16, 24).clamp(-1, 1)
    video[:, :, still_from:] = video[:, :, -1:].clone()
    convs = [layer for layer in network.encoder.modules() if isinstance(layer, nn.Conv3d)]
    calls = []
    hooks = [conv.register_forward_hook(lambda *_: calls.append(1)) for conv in convs]
    expected, asked = network.encode(video), len(calls)
    assert torch.equal(network.encode(video, still_from=still_from), expected)
    for hook in hooks:
        hook.remove()
    assert len(calls) - asked < 0.9 * asked


def test_frames_come_in_pieces_without_a_trace(network, monkeypatch):
    """Large ones are normed and enlarged piece by piece, to the bit as in one."""
    latents = torch.randn(2, 16, 3, 4, 3)
    whole = torch.cat(list(network.decode_chunks(latents)), dim=2)
    encoded = network.encode(whole)
    for module in (causal_conv, vae):
        monkeypatch.setattr(module, "PIECE_BYTES", 4 * 2 * 4 * 24 * 5)
    pieces = torch.cat(list(network.decode_chunks(latents)), dim=2)
    assert torch.equal(pieces, whole)
    assert torch.equal(network.encode(whole), encoded)


def test_convolutions_in_a_row_see_what_they_would_see_alone():
    """One buffer holds the frames of all of them."""
    convs = [causal_conv.CausalConv3d(4, 4, (3, 3, 3)) for _ in range(3)]
    together, alone = causal_conv.FrameCache([convs]), causal_conv.FrameCache()
    with torch.inference_mode():
        for turn in range(5):
            for conv in convs:
                frame = torch.randn(2, 4, 1, 5, 6)
                seen = conv.see(frame, together)
                assert seen.shape == (2, 4, 3 if turn else 1, 5, 6)
                assert torch.equal(seen, conv.see(frame, alone))
        with pytest.raises(AssertionError, match="in this order"):
            convs[2].see(frame, together)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_lies_before_the_first_frame_is_left_out(dtype):
    conv = causal_conv.CausalConv3d(4, 6, (3, 3, 3)).to(dtype)
    frame = torch.randn(2, 4, 1, 5, 6, dtype=dtype)
    with torch.inference_mode():
        alone = conv.of_chunk(frame, causal_conv.FrameCache())
        padded = conv(functional.pad(frame, (0, 0, 0, 0, 2, 0)))
    torch.testing.assert_close(alone, padded)


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
    norm = norms.ChannelRMSNorm(8, 3)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.zeros(1, 8, 1, 2, 2, dtype=dtype)
        assert torch.equal(norm.to(dtype)(x), x)


def as_cudnn(forward):
    """Channels last comes out where input or weights are, which not all of a CPU's kernels do."""

    def convolve(self, x, weight, bias):
        layout = torch.channels_last_3d if x.ndim == 5 else torch.channels_last
        keeps = any(each.is_contiguous(memory_format=layout) for each in (x, weight))
        y = forward(self, x, weight, bias)
        return y.contiguous(memory_format=layout) if keeps else y

    return convolve


def test_layers_hand_on_channels_last(monkeypatch):
    """Else a convolution would copy its input first, which no count of operations shows."""
    for kind in (torch.nn.Conv2d, torch.nn.Conv3d):
        monkeypatch.setattr(kind, "_conv_forward", as_cudnn(kind._conv_forward))
    strided = []
    with torch.device("meta"):
        network = vae.WanVAE(config.TINY_VAE).requires_grad_(False)
        vae.to_channels_last(network)
        latents = torch.randn(1, 16, 3, 8, 12)

    def look(_layer, args):
        layout = torch.channels_last_3d if args[0].ndim == 5 else torch.channels_last
        if not args[0].is_contiguous(memory_format=layout):
            strided.append(tuple(args[0].shape))

    for layer in network.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Conv3d):
            layer.register_forward_pre_hook(look)
    frames = torch.cat(list(network.decode_chunks(latents)), dim=2)
    network.encode(frames)
    assert strided == []


def test_training_computes_the_same_and_reaches_every_parameter(network):
    """With gradients nothing is written over; without, one buffer serves all convolutions."""
    latents = torch.randn(2, 16, 3, 2, 3)
    frozen = torch.cat(list(network.decode_chunks(latents)), dim=2)
    trained = copy.deepcopy(network).requires_grad_(True)
    frames = torch.cat(list(trained.decode_chunks(latents)), dim=2)
    assert torch.allclose(frames, frozen, atol=1e-5)
    assert torch.allclose(trained.encode(frames), network.encode(frozen), atol=1e-4)
    trained.encode(frames).square().sum().backward()
    without = [name for name, p in trained.named_parameters() if p.grad is None]
    assert without == []
    assert all(p.grad.isfinite().all() for p in trained.parameters())


def test_latents_are_brought_to_their_scale_before_they_are_rounded():
    network = vae.WanVAE(config.VAEConfig(base_dim=4, num_res_blocks=1)).bfloat16()
    seen = []
    network.conv2.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs[0]))
    latents = torch.randn(1, 16, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        list(network.decode_chunks(latents))
    mean, std = (
        torch.tensor(values).view(-1, 1, 1, 1)
        for values in (network.config.latent_mean, network.config.latent_std)
    )
    assert torch.equal(seen[0], (latents * std + mean).bfloat16())
    assert not torch.equal(seen[0], (latents.bfloat16() * std + mean).bfloat16())


def test_what_is_remembered_of_a_chunk_is_all_that_is_kept_of_it():
    cache, layer = causal_conv.FrameCache(), nn.Identity()
    chunk = torch.zeros(1, 2, 4, 3, 3)
    cache.remember(layer, chunk, 1)
    kept = cache._frames[layer]
    assert kept.untyped_storage().nbytes() == kept.nbytes == chunk.nbytes // 4
