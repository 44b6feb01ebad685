"""The tiny model, made and loaded once, and looks small enough to render in a blink."""

import dataclasses
import shutil
from concurrent.futures import Future
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers

from benchmarks import reference
from jobs import looks
from models import checkpoint, config, layout, memory, text_encoder, weight_names
from models.tiny import make
from worker import device, resident
from worker.settings import WorkerSettings


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Tiny matrices gain nothing from more, and on a busy machine lose much by waiting."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory) -> Path:
    """Holds one model, `tiny`. Tests that change files make a copy."""
    folder = tmp_path_factory.mktemp("models")
    make.make(folder / "tiny")
    return folder


@pytest.fixture(scope="session")
def cpu() -> device.Device:
    return device.Device(torch_device=torch.device("cpu"), dtype=torch.float32, name="CPU test")


@pytest.fixture(scope="session")
def networks(models_dir, cpu) -> checkpoint.Networks:
    files = layout.find(models_dir / "tiny")
    return checkpoint.load(files, device=cpu.torch_device, dtype=cpu.dtype)


@pytest.fixture(scope="session")
def model(models_dir, networks, cpu) -> resident.ResidentModel:
    key = resident.WeightsKey(
        root=models_dir / "tiny",
        task="t2v",
        transformer=None,
        low_noise_transformer=None,
        base=False,
        mode=memory.Mode(),
    )
    return resident.ResidentModel(
        key,
        files=layout.find(key.root),
        networks=networks,
        device=cpu.torch_device,
        hashes=Future(),
    )


@pytest.fixture(scope="session")
def look():
    """`look(width=32)`: a small look with what the test wants changed."""

    def make_look(**changes) -> looks.Look:
        values = {
            "task": "t2v",
            "model_path": "tiny",
            "denoising_step_list": [1000, 750, 500, 250],
            "step_rule": "euler",
            "sample_shift": 5.0,
            "width": 16,
            "height": 16,
            "num_frames": 5,
            "fps": 8,
        }
        return looks.Look.model_validate(values | changes)

    return make_look


@pytest.fixture(scope="session")
def spec(look):
    """`spec(seed=3, width=32)`"""

    def make_spec(*, prompt="a red circle", seed=7, **changes) -> looks.RenderSpec:
        return looks.RenderSpec(
            look=look(**changes), prompt=prompt, negative_prompt=None, seed=seed
        )

    return make_spec


@pytest.fixture
def worker_settings(monkeypatch) -> WorkerSettings:
    monkeypatch.setenv("RUSHES_X264_PRESET", "ultrafast")
    return WorkerSettings()


# The tiny model's networks as diffusers and transformers write them.


def write_dit(native, folder):
    sizes = config.TINY_I2V if "img_emb.proj.1.weight" in native else config.TINY
    in_dim = native["patch_embedding.weight"].shape[1]
    network = reference.transformer(dataclasses.replace(sizes, in_dim=in_dim))
    names = weight_names.transformer_from_diffusers(native)
    network.load_state_dict({theirs: native[own] for theirs, own in names.items()})
    network.save_pretrained(folder)


def write_vae(native, folder):
    sizes = config.TINY_VAE
    network = reference.autoencoder(sizes)
    names = weight_names.vae_from_diffusers(native, num_res_blocks=sizes.num_res_blocks)
    network.load_state_dict({theirs: native[own] for theirs, own in names.items()})
    network.save_pretrained(folder)


def write_text_encoder(native, folder):
    sizes = config.TINY_TEXT_ENCODER
    network = text_encoder.build_network(sizes)
    names = weight_names.text_encoder_to_transformers(sizes.num_layers)
    tensors = {names[own]: tensor for own, tensor in native.items()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    network.load_state_dict(tensors)
    network.save_pretrained(folder)


def write_image_encoder(native, folder):
    network = transformers.CLIPVisionModel(reference.clip_config(config.TINY_IMAGE_ENCODER))
    parts = {}
    for name, tensor in native.items():
        own = weight_names.split_qkv(name)
        parts |= zip(own, tensor.chunk(len(own)), strict=True)
    names = weight_names.image_encoder_from_transformers(native)
    with torch.no_grad():
        for theirs, parameter in network.named_parameters():
            if "post_layernorm" not in theirs:  # after the last block: Wan does not use it
                parameter.copy_(parts[names[theirs]].view_as(parameter))
    network.save_pretrained(folder)


@pytest.fixture(scope="session")
def to_diffusers(tmp_path_factory):
    """`to_diffusers(root)` lays a tiny native folder out as diffusers does, weights unchanged.

    What is not the base model's (`distill_models/`, LoRAs and the like) stays where it is.
    """

    written = {}  # by content: most tiny folders share their encoders

    def write_once(write, path, target):
        key = write, path.read_bytes()
        if key not in written:
            written[key] = tmp_path_factory.mktemp("written")
            is_pickle = path.suffix == ".pth"
            native = torch.load(path) if is_pickle else safetensors.torch.load_file(path)
            write(native, written[key])
        shutil.copytree(written[key], target)

    def convert(root):
        folders = {root: "transformer"}
        if (root / "high_noise_model").is_dir():
            folders = {
                root / "high_noise_model": "transformer",
                root / "low_noise_model": "transformer_2",
            }
        for folder, name in folders.items():
            path = folder / "diffusion_pytorch_model.safetensors"
            write_once(write_dit, path, root / name)
            shutil.rmtree(folder) if folder != root else path.unlink()
        writers = (
            (layout.VAE_FILE, "vae", write_vae),
            (layout.TEXT_ENCODER_FILE, "text_encoder", write_text_encoder),
            (layout.IMAGE_ENCODER_FILE, "image_encoder", write_image_encoder),
        )
        for file, name, write in writers:
            if (root / file).is_file():
                write_once(write, root / file, root / name)
                (root / file).unlink()
        (root / layout.TOKENIZER_FOLDER).rename(root / "tokenizer")
        for path in root.glob("*config.json"):
            path.unlink()
        (root / "model_index.json").write_text('{"_class_name": "WanPipeline"}')

    return convert
