"""The GPUs of this machine and their driver."""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from jobs.doctor import devices
from tests.told import told_by

GPUS = (
    "0, NVIDIA H100 80GB HBM3, 81559 MiB, 81076 MiB, 580.95.05\n"
    "1, NVIDIA H100 80GB HBM3, 81559 MiB, 81076 MiB, 580.95.05\n"
)
LOST = "Unable to determine the device handle for GPU2: 0000:3B:00.0: GPU is lost\n"


@pytest.mark.parametrize(
    ("words", "status", "found"),
    [
        (GPUS, 0, {"device 0": "ok", "device 1": "ok", "NVIDIA driver": "ok"}),
        ("No devices were found\n", 0, {"devices": "warn"}),
        ("No devices were found\n", 6, {"devices": "fail"}),
        ("Failed to initialize NVML: Driver/library version mismatch\n", 18, {"devices": "fail"}),
        (
            LOST + GPUS,
            15,
            {"device 0": "ok", "device 1": "ok", "devices": "warn", "NVIDIA driver": "ok"},
        ),
        ("2, [Unknown Error], , , \n", 0, {"devices": "warn"}),
        (
            GPUS + "2, [Unknown Error], , , \n",
            0,
            {"device 0": "ok", "device 1": "ok", "devices": "warn", "NVIDIA driver": "ok"},
        ),
    ],
)
def test_each_line_of_nvidia_smi_is_told(
    driver: Callable[..., None], words: str, status: int, found: dict[str, str]
) -> None:
    driver(words, status)
    told = told_by(devices.check)
    assert {name: check.status for name, check in told.items()} == found
    odd = [line.strip() for line in words.splitlines() if line not in GPUS]
    assert all(line in told["devices"].seen for line in odd)


@pytest.mark.parametrize(
    ("version", "cuda", "status"),
    [
        ("580.95.05", "13.0", "ok"),
        ("575.57.08", "13.0", "warn"),
        ("575.57.08", "12.8", "ok"),
        ("520.61.05", "12.8", "warn"),
        ("575.57.08", "", None),
        ("575.57.08", "11.8", None),
        ("[N/A]", "13.0", None),
    ],
)
def test_a_driver_too_old_for_torch_is_told(
    driver: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    version: str,
    cuda: str,
    status: str | None,
) -> None:
    monkeypatch.setattr(devices, "_cuda_of_torch", lambda: cuda)
    driver(GPUS.replace("580.95.05", version))
    told = told_by(devices.check)
    assert told["device 0"].status == "ok"
    check = told.get("NVIDIA driver")
    assert (check and check.status) == status
    assert status != "warn" or (check and version in check.seen)


def test_the_cuda_of_torch_is_read_without_loading_it() -> None:
    script = (
        "import sys\nfrom jobs.doctor import devices\n"
        "print(devices._cuda_of_torch(), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    assert done.stdout == f"{torch.version.cuda or ''} False\n"
