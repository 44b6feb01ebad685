"""What a full-size network moves, counted on `meta` as `benchmarks.traffic` says: a budget.

The reference is counted the same way, so that both sides of each ratio are known.
"""

import pytest
import torch
from diffusers import AutoencoderKLWan

from benchmarks import traffic
from models import config, vae

LATENTS = (1, 16, 21, 60, 104)  # 81 frames of 832 x 480


def test_the_reference_decodes_with_2421_gb():
    with torch.device("meta"):
        reference = torch.nn.Module.to(AutoencoderKLWan(), torch.bfloat16)
        latents = torch.randn(LATENTS, dtype=torch.bfloat16)
        counted = traffic.count(lambda: reference.decode(latents))
    assert counted.total_bytes == pytest.approx(2421e9, rel=0.01)
    assert counted.product_bytes == pytest.approx(207e9, rel=0.01)


def test_decoding_moves_a_third_of_it():
    with torch.device("meta"):
        network = vae.WanVAE(config.WAN_VAE).to(torch.bfloat16)
        vae.to_channels_last(network)
        counted = traffic.count(lambda: list(network.decode_chunks(torch.randn(LATENTS))))
    print(f"{counted.total_bytes / 1e9:.0f} GB", counted.by_operation.most_common())  # noqa: T201
    assert counted.total_bytes < 0.32 * 2421e9
    assert counted.product_bytes == pytest.approx(206e9, rel=0.01)


def test_what_is_counted():
    """In and out of each operation; views move nothing, products are apart."""
    with torch.device("meta"):
        x, weight = torch.empty(2, 3, 4), torch.empty(4)
        counted = traffic.count(
            lambda: (
                x.transpose(0, 1),
                x + weight,
                x.flatten(1) @ torch.empty(12, 5),
                x[0].copy_(x[1]),
                torch.nn.functional.rms_norm(x, (4,), weight),
                torch.nn.functional.scaled_dot_product_attention(x, x, x),
            )
        )
    assert counted.by_operation == {
        "add": 4 * (24 + 4 + 24),
        "mm": 4 * (24 + 60 + 10),
        "copy_": 4 * (12 + 12),
        "rms_norm": 4 * (24 + 4 + 24),
        "attention": 4 * 4 * 24,
    }
    assert counted.product_bytes == 4 * (24 + 60 + 10) + 4 * 4 * 24
    assert counted.pointwise_bytes == counted.total_bytes - counted.product_bytes
    assert counted.operations == 5
