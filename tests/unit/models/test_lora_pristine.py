"""Untouched weights come back from their files exactly as they were loaded."""

import os
import shutil

import pytest
import safetensors.torch
import torch

from models import (
    checkpoint,
    errors,
    layout,
    lora_switcher,
    pristine,
    quantization,
    quantized_files,
)

DIT = "diffusion_pytorch_model.safetensors"


def load(root):
    return checkpoint.load_transformer(layout.find(root), device="cpu", dtype=torch.bfloat16)


def source_of(root):
    return pristine.PristineFiles(layout.find(root).transformer)


@pytest.fixture
def lora_path(tmp_path):
    prefix = "diffusion_model.blocks.1.ffn.0"
    tensors = {
        f"{prefix}.lora_down.weight": torch.randn(4, 64),
        f"{prefix}.lora_up.weight": torch.randn(128, 4),
        "diffusion_model.head.diff_m": torch.randn(1, 2, 64),
    }
    path = tmp_path / "style.safetensors"
    safetensors.torch.save_file(tensors, path)
    return path


def quantize(root):
    files, target = layout.find(root), root / "distill_fp8" / "distill_model.safetensors"
    target.parent.mkdir()
    quantized_files.write(files, target, quantization.Scheme.FP8)
    return root


@pytest.fixture(params=["native", "diffusers", "shards", "fp8"])
def root(request, native_root, diffusers_root):
    if request.param == "native":
        return native_root
    if request.param == "fp8":
        return quantize(native_root)
    return diffusers_root(transformer_shards="200KB" if request.param == "shards" else "10GB")


def test_every_parameter_is_read_as_it_was_stored(root):
    read = source_of(root)
    for name, parameter in load(root).named_parameters():
        assert torch.equal(read(name).to(parameter.dtype), parameter), name


def test_a_switcher_restores_from_the_files(root, lora_path):
    network, kept = load(root), load(root)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    switcher = lora_switcher.LoraSwitcher(network, pristine=source_of(root))
    choices = [lora_switcher.Choice(path=lora_path)]
    switcher.apply(choices)
    lora_switcher.LoraSwitcher(kept).apply(choices)
    assert not torch.equal(network.head.modulation, before["head.modulation"])
    assert all(torch.equal(network.state_dict()[name], kept.state_dict()[name]) for name in before)
    switcher.apply([])
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before)
    assert switcher.kept_bytes == 0


def test_a_file_that_changed_or_went_is_refused(native_root, lora_path):
    source = source_of(native_root)
    switcher = lora_switcher.LoraSwitcher(load(native_root), pristine=source)
    path = native_root / DIT
    os.utime(path, ns=(1, 1))
    with pytest.raises(errors.WeightsChangedError, match=f"{DIT}: has changed"):
        switcher.apply([lora_switcher.Choice(path=lora_path)])
    path.unlink()
    with pytest.raises(errors.UnreadableWeightsError, match=DIT):
        source("head.modulation")


def test_a_file_of_the_same_size_and_time_in_its_place_is_refused(native_root):
    """As archives with fixed times unpack; a changed mode makes it no other file."""
    source, path = source_of(native_root), native_root / DIT
    path.chmod(0o600)
    source("head.modulation")
    shutil.copy2(path, native_root / "new")
    (native_root / "new").rename(path)
    with pytest.raises(errors.WeightsChangedError):
        source("head.modulation")


def test_a_pickle_is_not_read_piecewise(native_root):
    assert layout.find(native_root).transformers_can_be_read_again
    (native_root / "distill_model.pt").touch()
    assert not layout.find(native_root).transformers_can_be_read_again
