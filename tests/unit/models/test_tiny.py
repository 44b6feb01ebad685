"""The tiny model: the same bytes for a seed, written whole or not at all, and worth looking at."""

import subprocess
import sys

import pytest
import torch

from models import checkpoint, layout, sampling
from models.tiny import make


def contents(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_a_seed_fixes_every_byte(tmp_path):
    first, second = (contents(make.make(tmp_path / name)) for name in "ab")
    assert first == second
    other = contents(make.make(tmp_path / "c", seed=1))
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {
        "diffusion_pytorch_model.safetensors",
        "distill_models/distill_model.safetensors",
        "loras/distill_lora.safetensors",
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
    }
    assert sum(map(len, first.values())) < 5_000_000


def test_a_complete_folder_is_left_as_it_is(complete_tiny_model):
    before = {path: path.stat().st_mtime_ns for path in complete_tiny_model.rglob("*")}
    make.make(complete_tiny_model, seed=5)
    assert {path: path.stat().st_mtime_ns for path in complete_tiny_model.rglob("*")} == before


def test_a_folder_with_something_else_in_it_is_not_touched(tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a model folder"):
        make.make(folder)
    assert contents(folder) == {"notes.txt": b"mine"}


def test_a_failure_half_way_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_arguments):
        raise RuntimeError("disk on fire")

    monkeypatch.setattr(make, "random_text_encoder", fail)
    with pytest.raises(RuntimeError, match="disk on fire"):
        make.make(tmp_path / "new" / "tiny")
    assert list((tmp_path / "new").iterdir()) == []


def test_the_command_writes_a_complete_model(tmp_path):
    command = [sys.executable, "-m", "models.tiny.make", str(tmp_path / "tiny"), "--seed", "3"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout == f"{tmp_path / 'tiny'}\n"
    assert layout.find(tmp_path / "tiny").layout is layout.Layout.NATIVE


@pytest.fixture
def render(native_root):
    networks = checkpoint.load(layout.find(native_root), device="cpu", dtype=torch.float32)
    levels = sampling.noise_levels([1000, 750, 500, 250], 5)

    def frames(prompt, seed=0):
        context = networks.text_encoder.encode(prompt)
        shape = networks.vae.config.latent_shape(num_frames=9, height=48, width=64)
        noise, _ = sampling.initial_noise(seed, shape, "cpu")
        latents = sampling.denoise(
            lambda x, t: networks.transformer(x, t, context), noise, levels, step_rule="euler"
        )
        return torch.cat(list(networks.vae.decode_chunks(latents)), dim=2)

    return frames


def test_a_render_is_neither_grey_nor_saturated_and_moves(render):
    frames = render("a red circle moves right")
    assert frames.shape == (1, 3, 9, 48, 64)
    assert frames.std() > 0.15
    assert (frames.abs() == 1).float().mean() < 0.2
    assert frames.diff(dim=2).abs().mean() > 0.05


def test_prompt_and_seed_change_the_picture(render):
    frames = render("a red circle")
    assert torch.equal(frames, render("a red circle"))
    assert (frames - render("a blue square")).abs().mean() > 0.005
    assert (frames - render("a red circle", seed=1)).abs().mean() > 0.1
