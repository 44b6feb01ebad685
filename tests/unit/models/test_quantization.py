"""8-bit weights: exact in codes and scales, close in results, known by their tensors."""

import json
from collections import Counter

import pytest
import safetensors.torch
import torch
from torch.nn import functional

from models import (
    checkpoint,
    errors,
    fp8,
    layout,
    lora_switcher,
    quantization,
    quantized_files,
    safetensors_files,
    weight_names,
)
from models.quantization import Matmul, Scheme

DIT = "diffusion_pytorch_model.safetensors"
# Half of the largest step between neighbouring codes, over the value: e4m3 has 3 bits after the
# point; int8 has 127 steps up to a row's largest value.
LARGEST_ERROR = {Scheme.FP8: 2**-4, Scheme.INT8: 0.5 / 127}


def is_matrix_of_block(name, tensor):
    return tensor.ndim == 2 and any(part in name for part in ("_attn.", ".ffn."))


def lightx2v(tensors, scheme):
    """LightX2V's form, written from its description."""
    quantized = {}
    for name, tensor in tensors.items():
        if not is_matrix_of_block(name, tensor):
            quantized[name] = tensor
            continue
        scale = tensor.abs().amax(1, keepdim=True).float() / scheme.largest
        scaled = tensor.float() / scale
        codes = scaled.round() if scheme is Scheme.INT8 else scaled
        quantized[name] = codes.to(scheme.dtype)
        quantized[f"{name}_scale"] = scale
    return quantized


