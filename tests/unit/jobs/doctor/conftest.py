"""The driver of GPUs that tests of devices and of weights ask."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.doctor import devices


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`driver(words, status)`: an nvidia-smi that answers so; torch is of CUDA 13."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr(devices, "_cuda_of_torch", lambda: "13.0")

    def put(words: str, status: int = 0) -> None:
        program.write_text(f"#!/bin/sh\nprintf %s {shlex.quote(words)}\nexit {status}\n")
        program.chmod(0o755)

    return put
