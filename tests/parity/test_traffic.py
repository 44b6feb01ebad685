"""What a full-size network moves, counted on `meta` as `benchmarks.traffic` says: a budget.

The reference is counted the same way, so that both sides of each ratio are known.
"""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from benchmarks import holding, networks, traffic
from models import config, fp8, fusion, quantization, transformer, vae

LATENTS = (1, 16, 21, 60, 104)  # 81 frames of 832 x 480


def test_the_reference_decodes_with_2421_gb():
    with torch.device("meta"):
        reference = torch.nn.Module.to(AutoencoderKLWan(), torch.bfloat16)
        latents = torch.randn(LATENTS, dtype=torch.bfloat16)
        counted = traffic.count(lambda: reference.decode(latents))
    assert counted.total_bytes == pytest.approx(2421e9, rel=0.01)
    assert counted.product_bytes == pytest.approx(207e9, rel=0.01)


@pytest.mark.parametrize(
    ("compiled", "budget"), [(True, 0.38), (False, 0.42)], ids=["compiled", "eager"]
)
def test_decoding_moves_two_fifths_of_it(compiled, budget):
    """Each chunk but the first two moves as much.

    Eagerly the passes in which cuDNN adds biases come on top; compiled, what norm and SiLU write to
    its place counts twice, and is written once.
    """
    with torch.device("meta"):
        network = vae.WanVAE(config.WAN_VAE).to(torch.bfloat16)
        vae.to_channels_last(network)
        two, three = (
            traffic.count(
                lambda: list(network.decode_chunks(torch.randn(1, 16, length, 60, 104))),  # noqa: B023
                compiled=compiled,
            )
            for length in (2, 3)
        )
    total, products = (
        getattr(two, kind) + 19 * (getattr(three, kind) - getattr(two, kind))
        for kind in ("total_bytes", "product_bytes")
    )
    print(f"{total / 1e9:.0f} GB", three.by_operation.most_common())  # noqa: T201
    assert total < budget * 2421e9
    assert products == pytest.approx(295e9, rel=0.01)


def as_one_kernel(chain, x, *others):
    """Stands in for a compiled chain of the autoencoder, which holds nothing but its result."""
    if chain.__name__ == "_activated":
        return torch.empty_like(x, dtype=torch.float32)
    {"_write": others[-1], "_add": x}[chain.__name__].zero_()
    return None


@pytest.mark.parametrize("runner", [fusion.eagerly, as_one_kernel])
def test_decoding_holds_little_more_than_what_convolutions_remember(runner):
    """Two frames for each of them, 1.74 GB; and one frame amid its layers."""
    with torch.device("meta"), fusion.running_with(runner):
        network = vae.WanVAE(config.WAN_VAE).to(torch.bfloat16)
        vae.to_channels_last(network)
        latents = torch.randn(1, 16, 3, *LATENTS[-2:])
        held = holding.peak(
            lambda: [None for _ in network.decode_chunks(latents)],
            given=[*network.parameters(), latents],
        )
    print(f"{held / 1e9:.2f} GB")  # noqa: T201
    assert held < 2.12e9


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
    [(True, 0.12 * 2435e9), (False, 0.49 * 2435e9)],
    ids=["compiled", "eager"],
)
def test_a_14b_forward_moves_little_beside_its_products(
    compiled, budget, inputs_of_14b, monkeypatch
):
    monkeypatch.setattr(transformer, "has_gelu_in_product", lambda *_: True)
    with torch.device("meta"):
        network = networks.on_meta(config.WAN_T2V_14B)
        counted = traffic.count(lambda: network(*inputs_of_14b), compiled=compiled)
    print(f"{counted.pointwise_bytes / 1e9:.0f} GB", counted.by_operation.most_common())  # noqa: T201
    assert counted.pointwise_bytes < budget
    assert counted.product_bytes == pytest.approx(372e9, rel=0.01)


def test_quantizing_what_fp8_products_read_costs_hardly_any_traffic(inputs_of_14b, monkeypatch):
    """It is a link of the chains. Only what attention made is read for it alone."""
    monkeypatch.setattr(fp8, "has_product", lambda _: True)
    counted = {}
    for scheme in (None, quantization.Scheme.FP8):
        with torch.device("meta"):
            sizes = dataclasses.replace(config.WAN_T2V_14B, num_layers=2)
            network = networks.on_meta(sizes, scheme=scheme)
            counted[scheme] = traffic.count(lambda: network(*inputs_of_14b), compiled=True)  # noqa: B023
    in_bf16, in_fp8 = counted[None], counted[quantization.Scheme.FP8]
    print(f"{in_fp8.pointwise_bytes / 1e9:.1f} GB", in_fp8.by_operation.most_common())  # noqa: T201
    assert in_fp8.by_operation["_scaled_mm_v2"] > 0
    assert in_fp8.pointwise_bytes < 1.02 * in_bf16.pointwise_bytes
    assert in_fp8.product_bytes < in_bf16.product_bytes


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
