"""The tiny model, made and loaded once, and looks small enough to render in a blink."""

from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from jobs import presets
from models import checkpoint, layout, memory
from models.tiny import make
from worker import device, resident
from worker.settings import WorkerSettings


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
def networks(models_dir, cpu) -> checkpoint.TextToVideoNetworks:
    return checkpoint.load_text_to_video(
        models_dir / "tiny", device=cpu.torch_device, dtype=cpu.dtype
    )


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

    def make_look(**changes) -> presets.Look:
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
        return presets.Look.model_validate(values | changes)

    return make_look


@pytest.fixture(scope="session")
def spec(look):
    """`spec(seed=3, width=32)`"""

    def make_spec(*, prompt="a red circle", seed=7, **changes) -> presets.RenderSpec:
        return presets.RenderSpec(
            look=look(**changes), prompt=prompt, negative_prompt=None, seed=seed
        )

    return make_spec


@pytest.fixture
def worker_settings(monkeypatch) -> WorkerSettings:
    monkeypatch.setenv("RUSHES_X264_PRESET", "ultrafast")
    return WorkerSettings()
