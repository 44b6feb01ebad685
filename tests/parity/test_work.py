"""How much is computed at full size, counted on `meta`: no product is done twice or left out."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import networks
from models import config, transformer, vae


def count(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    ("sizes", "terms"),
    [
        (config.WAN_T2V_1_3B, {"linear": 82.07e12, "self": 197.82e12, "cross": 3.09e12}),
        (config.WAN_T2V_14B, {"linear": 785.36e12, "self": 879.18e12, "cross": 13.74e12}),
    ],
    ids=["1.3B", "14B"],
)
def test_a_forward_at_480p(sizes, terms):
    """32 760 tokens and 512 of text, in the closed form; the small rest is embeddings and head."""
    tokens, text, d, layers = 32_760, 512, sizes.dim, sizes.num_layers
    linear = layers * (12 * tokens * d**2 + 4 * tokens * d * sizes.ffn_dim + 4 * text * d**2)
    attended = layers * 4 * tokens * d * tokens, layers * 4 * tokens * d * text
    assert (linear, *attended) == pytest.approx(tuple(terms.values()), rel=1e-3)

    with torch.device("meta"):
        network = transformer.WanTransformer(sizes).to(torch.bfloat16)
        inputs = torch.randn(1, 16, 21, 60, 104), torch.ones(1), torch.randn(1, 512, 4096)
        flops = count(lambda: network(*inputs))
    assert 0 < flops - linear - sum(attended) < 0.3e12


@pytest.mark.parametrize("name", networks.SIZES)
def test_the_benchmarks_count_a_product_with_gelu_in_it(name, monkeypatch):
    """As on CUDA in bf16, where torch's counter passes over it: a tenth of all."""
    monkeypatch.setattr(transformer, "has_gelu_in_product", lambda *_: True)
    expected = {"1.3B": 283.00e12, "14B": 1678.37e12}
    found = networks.flops(networks.SIZES[name], (16, 21, 60, 104))
    assert found == pytest.approx(expected[name], rel=1e-5)


def test_decoding_a_video_at_480p():
    """275.4 TFLOP, as counted on diffusers' AutoencoderKLWan; each chunk but the first is equal."""
    with torch.device("meta"):
        network = vae.WanVAE(config.WAN_VAE).requires_grad_(False)
        two, three = (
            count(lambda: list(network.decode_chunks(torch.randn(1, 16, length, 60, 104))))  # noqa: B023
            for length in (2, 3)
        )
    assert two + 19 * (three - two) == pytest.approx(275.4e12, rel=1e-3)


def test_encoding_an_image_for_a_video_at_480p():
    """A third of the 163.7 TFLOP of all its frames: 80 of 81 are one grey."""
    with torch.device("meta"):
        network = vae.WanVAE(config.WAN_VAE).requires_grad_(False)
        frames = torch.randn(1, 3, 81, 480, 832)
        assert count(lambda: network.encode(frames, still_from=1)) < 54.1e12
