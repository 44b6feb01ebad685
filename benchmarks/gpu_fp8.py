"""fp8 against bf16 on a GPU: single products, a block of 14B, and its whole forward."""

import functools
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import gpu_attention, measuring, networks
from benchmarks import gpu_common as gpu
from models import config, fp8, quantization, rope, transformer

SHAPES = ((5120, 13824), (13824, 5120), (5120, 5120))  # in and out features of 14B's matrices
EMULATED_TOKENS = 512


def products(_report: measuring.Report) -> dict[str, Any]:
    """14B's three kinds of matrices at 480p: coding the tokens, the product, bf16, and errors."""
    with gpu.emptied(), torch.inference_mode(), gpu.compiled_chains() as failures:
        found = {f"{i}x{o}": gpu.attempted(functools.partial(_product, i, o)) for i, o in SHAPES}
        return {
            "can": fp8.has_product(torch.device("cuda", 0)),
            "failures": failures,
            "products": found,
        }


def _product(num_in: int, num_out: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(1, gpu_attention.TOKENS["480p"], num_in, device=gpu.DEVICE, dtype=gpu.BF16)
    weight = torch.randn(num_out, num_in, device=gpu.DEVICE) * num_in**-0.5
    codes, scale = quantization.quantize(weight, quantization.Scheme.FP8)
    narrow, bias = weight.to(gpu.BF16), torch.zeros(num_out, device=gpu.DEVICE, dtype=gpu.BF16)

    def coded() -> Any:
        return fp8.coded(x, fp8.Form.CODES)

    tokens = coded()
    some = slice(0, EMULATED_TOKENS)
    emulated = tokens.codes[0, some].float() @ codes.float().t() * tokens.scale[0, some] * scale.t()
    works: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: functional.linear(x, narrow, bias),
        "product": lambda: fp8.product(tokens, codes, scale, bias),
        "product_sums_in_fp32": lambda: _with_sums_in_fp32(tokens, codes, scale, bias),
        "coding_and_product": lambda: fp8.product(coded(), codes, scale, bias),
    }
    milliseconds = {"coding": _milliseconds(coded)}
    errors = {}
    exact = works["bf16"]()
    for name, work in works.items():
        milliseconds[name] = gpu.attempted(functools.partial(_milliseconds, work))
        errors[name] = gpu.attempted(
            lambda work=work: [
                measuring.relative(work()[0, some], emulated),
                measuring.relative(work(), exact),
            ]
        )
    return {"milliseconds": milliseconds, "errors_to_emulation_and_bf16": errors}


def _with_sums_in_fp32(tokens: Any, *weights: Tensor) -> Tensor:
    slow = functools.partial(_without_fast_sums, functional.scaled_mm)
    with mock.patch.object(functional, "scaled_mm", slow):
        return fp8.product(tokens, *weights)


def _without_fast_sums(scaled_mm: Callable[..., Tensor], *args: Any, **options: Any) -> Tensor:
    return scaled_mm(*args, **{**options, "use_fast_accum": False})


def _milliseconds(work: Callable[[], object]) -> float:
    return round(1e3 * measuring.seconds(work)["seconds"], 3)


def forward_14b(report: measuring.Report) -> dict[str, Any]:
    """14B at 480p with compiled chains, in bf16 and then quantized where it lies."""
    with gpu.emptied(), torch.inference_mode(), gpu.compiled_chains() as failures:
        network = gpu.random_transformer(config.WAN_T2V_14B)
        arguments = gpu.inputs()
        given = _given_to_a_block(network)
        in_bf16 = _measured(network, arguments, given)
        report.add("fp8_14b, in bf16", {**in_bf16.facts, "failures": failures})
        with torch.inference_mode(mode=False):
            quantize_blocks(network)
        in_fp8 = _measured(network, arguments, given)
        return {
            **in_fp8.facts,
            "failures": failures,
            "matmuls": {str(how): n for how, n in quantization.last_matmuls(network).items()},
            "times_as_fast": in_bf16.seconds / in_fp8.seconds,
            "block_times_as_fast": in_bf16.block_seconds / in_fp8.block_seconds,
            "error": measuring.relative(in_fp8.y, in_bf16.y),
            "block_error": measuring.relative(in_fp8.block_y, in_bf16.block_y),
        }


@dataclass(frozen=True, kw_only=True)
class _Measured:
    y: Tensor
    block_y: Tensor
    seconds: float
    block_seconds: float
    facts: dict[str, Any]


def _given_to_a_block(network: transformer.WanTransformer) -> tuple[Any, ...]:
    """Random tokens of a video at 480p, time and text."""
    dim = network.config.dim
    grid = network.config.grid(networks.LATENTS["480p"])
    rotation = rope.table(grid, network.config.head_dim, gpu.DEVICE, torch.float32)
    x_BLD, text_BSD = (
        torch.randn(1, tokens, dim, device=gpu.DEVICE, dtype=gpu.BF16)
        for tokens in (math.prod(grid), network.config.text_len)
    )
    time_B6D = torch.randn(1, 6, dim, device=gpu.DEVICE)
    return x_BLD, time_B6D, text_BSD, None, rotation


def _measured(
    network: transformer.WanTransformer, arguments: tuple[Tensor, ...], given: tuple[Any, ...]
) -> _Measured:
    torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    y = network(*arguments)
    torch.cuda.synchronize()
    first = time.perf_counter() - began
    block = functools.partial(network.blocks[0], *given)
    whole = gpu.warm_seconds(lambda: network(*arguments), repeats=2)
    peak_gb = gpu.peak_gb()
    block_y = block()
    one = gpu.warm_seconds(block)
    kernels = gpu.attempted(lambda: gpu.kernels_ms(block))
    return _Measured(
        y=y,
        block_y=block_y,
        seconds=whole["seconds"],
        block_seconds=one["seconds"],
        facts={
            "first_seconds": first,
            "forward": whole,
            "block": one,
            "peak_gb": peak_gb,
            "kernels_of_a_block": kernels,
        },
    )


def quantize_blocks(network: transformer.WanTransformer) -> None:
    """Where it lies: each matrix of its blocks is given up for its codes."""
    scheme = quantization.Scheme.FP8
    for name, layer in networks.block_matrices(network):
        codes, scale = quantization.quantize(layer.weight.data, scheme)
        quantized = quantization.QuantizedLinear(layer, scheme, tuple(scale.shape))
        state = {"weight": codes, "weight_scale": scale, "bias": layer.bias.data}
        quantized.load_state_dict(state, assign=True)
        quantized.requires_grad_(requires_grad=False)
        networks.replace(network, name, quantized)
        layer.weight = None  # the list holds the layer, the device need not
