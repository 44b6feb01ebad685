"""The transformer's contract beyond the numbers (those are in tests/parity)."""

import einops
import pytest
import torch

from models import config, transformer

SIZES = config.TransformerConfig(
    dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=8, text_len=6, freq_dim=16
)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return transformer.WanTransformer(SIZES).requires_grad_(False)


def test_unpatchify_undoes_cutting_into_patches_channels_last():
    video = torch.randn(2, 16, 3, 4, 6)
    patches = einops.rearrange(
        video, "b c (f pf) (h ph) (w pw) -> b (f h w) (pf ph pw c)", pf=1, ph=2, pw=2
    )
    assert torch.equal(transformer.unpatchify(patches, (3, 2, 3), SIZES), video)


def test_velocity_has_the_latents_shape_in_fp32(network):
    for dtype in (torch.float32, torch.bfloat16):
        velocity = network.to(dtype)(
            torch.randn(2, 16, 2, 4, 6), torch.tensor([937.5, 10.0]), torch.randn(2, 6, 8)
        )
        assert velocity.shape == (2, 16, 2, 4, 6)
        assert velocity.dtype == torch.float32


def test_a_fractional_timestep_is_not_its_integer(network):
    latents, context = torch.randn(1, 16, 1, 2, 2), torch.randn(1, 6, 8)
    half, whole = (network(latents, torch.tensor([t]), context) for t in (937.5, 937.0))
    assert not torch.allclose(half, whole, atol=1e-6)


def test_bf16_networks_know_the_time_as_exactly_as_fp32_ones():
    wide = transformer.WanTransformer(config.TINY)
    narrow = transformer.WanTransformer(config.TINY)
    narrow.load_state_dict(
        {
            name: tensor.to(transformer.parameter_dtype(name, torch.bfloat16))
            for name, tensor in wide.state_dict().items()
        },
        assign=True,
    )
    assert narrow.dtype == torch.bfloat16
    timestep = torch.tensor([937.5])
    for ours, exact in zip(narrow._embed_time(timestep), wide._embed_time(timestep), strict=True):
        assert torch.equal(ours, exact)


def test_padding_rows_are_attended_to(network):
    """No mask in cross-attention: a zero row is a key like any other."""
    latents, time, context = (
        torch.randn(1, 16, 1, 2, 2),
        torch.tensor([500.0]),
        torch.zeros(1, 6, 8),
    )
    context[:, 0] = 1
    twice = context.clone()
    twice[:, 1] = 1
    assert not torch.allclose(network(latents, time, context), network(latents, time, twice))


@pytest.mark.parametrize(
    ("latents", "context", "says"),
    [
        ((1, 8, 1, 2, 2), (1, 6, 8), r"latents must be \[B, 16, T, H, W\], got \[1, 8, 1, 2, 2\]"),
        ((16, 1, 2, 2), (1, 6, 8), "latents must be"),
        ((1, 16, 1, 3, 2), (1, 6, 8), r"multiples of \(1, 2, 2\)"),
        ((1, 16, 1, 2, 2), (1, 5, 8), r"context must be \[B, 6, 8\], got \[1, 5, 8\]"),
    ],
)
def test_other_shapes_are_refused(network, latents, context, says):
    with pytest.raises(ValueError, match=says):
        network(torch.zeros(latents), torch.tensor([1.0]), torch.zeros(context))


def test_image_tokens_need_an_image_to_video_network(network):
    with pytest.raises(ValueError, match="image-to-video"):
        network(
            torch.zeros(1, 16, 1, 2, 2),
            torch.tensor([1.0]),
            torch.zeros(1, 6, 8),
            torch.zeros(1, 3, 8),
        )


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_heads": 5}, "not a multiple of num_heads"),
        ({"dim": 8, "num_heads": 2}, "at least 6"),
        ({"dim": 14, "num_heads": 2}, "must be even"),
        ({"num_layers": 0}, "num_layers must be positive"),
    ],
)
def test_dimensions_that_make_no_network_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        config.TransformerConfig(
            **{"dim": 24, "ffn_dim": 8, "num_heads": 2, "num_layers": 1} | change
        )


def test_gelu_in_a_product_is_that_after_it(network, monkeypatch):
    """On CUDA torch's operation takes tanh's approximation, on a CPU not; the rest is the same."""
    monkeypatch.setattr(transformer, "has_gelu_in_product", lambda *_: True)
    layer, x = network.blocks[0].ffn[0], torch.randn(2, 3, 24)
    exact = torch.nn.functional.gelu(layer(x))
    torch.testing.assert_close(transformer.product_then_gelu(layer, x), exact)
    inputs = torch.randn(1, 16, 1, 2, 2), torch.tensor([900.0]), torch.randn(1, 6, 8)
    inside = network(*inputs)
    monkeypatch.undo()
    torch.testing.assert_close(inside, network(*inputs), rtol=1e-3, atol=1e-3)


def test_gelu_stays_outside_where_its_gradient_or_a_subclass_would_be_lost(network):
    """Nor is it asked of a CPU."""
    layer, x = network.blocks[0].ffn[0], torch.randn(1, 3, 24)
    with torch.inference_mode():
        assert not transformer.has_gelu_in_product(layer, x.bfloat16())

    class OnCuda:
        is_cuda, dtype = True, torch.bfloat16

    with torch.inference_mode():
        assert transformer.has_gelu_in_product(layer, OnCuda())
        assert not transformer.has_gelu_in_product(transformer.WideLinear(24, 32), OnCuda())
    assert not transformer.has_gelu_in_product(layer, OnCuda())
