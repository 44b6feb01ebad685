"""The weights of each preset: they are here, complete, and fit the devices."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import json5
import pytest
import safetensors.torch
import torch

from jobs import presets, settings
from jobs.doctor import weights
from models import lora_keys
from models.tiny import shipped
from tests.told import told_by
from worker import host_memory


def test_missing_and_incomplete_weights_are_told() -> None:
    folder = settings.load().models_dir / "tiny"
    missing = told_by(weights.check)["weights elsewhere"].seen
    assert missing.startswith(f"there is no folder {folder.parent}: ")
    assert "tiny (for 2 presets)" in missing
    folder.mkdir(parents=True)
    assert told_by(weights.check)["weights elsewhere"].seen.startswith(f"not in {folder.parent}: ")
    (folder / "config.json").write_text("{}")
    assert told_by(weights.check)["weights tiny"].status == "warn"
    assert "complete the folder" in told_by(weights.check)["weights tiny"].advice


def test_a_preset_with_other_steps_than_its_weights_were_distilled_for_is_told() -> None:
    folder = settings.load().models_dir / "tiny"
    shipped.copy("tiny", folder)
    assert told_by(weights.check)["weights tiny"].status == "ok"
    path = folder / "distill_models" / "distill_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    safetensors.torch.save_file(tensors, path, {"denoising_step_list": "[1000, 500]"})
    found = told_by(weights.check)["weights tiny"]
    assert found.status == "warn"
    assert f"{path} was distilled for denoising_step_list [1000, 500], the preset" in found.seen


def test_keys_of_a_lora_that_are_passed_over_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A LoRA of Wan2.1's image-to-video on a model that is laid out as Wan2.2's."""
    root = settings.load().models_dir / "wan22"
    shipped.copy("tiny_i2v", root)
    transformer = root / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(transformer)
    for_images = set(lora_keys.for_images(tensors))
    for name in ("high_noise_model", "low_noise_model"):
        (root / name).mkdir()
        (root / name / "config.json").write_bytes((root / "config.json").read_bytes())
        kept = {key: tensors[key] for key in tensors.keys() - for_images}
        safetensors.torch.save_file(kept, root / name / transformer.name)
    shutil.rmtree(root / "distill_models")
    lora = "wan22/loras/distill_lora.safetensors"
    preset = json5.loads(presets.load("wan_moe_i2v_distill_with_lora").path.read_text())
    use = {"name": "low_noise_model", "path": lora}
    preset |= {"task": "i2v", "model_path": "wan22", "lora_configs": [use]}
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.json").write_text(json.dumps(preset))
    monkeypatch.setenv("RUSHES_PRESETS_DIR", str(tmp_path / "mine"))
    keys = [f"diffusion_model.blocks.0.cross_attn.{name}.diff" for name in ("k", "k_img", "v_img")]
    safetensors.torch.save_file({key: torch.zeros(1) for key in keys}, root.parent / lora)
    found = told_by(weights.check)["weights mine"]
    assert found.status == "ok"
    assert f"; 2 keys of {lora} are passed over: they are for Wan2.1's image" in found.seen


def add_e5m2(folder: Path) -> None:
    path = folder / "distill_models" / "distill_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "blocks.0.ffn.0.weight"
    safetensors.torch.save_file(tensors | {name: tensors[name].to(torch.float8_e5m2)}, path)


def change_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_layers": 7}))


def leave_the_vocabulary(folder: Path) -> None:
    tokenizer = folder / "google" / "umt5-xxl"
    (tokenizer / "tokenizer.json").rename(tokenizer / "spiece.model")


def point_with_git_lfs(folder: Path) -> None:
    (folder / "Wan2.1_VAE.pth").write_text("version https://git-lfs.github.com/spec/v1\n")


