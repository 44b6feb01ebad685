"""What headers tell is what the loader would find, and what it takes they take."""

import subprocess
import sys

import pytest
import safetensors.torch
import torch

from models import checkpoint, errors, layout, quantized_files, transformer_headers
from models.quantization import CODE_DTYPES, DTYPE_NAMES, Scheme

DIT = "diffusion_pytorch_model.safetensors"
Q = "blocks.0.self_attn.q.weight"


@pytest.fixture
def outcome(native_root):
    """The errors of the headers and of the loader."""

    def both(content=None, path=None, metadata=None):
        path = path or native_root / "mine.safetensors"
        if content is not None:
            safetensors.torch.save_file(content, path, metadata)
        files = layout.find(native_root, transformer_file=path)
        found = []
        for look in (transformer_headers.check, load):
            try:
                look(files)
            except errors.CheckpointError as error:
                found.append(error)
        return found

    return both


def load(files):
    checkpoint.load(files, device="cpu", dtype=torch.float32)


@pytest.fixture
def tensors(native_root):
    return safetensors.torch.load_file(native_root / DIT)


def test_headers_know_the_types_that_the_loader_takes():
    floats = tuple(DTYPE_NAMES[dtype] for dtype in checkpoint.WEIGHT_DTYPES)
    assert floats == transformer_headers.FLOATS
    assert tuple(DTYPE_NAMES[dtype] for dtype in CODE_DTYPES) == transformer_headers.CODES


@pytest.mark.parametrize("form", ["native", "prefixed", "fp8", "int8", "diffusers", "pt"])
def test_what_loads_is_taken(tensors, outcome, native_root, diffusers_root, form):
    if form == "diffusers":
        found = outcome(path=diffusers_root() / "transformer" / DIT)
    elif form == "pt":
        torch.save(tensors, native_root / "mine.pt")
        found = outcome(path=native_root / "mine.pt")
    elif form in ("fp8", "int8"):
        path = native_root / "small.safetensors"
        quantized_files.write(layout.find(native_root), path, Scheme(form))
        found = outcome(path=path)
    else:
        prefix = "" if form == "native" else "model.diffusion_model."
        found = outcome({f"{prefix}{name}": tensors[name] for name in tensors})
    assert found == []


def only_cast(tensors):
    return {name: t.to(torch.float8_e4m3fn) if t.ndim == 2 else t for name, t in tensors.items()}


def of_other_type(tensors):
    return tensors | {Q: tensors[Q].to(torch.float8_e5m2)}


def under_other_names(tensors):
    return {f"net.{name}": tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("spoil", "error", "says"),
    [
        (only_cast, errors.QuantizedWeightsError, "only cast to 8 bits"),
        (of_other_type, errors.UnreadableWeightsError, "quantised weights are not supported"),
        (under_other_names, errors.WeightsMismatchError, r"tensors no network uses \(net\.b"),
        (lambda tensors: {}, errors.WeightsMismatchError, "missing tensors"),
    ],
)
def test_what_the_loader_refuses_is_refused(tensors, outcome, spoil, error, says):
    found = outcome(spoil(tensors))
    assert [type(each) for each in found] == [error, error]
    assert all(says.replace("\\", "") in str(each) for each in found)


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("dim", 128, r"of \[128, 16, 1, 2, 2\], .* has one of \[64, 16, 1, 2, 2\]"),
        ("num_layers", 3, "describes 3 blocks .* has 2"),
        ("num_layers", 1, "describes 1 blocks .* has 2"),
    ],
)
def test_a_config_of_another_size_is_refused(native_root, outcome, edit_json, key, value, says):
    edit_json(native_root / "config.json", **{key: value})
    by_header, by_loader = outcome(path=native_root / DIT)
    assert isinstance(by_loader, errors.WeightsMismatchError)
    with pytest.raises(errors.ConfigError, match=says):
        raise by_header


def test_other_networks_hold_floats_only(native_root, edit_tensors):
    def quantize(tensors):
        tensors.update({name: tensor.char() for name, tensor in tensors.items()})

    edit_tensors(native_root / layout.TEXT_ENCODER_FILE, quantize)
    with pytest.raises(errors.UnreadableWeightsError, match=layout.TEXT_ENCODER_FILE):
        transformer_headers.check(layout.find(native_root))


def test_headers_are_read_without_torch():
    code = "import sys; from models import transformer_headers; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
