"""What a full-size network moves, counted on `meta` as `benchmarks.traffic` says: a budget.

The reference is counted the same way, so that both sides of each ratio are known.
"""

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from benchmarks import traffic
from models import config, transformer, vae

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


@pytest.fixture
def inputs_of_14b():
    with torch.device("meta"):
        context = torch.randn(1, config.WAN_TEXT_LEN, config.WAN_TEXT_DIM, dtype=torch.bfloat16)
        return torch.randn(LATENTS), torch.ones(1), context


def test_eager_diffusers_forward(inputs_of_14b):
    """2435 GB with `rms_norm` taken apart, as older versions of torch did on a GPU."""
    with torch.device("meta"):
        reference = WanTransformer3DModel()
        for name, parameter in reference.named_parameters():
            if not any(part in name.split(".") for part in reference._keep_in_fp32_modules):
                parameter.data = parameter.data.to(torch.bfloat16)
        latents, *others = inputs_of_14b
        counted = traffic.count(lambda: reference(latents.bfloat16(), *others))
    assert counted.pointwise_bytes == pytest.approx(1670e9, rel=0.01)


@pytest.mark.parametrize(
    ("compiled", "budget"),
    [(True, 0.15 * 2435e9), (False, 0.52 * 2435e9)],
    ids=["compiled", "eager"],
)
def test_a_14b_forward_moves_little_beside_its_products(compiled, budget, inputs_of_14b):
    with torch.device("meta"):
        network = transformer.WanTransformer(config.WAN_T2V_14B)
        for name, parameter in network.named_parameters():
            parameter.data = parameter.data.to(transformer.parameter_dtype(name, torch.bfloat16))
        counted = traffic.count(lambda: network(*inputs_of_14b), compiled=compiled)
    print(f"{counted.pointwise_bytes / 1e9:.0f} GB", counted.by_operation.most_common())  # noqa: T201
    assert counted.pointwise_bytes < budget
    assert counted.product_bytes == pytest.approx(372e9, rel=0.01)


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