def comfyui(tensors, scale_shape=()):
    quantized = {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    for name, tensor in tensors.items():
        if not is_matrix_of_block(name, tensor):
            quantized[name] = tensor
            continue
        scale = tensor.abs().max() / 448
        quantized[name] = (tensor / scale).to(torch.float8_e4m3fn)
        quantized[f"{name.removesuffix('.weight')}.scale_weight"] = scale.reshape(scale_shape)
    return quantized


def comfy_org(tensors, *, newer=False):
    """As Comfy-Org publishes Wan: every linear layer, a scale of its input beside that of it."""
    weight_scale, input_scale = "scale_weight", "scale_input"
    quantized = {"scaled_fp8": torch.empty(0).to(torch.float8_e4m3fn)}
    if newer:
        weight_scale, input_scale, quantized = "weight_scale", "input_scale", {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not name.endswith(".weight"):
            quantized[name] = tensor
            continue
        module, scale = name.removesuffix(".weight"), tensor.abs().max() / 448
        quantized[name] = (tensor / scale).to(torch.float8_e4m3fn)
        quantized[f"{module}.{weight_scale}"] = scale.float()
        quantized[f"{module}.{input_scale}"] = torch.tensor(1.0)
    return quantized


def dequantized(quantized):
    """Plain weights of either form."""
    plain = {}
    for name, tensor in quantized.items():
        module = name.removesuffix(".weight")
        for scale in (f"{module}.weight_scale", f"{module}.scale_weight"):
            if scale in quantized:
                tensor = tensor.float() * quantized[scale]
        if "scale" not in name:
            plain[name] = tensor
    return plain


@pytest.fixture
def tensors(native_root):
    return safetensors.torch.load_file(native_root / DIT)


@pytest.fixture
def load(native_root):
    """Load a transformer of these tensors: `load(tensors, dtype)`."""

    def build(content, dtype=torch.float32, name="mine.safetensors", metadata=None):
        path = native_root / name
        safetensors.torch.save_file(content, path, metadata)
        files = layout.find(native_root, transformer_file=path)
        return checkpoint.load_transformer(files, device="cpu", dtype=dtype)

    return build


@pytest.fixture
def forward():
    torch.manual_seed(0)
    latents, context = torch.randn(1, 16, 2, 4, 4), torch.randn(1, 512, 32)

    @torch.inference_mode()
    def run(network):
        return network(latents, torch.tensor([937.5]), context)

    return run


def relative(ours, theirs):
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@pytest.mark.parametrize("scheme", Scheme)
def test_codes_and_scales_survive_a_round_trip(scheme):
    torch.manual_seed(0)
    codes, scale = quantization.quantize(torch.randn(32, 48), scheme)
    assert (codes.dtype, codes.shape, scale.shape) == (scheme.dtype, (32, 48), (32, 1))
    again, scale_again = quantization.quantize(
        quantization.dequantize(codes, scale, torch.float64), scheme
    )
    torch.testing.assert_close(scale_again, scale, rtol=1e-6, atol=0)
    assert torch.equal(quantization.encode(codes.float() * scale, scale, scheme).float(),
                       codes.float())  # fmt: skip
    assert torch.equal(again.float(), codes.float())


@pytest.mark.parametrize("scheme", Scheme)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_value_is_at_most_half_a_step_off(scheme, dtype):
    torch.manual_seed(0)
    weight = torch.randn(64, 96).to(dtype) * torch.logspace(-6, 3, 64)[:, None].to(dtype)
    codes, scale = quantization.quantize(weight, scheme)
    error = (codes.float() * scale - weight.float()).abs()
    largest = weight.float().abs().amax(1, keepdim=True)
    if scheme is Scheme.INT8:
        assert (error <= LARGEST_ERROR[scheme] * largest * 1.001).all()
    else:  # below 2^-6 of 448 the codes are no finer
        smallest_step = 2**-9 * scale
        bound = torch.maximum(LARGEST_ERROR[scheme] * weight.float().abs(), smallest_step)
        assert (error <= bound * 1.001).all()


@pytest.mark.parametrize("scheme", Scheme)
def test_rows_of_zeros_stay_zero(scheme):
    codes, scale = quantization.quantize(torch.zeros(3, 16), scheme)
    assert torch.equal(quantization.dequantize(codes, scale, torch.float32), torch.zeros(3, 16))
    assert (scale > 0).all()


@pytest.mark.parametrize("scheme", Scheme)
def test_a_lightx2v_file_computes_what_its_dequantized_weights_compute(
    tensors, load, forward, scheme
):
    content = lightx2v(tensors, scheme)
    network, plain = load(content), load(dequantized(content), name="plain.safetensors")
    layers = quantization.quantized_layers(network)
    assert len(layers) == 2 * 10
    assert all(layer.weight.dtype == scheme.dtype for layer in layers.values())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor.float(), content[name].float()), name
    assert torch.equal(forward(network), forward(plain))
    assert quantization.last_matmuls(network) == Counter({Matmul.DEQUANTIZED: 20})


@pytest.mark.parametrize("form", ["lightx2v", "comfyui"])
def test_scales_may_have_diffusers_names(tensors, load, forward, form):
    content = comfyui(tensors) if form == "comfyui" else lightx2v(tensors, Scheme.FP8)
    foreign = {
        weight_names.rename(name, weight_names.TRANSFORMER): tensor
        for name, tensor in content.items()
    }
    assert foreign.keys() != content.keys()
    there = load(foreign, name="foreign.safetensors")
    assert torch.equal(forward(there), forward(load(content)))


def test_scales_may_be_stored_in_the_dtype_of_the_source(tensors, load):
    """LightX2V's converter leaves them in the dtype of the weights that it read."""
    content = lightx2v(tensors, Scheme.INT8)
    name = "blocks.0.ffn.0.weight_scale"
    content |= {key: scale.bfloat16() for key, scale in content.items() if key.endswith("_scale")}
    loaded = load(content).state_dict()[name]
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, content[name].float())


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_comfyui_file_computes_what_its_dequantized_weights_compute(
    tensors, load, forward, shape
):
    content = comfyui(tensors, shape)
    network, plain = load(content), load(dequantized(content), name="plain.safetensors")
    assert torch.equal(forward(network), forward(plain))
    assert network.blocks[0].ffn[0].weight_scale.shape == (1, 1)


@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("in_diffusers_names", [False, True])
def test_scales_of_activations_are_left_out(tensors, load, forward, newer, in_diffusers_names):
    content = comfy_org(tensors, newer=newer)
    plain = load(dequantized(content), name="plain.safetensors")
    if in_diffusers_names:
        rename = weight_names.rename
        content = {rename(name, weight_names.TRANSFORMER): content[name] for name in content}
    network = load(content)
    assert len(quantization.quantized_layers(network)) == 2 * 10 + 6
    assert torch.equal(forward(network), forward(plain))


def test_a_scale_of_activations_of_a_whole_layer_is_unknown(tensors, load):
    content = lightx2v(tensors, Scheme.FP8) | {"head.head.scale_input": torch.tensor(1.0)}
    with pytest.raises(errors.WeightsMismatchError, match=r"head\.head\.scale_input"):
        load(content)


