"""Compiled chains: the same numbers but for rounding, made once per shape."""

import pytest
import safetensors.torch
import torch
from torch._dynamo import utils

from models import config, fp8, fusion, lora_switcher, offload, quantization, transformer
from models.lora_switcher import Choice


@pytest.fixture
def network():
    torch.manual_seed(0)
    return transformer.WanTransformer(config.TINY).requires_grad_(False).eval()


@pytest.fixture
def compiled():
    """Chains are compiled; what cannot be is an error of the test."""
    torch.compiler.reset()
    utils.counters.clear()
    failures = []
    compiler = fusion.Compiler(on_failure=failures.append)
    with fusion.running_with(compiler), torch.inference_mode():
        yield compiler
    assert failures == []


def inputs(seed=0, height=4):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(1, 16, 2, height, 6, generator=generator)
    return latents, torch.tensor([937.5]), torch.randn(1, 512, 32, generator=generator)


def num_graphs():
    return utils.counters["stats"]["unique_graphs"]


def test_compiled_chains_compute_the_same(network, compiled):
    with fusion.running_with(fusion.eagerly):
        expected = network(*inputs())
    assert torch.allclose(network(*inputs()), expected, rtol=1e-5, atol=1e-6)
    assert compiled.num_shapes == 6, "one for each chain"


def test_nothing_is_compiled_twice(network, compiled, tmp_path, monkeypatch):
    """Neither for other blocks, prompts, seeds and LoRAs, nor for blocks that come and go.

    What asks for new code is the same whatever makes it; no C++ compiler is waited for here.
    """
    monkeypatch.setattr(fusion, "BACKEND", "aot_eager")
    found = network(*inputs())
    assert num_graphs() == compiled.num_shapes == 6

    delta = torch.full_like(network.blocks[1].self_attn.q.weight, 0.01)
    safetensors.torch.save_file({"blocks.1.self_attn.q.diff": delta}, tmp_path / "l.safetensors")
    switcher = lora_switcher.LoraSwitcher(network)
    switcher.apply([Choice(path=tmp_path / "l.safetensors")])
    assert not torch.equal(network(*inputs()), found)
    switcher.apply([])
    offload.BlockStreamer(network, torch.device("cpu"))
    assert torch.equal(network(*inputs()), found)
    network(*inputs(seed=1))
    assert num_graphs() == 6

    network(*inputs(height=8))
    assert num_graphs() == 12, "a size of its own"
    assert torch.equal(network(*inputs()), found)
    assert num_graphs() == 12


def test_tokens_for_fp8_are_compiled_once_as_well(compiled, monkeypatch):
    """A LoRA, which also wants the tokens whole, is a second form; a third there is not."""
    monkeypatch.setattr(fusion, "BACKEND", "aot_eager")
    monkeypatch.setattr(fp8, "has_product", lambda _: True)
    torch.manual_seed(0)
    network = transformer.WanTransformer(config.TINY).requires_grad_(False).bfloat16()
    for name, layer in list(network.named_modules()):
        if name.startswith("blocks.") and isinstance(layer, torch.nn.Linear):
            codes, scale = quantization.quantize(layer.weight, quantization.Scheme.FP8)
            quantized = quantization.QuantizedLinear(layer, quantization.Scheme.FP8, scale.shape)
            quantized.load_state_dict(
                {"weight": codes, "weight_scale": scale, "bias": layer.bias}, assign=True
            )
            parent, _, leaf = name.rpartition(".")
            setattr(network.get_submodule(parent), leaf, quantized)
    with fusion.running_with(fusion.eagerly):
        expected = network(*inputs())
    assert torch.equal(network(*inputs()), expected), "this backend rounds as without it"
    # Those of any network, of which one is for bf16 alone; GELU; and o's and the text's tokens.
    assert num_graphs() == compiled.num_shapes == 6 + 1 + 2
    for _ in range(2):
        for layer in quantization.quantized_layers(network).values():
            layer.lora_down = torch.zeros(2, layer.in_features)
            layer.lora_up = torch.zeros(layer.out_features, 2)
        assert torch.equal(network(*inputs(seed=1)), network(*inputs(seed=1)))
        assert num_graphs() == 9 + 6
        for layer in quantization.quantized_layers(network).values():
            layer.lora_down = layer.lora_up = None
        assert torch.equal(network(*inputs()), expected)
    assert num_graphs() == 9 + 6


def test_a_chain_that_cannot_be_compiled_is_told_once_and_runs_eagerly():
    told = []
    compiler = fusion.Compiler(on_failure=told.append)

    @fusion.chain
    def asks_for_a_value(x):
        return x * 2 if x.sum().item() > 0 else x

    torch.compiler.reset()
    with fusion.running_with(compiler):
        for _ in range(2):
            assert torch.equal(asks_for_a_value(torch.ones(3)), torch.full((3,), 2.0))
    assert len(told) == 1
    assert not compiler.is_working


def test_more_shapes_than_are_kept_start_anew(monkeypatch):
    """torch alone would go on eagerly from some number on, and round differently."""
    monkeypatch.setattr(fusion, "MAX_SHAPES", 2)
    monkeypatch.setattr(fusion, "_compile", lambda function: function)
    reset = []
    monkeypatch.setattr(torch.compiler, "reset", lambda: reset.append(True))
    compiler = fusion.Compiler(on_failure=pytest.fail)
    for size in (1, 2, 1, 2):
        compiler(torch.neg, torch.ones(size))
    assert (compiler.num_shapes, reset) == (2, [])
    compiler(torch.neg, torch.ones(3))
    assert (compiler.num_shapes, reset) == (1, [True])
