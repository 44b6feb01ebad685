"""Compiled chains: the same numbers but for rounding, made once per shape."""

import copy

import pytest
import safetensors.torch
import torch
from torch._dynamo import utils

from models import (
    causal_conv,
    config,
    fp8,
    fusion,
    lora_switcher,
    norms,
    offload,
    quantization,
    transformer,
    vae,
    vae_tiling,
)
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


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    made = vae.WanVAE(config.VAEConfig(base_dim=4, num_res_blocks=1)).requires_grad_(False)
    for parameter in made.parameters():
        if parameter.ndim == 1:
            parameter.normal_()
    return made


def decoded(autoencoder, latents):
    return torch.cat(list(autoencoder.decode_chunks(latents)), dim=2)


def test_frames_that_chains_were_compiled_for_are_the_same(autoencoder, compiled, monkeypatch):
    """Biases, which convolutions leave to the chains, are added; and once."""
    monkeypatch.setattr(fusion, "BACKEND", "aot_eager")
    latents = torch.randn(1, 16, 3, 2, 3)
    with fusion.running_with(fusion.eagerly):
        expected = decoded(autoencoder, latents)
        encoded = autoencoder.encode(expected)
    found = decoded(autoencoder, latents)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(autoencoder.encode(expected), encoded, rtol=1e-4, atol=1e-4)
    # Of each number of channels norm and SiLU with a bias before them and without, and a sum; and
    # what comes before the last convolution.
    assert num_graphs() == compiled.num_shapes == 3 * 3 + 1

    assert torch.equal(decoded(autoencoder, latents), found)
    for latents in (torch.randn(1, 16, 3, 4, 2), torch.randn(2, 16, 4, 3, 3)):
        video = decoded(autoencoder, latents)
        autoencoder.encode(video)
        with fusion.running_with(fusion.eagerly):
            torch.testing.assert_close(video, decoded(autoencoder, latents), rtol=1e-4, atol=1e-5)
    assert num_graphs() == 3 * 3 + 1, "the same for all sizes of videos"


def test_one_row_first_is_no_reason_to_make_kernels_for_each_number(compiled, monkeypatch):
    monkeypatch.setattr(fusion, "BACKEND", "aot_eager")
    act = causal_conv.Activation(norms.ChannelRMSNorm(4, 3))
    for height in (1, 5, 7, 1, 2):
        x, room = (causal_conv.frames_like(torch.ones(1), (1, 4, 1, height, 1)) for _ in range(2))
        x.normal_()
        act.write(x, room)
        torch.testing.assert_close(room, act(x))
    assert compiled.num_shapes == 1
    assert num_graphs() <= 2, "torch makes one for a single row"


@pytest.mark.parametrize("place", range(6))
def test_frames_are_whole_where_compiling_fails_among_them(autoencoder, monkeypatch, place):
    """Whatever the first chain is that cannot be compiled, biases are added, and once."""
    calls = []

    def compile_or_fail(function):
        def run(*args):
            if len(calls) == place:
                raise torch._dynamo.exc.TorchDynamoException("as was to be expected")
            calls.append(function)
            return function(*args)

        return run

    monkeypatch.setattr(fusion, "_compile", compile_or_fail)
    latents, told = torch.randn(1, 16, 2, 2, 3), []
    expected = decoded(autoencoder, latents)
    with fusion.running_with(fusion.Compiler(on_failure=told.append)):
        torch.testing.assert_close(decoded(autoencoder, latents), expected, rtol=1e-4, atol=1e-5)
    assert (len(told), len(calls)) == (1, place)


def test_gradients_are_the_same_beside_compiled_chains(autoencoder, compiled):
    """What trains is not compiled; on its way back nothing was written over."""
    latents = torch.randn(1, 16, 2, 2, 3)

    def gradient():
        with torch.inference_mode(mode=False), torch.enable_grad():
            asked = latents.clone().requires_grad_()
            decoded(autoencoder, asked).square().sum().backward()
            return asked.grad

    with fusion.running_with(fusion.eagerly):
        expected = gradient()
    torch.testing.assert_close(gradient(), expected, rtol=1e-4, atol=1e-4)


def test_tiles_of_all_sizes_have_kernels_together(autoencoder, compiled, monkeypatch):
    monkeypatch.setattr(fusion, "BACKEND", "aot_eager")
    latents = torch.randn(1, 16, 2, 4, 6)
    with fusion.running_with(fusion.eagerly):
        expected = tiled(autoencoder, latents)
    torch.testing.assert_close(tiled(autoencoder, latents), expected, rtol=1e-4, atol=1e-5)
    assert num_graphs() == compiled.num_shapes == 3 * 3 + 1


def tiled(autoencoder, latents):
    tiles = vae_tiling.decode_chunks(autoencoder, latents, tile_pixels=32, stride_pixels=16)
    return torch.cat(list(tiles), dim=2)


def test_norm_and_silu_round_once_where_they_are_compiled(compiled):
    """Closer to what is right than eagerly, written into a frame among others."""
    x = torch.randn(1, 8, 1, 4, 6, dtype=torch.bfloat16)
    act = causal_conv.Activation(norms.ChannelRMSNorm(8, 3).bfloat16(), torch.randn(8).bfloat16())
    room = torch.zeros(1, 8, 3, 4, 6, dtype=torch.bfloat16)
    act.write(x, room[:, :, 1:2])
    exact = copy.deepcopy(act.norm).double()(x.double() + act.bias_C.double().view(-1, 1, 1, 1))
    exact = torch.nn.functional.silu(exact)
    with fusion.running_with(fusion.eagerly):
        error, eager_error = ((y.double() - exact).norm() for y in (room[:, :, 1:2], act(x)))
    assert 0 < error < eager_error
    assert not room[:, :, ::2].any()


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