def settings_of(content, **settings):
    names = [name for name, tensor in content.items() if tensor.dtype.itemsize == 1]
    return {name.removesuffix(".weight"): settings for name in names}


def in_header(content, layers):
    told = {"format_version": "1.0", "layers": layers}
    return content, {"_quantization_metadata": json.dumps(told)}


def in_tensors(content, layers):
    told = {
        f"{layer}.comfy_quant": torch.tensor(list(json.dumps(each).encode()), dtype=torch.uint8)
        for layer, each in layers.items()
    }
    return content | told, None


PLACES = pytest.mark.parametrize("tell", [in_header, in_tensors])


@PLACES
@pytest.mark.parametrize(
    ("scheme", "form"), [(Scheme.FP8, "float8_e4m3fn"), (Scheme.INT8, "int8_tensorwise")]
)
def test_what_comfyui_says_of_plain_layers_changes_nothing(
    tensors, load, forward, tell, scheme, form
):
    content = lightx2v(tensors, scheme)
    told, metadata = tell(content, settings_of(content, format=form, convrot=False))
    network = load(told, name="told.safetensors", metadata=metadata)
    assert torch.equal(forward(network), forward(load(content)))


@PLACES
@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"format": "int8_tensorwise", "convrot": True}, "int8_tensorwise, rotated"),
        ({"format": "int8_blockwise"}, "not supported: int8_blockwise"),
        ({"convrot": True}, "not understood: KeyError"),
    ],
)
def test_layers_that_are_more_than_codes_times_scales_are_refused(
    tensors, load, tell, settings, says
):
    """Rotated ones have the names, types and shapes of plain ones."""
    content = lightx2v(tensors, Scheme.INT8)
    layers = settings_of(content, format="int8_tensorwise") | {"blocks.1.ffn.0": settings}
    told, metadata = tell(content, layers)
    with pytest.raises(errors.QuantizedWeightsError, match=says) as caught:
        load(told, metadata=metadata)
    assert "KeyError" in says or caught.value.names == ("blocks.1.ffn.0",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("form", "bound"),
    [
        (lambda tensors: lightx2v(tensors, Scheme.INT8), 0.02),
        (lambda tensors: lightx2v(tensors, Scheme.FP8), 0.06),
        (comfyui, 0.06),
    ],
    ids=["int8", "fp8", "comfyui"],
)
def test_the_velocity_is_near_that_of_the_whole_weights(tensors, load, forward, form, bound, dtype):
    reference = forward(load(tensors, name="whole.safetensors"))
    error = relative(forward(load(form(tensors), dtype)), reference)
    print(f"relative error {error:.2e}")  # noqa: T201  # `pytest -rP` lists the numbers
    assert 0 < error < bound


def test_layers_that_compute_in_fp32_may_be_quantized_too(tensors, load, forward):
    """Not by LightX2V or us, but ComfyUI's form allows any linear layer."""
    content = comfyui(tensors)
    name = "time_projection.1"
    scale = tensors[f"{name}.weight"].abs().max() / 448
    content[f"{name}.weight"] = (tensors[f"{name}.weight"] / scale).to(torch.float8_e4m3fn)
    content[f"{name}.scale_weight"] = scale
    network = load(content, torch.bfloat16)
    plain = load(dequantized(content), torch.bfloat16, name="plain.safetensors")
    assert torch.equal(forward(network), forward(plain))


# fp8 products


def fp8_layer(dtype=torch.bfloat16, in_features=64, out_features=48, scheme=Scheme.FP8):
    torch.manual_seed(0)
    plain = torch.nn.Linear(in_features, out_features).to(dtype).requires_grad_(False)
    codes, scale = quantization.quantize(plain.weight, scheme)
    layer = quantization.QuantizedLinear(plain, scheme, tuple(scale.shape))
    state = {"weight": codes, "weight_scale": scale, "bias": plain.bias}
    layer.load_state_dict(state, assign=True)
    return layer, plain


@pytest.fixture
def fp8_device(monkeypatch):
    """This device multiplies fp8: torch's kernel also runs on a CPU, slowly."""
    monkeypatch.setattr(fp8, "has_product", lambda device: True)


