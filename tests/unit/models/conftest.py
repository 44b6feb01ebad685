"""A tiny model folder in either layout, each test's own."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from benchmarks import reference
from models import config, text_encoder
from models.tiny import make

DIT = "diffusion_pytorch_model.safetensors"
DISTILLED = ("distill_models", "loras")


@pytest.fixture(scope="session")
def complete_tiny_model(tmp_path_factory):
    """As `make` writes it. Not to be changed."""
    return make.make(tmp_path_factory.mktemp("made") / "tiny")


@pytest.fixture
def native_root(complete_tiny_model, tmp_path):
    """The tiny model with its base transformer alone."""
    return shutil.copytree(
        complete_tiny_model, tmp_path / "tiny", ignore=shutil.ignore_patterns(*DISTILLED)
    )


@pytest.fixture
def experts_root(native_root):
    """The tiny model as Wan2.2 is laid out; the two transformers differ by a tensor."""
    for name, seed in (("high_noise_model", 1), ("low_noise_model", 2)):
        folder = native_root / name
        folder.mkdir()
        (folder / "config.json").write_bytes((native_root / "config.json").read_bytes())
        dit = make.random_transformer(config.TINY, torch.Generator().manual_seed(seed))
        safetensors.torch.save_file(dit.state_dict(), folder / DIT)
    (native_root / "config.json").unlink()
    (native_root / DIT).unlink()
    return native_root


@pytest.fixture
def diffusers_root(tmp_path):
    """Written by diffusers and transformers themselves, `max_shard_size` left to the test."""

    def build(name="diffusers", *, transformer_shards="10GB", text_shards="10GB"):
        root = tmp_path / name
        torch.manual_seed(0)
        dit = reference.transformer(config.TINY)
        dit.save_pretrained(root / "transformer", max_shard_size=transformer_shards)
        reference.autoencoder(config.TINY_VAE).save_pretrained(root / "vae")
        encoder = text_encoder.build_network(config.TINY_TEXT_ENCODER)
        encoder.save_pretrained(root / "text_encoder", max_shard_size=text_shards)
        make.write_tokenizer(root / "tokenizer")
        (root / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
        return root

    return build


@pytest.fixture
def edit_json():
    """`edit_json(path, key=value)` sets keys, `edit_json(path, drop="key")` removes one."""

    def edit(path, *, drop=None, **values):
        content = {**json.loads(path.read_text()), **values}
        content.pop(drop, None)
        path.write_text(json.dumps(content))

    return edit


@pytest.fixture
def edit_tensors():
    """`edit_tensors(path, change)` rewrites a safetensors or .pth file through `change(dict)`."""

    def edit(path, change):
        if path.suffix == ".safetensors":
            tensors = {k: v.clone() for k, v in safetensors.torch.load_file(path).items()}
            change(tensors)
            safetensors.torch.save_file(tensors, path)
        else:
            tensors = torch.load(path, weights_only=True)
            change(tensors)
            torch.save(tensors, path)

    return edit