@pytest.mark.parametrize(
    ("spoil", "seen"),
    [
        (add_e5m2, "blocks.0.ffn.0.weight is F8_E5M2"),
        (change_config, "describes 7 blocks"),
        (leave_the_vocabulary, "expected tokenizer.json"),
        (point_with_git_lfs, "Wan2.1_VAE.pth: cannot be read as weights: it is a Git LFS pointer"),
    ],
)
def test_weights_that_every_job_would_fail_on_are_told(
    spoil: Callable[[Path], None], seen: str
) -> None:
    folder = settings.load().models_dir / "tiny"
    shipped.copy("tiny", folder)
    spoil(folder)
    (fit,) = weights.fits(settings.load(), "tiny")
    for check, status in ((told_by(weights.check)["weights tiny"], "warn"), (fit, "fail")):
        assert (check.status, seen in check.seen) == (status, True), check


@pytest.mark.parametrize(
    ("lora", "seen"),
    [
        ("loras/nowhere.safetensors", "tiny: expected the LoRA at "),
        ("images.safetensors", "It was made for image-to-video"),
        ("style.pt", "LoRA files are read as .safetensors only"),
        ("damaged.safetensors", "damaged.safetensors: cannot be read as weights"),
    ],
)
def test_a_lora_that_every_job_would_fail_on_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lora: str, seen: str
) -> None:
    models = settings.load().models_dir
    shipped.copy("tiny", models / "tiny")
    key = "diffusion_model.img_emb.proj.1.lora_up.weight"
    safetensors.torch.save_file({key: torch.zeros(1)}, models / "images.safetensors")
    (models / "style.pt").touch()
    (models / "damaged.safetensors").write_bytes(b"no weights")
    asked = json5.loads(presets.load("tiny").path.read_text())
    path = tmp_path / "presets" / "styled.json"
    path.parent.mkdir()
    path.write_text(json.dumps(asked | {"lora_configs": [{"path": lora}]}))
    (fit,) = weights.fits(settings.load(), str(path))
    monkeypatch.setenv("RUSHES_PRESETS_DIR", str(path.parent))
    for check, status in ((told_by(weights.check)["weights styled"], "warn"), (fit, "fail")):
        assert (check.status, seen in check.seen) == (status, True), check


def test_a_preset_that_parks_weights_is_judged_by_main_memory_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the sizes in the files, against what this process may still take."""
    tiny = settings.load().models_dir / "tiny"
    shipped.copy("tiny", tiny)
    look = {**json5.loads(presets.load("tiny").path.read_text()), "cpu_offload": True}
    (tmp_path / "parked.json").write_text(json.dumps(look))
    total = sum(path.stat().st_size for path in tiny.rglob("*.safetensors"))
    for free_bytes, status in ((total // 100, "fail"), (1 << 40, "ok")):
        free = host_memory.HostMemory(total_bytes=1 << 41, free_bytes=free_bytes)
        monkeypatch.setattr(host_memory, "now", lambda free=free: free)
        *_, check = weights.fits(settings.load(), str(tmp_path / "parked.json"))
        assert (check.name, check.status) == ("fit parked, main memory", status)
        assert "GB are free" in check.seen


def test_a_preset_that_does_not_fit_fails_with_the_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model of a few megabytes, a GPU of one, as nvidia-smi would tell it."""
    shipped.copy("tiny", settings.load().models_dir / "tiny")
    for memory_mib, status in ((1, "fail"), (80_000, "ok")):
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir(exist_ok=True)
        row = f"0, GPU-1, Small GPU, {memory_mib}"
        program.write_text(f"#!/bin/sh\necho '{row}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        (check,) = weights.fits(settings.load(), "tiny")
        assert check.status == status, check.seen
        assert "GPU 0 (Small GPU): needs about 0.8 GB" in check.seen


def test_a_preset_is_not_judged_where_the_gpus_are_unknown(driver: Callable[..., None]) -> None:
    """By the main memory of this machine it would fit."""
    shipped.copy("tiny", settings.load().models_dir / "tiny")
    lost = "Unable to determine the device handle for GPU2: 0000:3B:00.0: GPU is lost"
    driver(lost, 15)
    (check,) = weights.fits(settings.load(), "tiny")
    assert (check.name, check.status) == ("fit tiny", "fail")
    assert lost in check.seen