@pytest.mark.parametrize("per_tensor", [False, True])
def test_the_fp8_kernel_is_its_emulation(fp8_device, per_tensor):
    layer, plain = fp8_layer()
    if per_tensor:
        layer.weight_scale = layer.weight_scale.max().reshape(1, 1)
    x = torch.randn(2, 5, 64).bfloat16() * torch.logspace(-3, 3, 5)[:, None].bfloat16()
    y = layer(x)
    assert layer.last_matmul is Matmul.FP8
    assert (y.dtype, y.shape) == (torch.bfloat16, (2, 5, 48))
    scale = x.abs().amax(-1, keepdim=True).float() / 448
    x_codes = (x.float() / scale).to(torch.float8_e4m3fn).double()
    exact = x_codes @ layer.weight.double().t() * scale.double() * layer.weight_scale.double().t()
    expected = exact + plain.bias.double()
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5)
    if not per_tensor:
        assert relative(y, plain(x)) < 0.05


def test_a_token_does_not_depend_on_its_neighbours(fp8_device):
    layer, _ = fp8_layer()
    x = torch.randn(1, 6, 64).bfloat16()
    alone = layer(x[:, 2:3])
    x[:, 0] *= 1000
    assert torch.equal(layer(x)[:, 2:3], alone)


@pytest.mark.parametrize(
    ("options", "x_dtype"),
    [
        ({"scheme": Scheme.INT8}, torch.bfloat16),
        ({"dtype": torch.float32}, torch.float32),
        ({"in_features": 40}, torch.bfloat16),
        ({"out_features": 24}, torch.bfloat16),
    ],
    ids=["int8", "fp32", "in", "out"],
)
def test_what_the_kernel_cannot_do_is_dequantized(fp8_device, options, x_dtype):
    layer, _ = fp8_layer(**options)
    x = torch.randn(1, 3, layer.in_features).to(x_dtype)
    weight = quantization.dequantize(layer.weight, layer.weight_scale, x_dtype)
    assert torch.equal(layer(x), functional.linear(x, weight, layer.bias))
    assert layer.last_matmul is Matmul.DEQUANTIZED


def test_fp8_products_can_be_switched_off(fp8_device):
    layer, _ = fp8_layer()
    network = torch.nn.Sequential(layer)
    for allowed, matmul in [(False, Matmul.DEQUANTIZED), (True, Matmul.FP8)]:
        quantization.allow_fp8_matmul(network, allowed)
        network(torch.randn(1, 3, 64).bfloat16())
        assert quantization.last_matmuls(network) == {matmul: 1}


@pytest.mark.parametrize("with_lora", [False, True])
def test_layers_share_the_codes_of_their_tokens(
    fp8_device, tensors, load, forward, tmp_path, monkeypatch, with_lora
):
    """To the bit what each computes that codes its own; q, k and v of the video are one coding."""
    network = load(lightx2v(tensors, Scheme.FP8), torch.bfloat16)
    if with_lora:
        switcher = lora_switcher.LoraSwitcher(network)
        switcher.apply([lora_switcher.Choice(path=style_lora(tmp_path))])
    codings = []
    encode = fp8.encode
    monkeypatch.setattr(fp8, "encode", lambda *x: codings.append(x) or encode(*x))
    shared = forward(network)
    assert quantization.last_matmuls(network) == Counter({Matmul.FP8: 20})
    # Each block: the video's q, k, v; both o; the text's k and v; q; both of the feed-forward net.
    assert len(codings) == 2 * (1 + 2 + 2 + 1 + 2)

    monkeypatch.setattr(fp8, "wanted", lambda *_: fp8.Form.WHOLE)
    alone = forward(network)
    assert len(codings) == 16 + 20
    assert torch.equal(shared, alone)


def test_sums_in_fp8_are_kept_in_the_tensor_cores(fp8_device, monkeypatch):
    """Else Hopper is slower than in bf16; a CPU does not mind, so the argument is looked at."""
    asked = []
    scaled_mm = functional.scaled_mm
    monkeypatch.setattr(
        functional, "scaled_mm", lambda *x, **more: asked.append(more) or scaled_mm(*x, **more)
    )
    layer, _ = fp8_layer()
    layer(torch.randn(1, 5, 64).bfloat16())
    assert [each["use_fast_accum"] for each in asked] == [True]


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)],
)
def test_fp8_products_need_ada_or_later(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    policy = fp8.has_product.__wrapped__
    assert policy(torch.device("cuda", 0)) is expected
    assert policy(torch.device("cpu")) is False


# Files that are refused


@pytest.fixture
def refused(tensors, load):
    def check(change, says):
        content = lightx2v(tensors, Scheme.FP8)
        change(content)
        with pytest.raises(errors.QuantizedWeightsError, match=says) as caught:
            load(content)
        assert caught.value.path.name == "mine.safetensors"
        return caught.value

    return check


Q = "blocks.0.self_attn.q.weight"


def test_mixed_schemes_are_refused(refused, tensors):
    def one_in_int8(content):
        content[Q], content[f"{Q}_scale"] = quantization.quantize(tensors[Q], Scheme.INT8)

    def one_per_tensor(content):
        content["blocks.0.self_attn.q.scale_weight"] = content.pop(f"{Q}_scale").max()

    assert Q in refused(one_in_int8, "mixes quantization schemes").names
    refused(one_per_tensor, "scale_weight")


def test_codes_without_scales_are_refused(refused):
    error = refused(lambda content: content.pop(f"{Q}_scale"), "without their scales")
    assert error.names == (Q,)

    def only_cast(content):
        for name in [name for name in content if name.endswith("_scale")]:
            del content[name]

    assert len(refused(only_cast, "only cast to 8 bits").names) == 20


def test_scales_without_codes_are_refused(refused, tensors):
    error = refused(lambda content: content.update({Q: tensors[Q]}), "scales without 8-bit")
    assert error.names == ("blocks.0.self_attn.q",)


@pytest.mark.parametrize(
    ("scale", "says"),
    [
        (torch.ones(64), r"scales of shape \[64\], expected \[64, 1\]"),
        (torch.ones(1, 64), r"\[1, 64\]"),
        (torch.full((64, 1), float("nan")), "not positive"),
        (torch.zeros(64, 1), "not positive"),
    ],
)
def test_scales_of_another_shape_or_without_meaning_are_refused(refused, scale, says):
    refused(lambda content: content.update({f"{Q}_scale": scale}), says)


def test_what_is_no_linear_layer_cannot_be_quantized(refused):
    def modulation(content):
        content["nowhere.weight"] = content[Q].clone()
        content["nowhere.weight_scale"] = content[f"{Q}_scale"].clone()

    assert refused(modulation, "no linear layer").names == ("nowhere",)


def test_other_8_bit_types_are_refused(tensors, load):
    tensors[Q] = tensors[Q].to(torch.float8_e5m2)
    with pytest.raises(errors.UnreadableWeightsError, match="float8_e5m2"):
        load(tensors)


# Writing


@pytest.fixture
def files(native_root):
    return layout.find(native_root)


@pytest.mark.parametrize("scheme", Scheme)
def test_a_written_file_is_lightx2vs_form_of_the_source(files, tensors, tmp_path, scheme):
    target = tmp_path / "small.safetensors"
    report = quantized_files.write(files, target, scheme)
    written, expected = safetensors.torch.load_file(target), lightx2v(tensors, scheme)
    assert written.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(written[name].float(), tensor.to(written[name].dtype).float()), name
    matrices = {name for name, tensor in tensors.items() if is_matrix_of_block(name, tensor)}
    assert report.relative_errors.keys() == matrices
    errors_by_hand = {
        name: relative(dequantized(expected)[name], tensors[name]) for name in matrices
    }
    assert report.relative_errors == pytest.approx(errors_by_hand)
    assert min(errors_by_hand.values()) < report.relative_error < max(errors_by_hand.values())
    assert report.relative_error < (0.03 if scheme is Scheme.FP8 else 0.01)
    assert report.num_bytes == target.stat().st_size
    print(f"{scheme.value} {report.relative_error:.4f}")  # noqa: T201


def test_the_rest_is_bf16_but_fp32_where_the_network_computes_in_fp32(files, tmp_path):
    target = tmp_path / "small.safetensors"
    quantized_files.write(files, target, Scheme.FP8)
    header = safetensors_files.read_header(target)
    dtypes = {name: entry.dtype for name, entry in header.items()}
    assert dtypes["blocks.0.self_attn.q.weight"] == "F8_E4M3"
    assert dtypes["blocks.0.self_attn.q.weight_scale"] == "F32"
    assert dtypes["blocks.0.self_attn.q.bias"] == "BF16"
    assert dtypes["text_embedding.0.weight"] == "BF16"
    assert dtypes["blocks.0.modulation"] == dtypes["head.head.weight"] == "F32"


def test_a_written_file_loads_and_computes(files, native_root, tmp_path, forward):
    target = tmp_path / "small.safetensors"
    quantized_files.write(files, target, Scheme.INT8)
    outputs = [
        forward(checkpoint.load_transformer(chosen, device="cpu", dtype=torch.bfloat16))
        for chosen in (files, layout.find(native_root, transformer_file=target))
    ]
    assert relative(outputs[1], outputs[0]) < 0.03


def test_a_source_in_diffusers_names_is_written_in_native_ones(diffusers_root, tmp_path):
    target = tmp_path / "small.safetensors"
    quantized_files.write(layout.find(diffusers_root()), target, Scheme.FP8)
    assert "blocks.0.self_attn.q.weight_scale" in safetensors_files.read_header(target)


def test_nothing_is_overwritten_and_nothing_half_written_is_left(
    files, native_root, edit_tensors, tmp_path
):
    target = tmp_path / "out" / "small.safetensors"
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(FileExistsError):
        quantized_files.write(files, target, Scheme.FP8)
    assert target.read_text() == "mine"
    target.unlink()
    edit_tensors(native_root / DIT, lambda content: content[Q].fill_(float("nan")))
    with pytest.raises(errors.UnreadableWeightsError, match=Q):
        quantized_files.write(files, target, Scheme.FP8)
    assert list(target.parent.iterdir()) == []
    target = tmp_path / "distill_fp8" / "small.safetensors"
    with pytest.raises(errors.UnreadableWeightsError, match=Q):
        quantized_files.write(files, target, Scheme.FP8)
    assert not target.parent.exists()  # an empty one would be taken for a model without weights


def test_what_is_quantized_already_is_not_quantized_again(files, native_root, tmp_path):
    target = tmp_path / "small.safetensors"
    quantized_files.write(files, target, Scheme.FP8)
    again = layout.find(native_root, transformer_file=target)
    with pytest.raises(errors.QuantizedWeightsError, match="quantized already"):
        quantized_files.write(again, tmp_path / "twice.safetensors", Scheme.INT8)


# LoRA on quantized weights


def style_lora(tmp_path, name="style.safetensors", seed=0, rank=4):
    torch.manual_seed(seed)
    prefix = "diffusion_model.blocks"
    path = tmp_path / name
    safetensors.torch.save_file(
        {
            f"{prefix}.0.self_attn.q.lora_down.weight": torch.randn(rank, 64) / 8,
            f"{prefix}.0.self_attn.q.lora_up.weight": torch.randn(64, rank) / 8,
            f"{prefix}.0.self_attn.q.alpha": torch.tensor(2.0),
            f"{prefix}.0.self_attn.q.diff_b": torch.randn(64) / 8,
            f"{prefix}.1.ffn.2.diff": torch.randn(64, 128) / 8,
            f"{prefix}.1.diff_m": torch.randn(1, 6, 64) / 8,
        },
        path,
    )
    return path


@pytest.mark.parametrize("scheme", Scheme)
def test_a_lora_runs_beside_quantized_weights(tensors, load, forward, tmp_path, scheme):
    content = lightx2v(tensors, scheme)
    quantized, plain = load(content), load(dequantized(content), name="plain.safetensors")
    without = forward(quantized)
    choices = [
        lora_switcher.Choice(path=style_lora(tmp_path), strength=0.7),
        lora_switcher.Choice(path=style_lora(tmp_path, "b.safetensors", seed=1, rank=3)),
    ]
    switchers = [lora_switcher.LoraSwitcher(network) for network in (quantized, plain)]
    for switcher in switchers:
        switcher.apply(choices)
    layer = quantized.blocks[0].self_attn.q
    assert layer.lora_down.shape == (7, 64)
    assert relative(forward(quantized), forward(plain)) < 1e-5
    assert relative(forward(quantized), without) > 1e-2
    switchers[0].apply([])
    assert torch.equal(forward(quantized), without)
    assert not layer.has_lora
    assert not any("lora" in name for name in quantized.state_dict())


def test_a_lora_beside_the_fp8_kernel(fp8_device):
    layer, _ = fp8_layer()
    x = torch.randn(1, 5, 64).bfloat16()
    without = layer(x)
    layer.lora_down, layer.lora_up = torch.randn(4, 64).bfloat16(), torch.randn(48, 4).bfloat16()
    assert torch.equal(layer(x), without + x @ layer.lora_down.t() @ layer.lora_up.t())
    assert layer.last_matmul is Matmul.FP8
