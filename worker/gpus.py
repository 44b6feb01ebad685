"""The GPUs of this machine, found without loading CUDA."""

import csv
import shutil
import subprocess
from dataclasses import dataclass

from jobs import errors

ASK_SECONDS = 20.0
MAX_CPU_WORKERS = 256


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One worker process is to run here."""

    short_name: str
    """`gpu0`, `cpu1`"""
    device: str
    """For people: `NVIDIA H200`, `CPU`."""
    memory_bytes: int | None
    environment: dict[str, str]
    """What hides the other devices; must be set before anything is imported."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A line of nvidia-smi."""

    index: int
    uuid: str
    name: str
    memory_bytes: int


def find() -> list[Gpu]:
    """Empty without an NVIDIA driver."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    query = ["--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(  # noqa: S603  # a program found on PATH, fixed arguments
            [program, *query], capture_output=True, timeout=ASK_SECONDS, check=True, text=True
        )
    except (subprocess.SubprocessError, OSError):
        return []
    rows = [[cell.strip() for cell in row] for row in csv.reader(done.stdout.splitlines())]
    return [
        Gpu(index=int(row[0]), uuid=row[1], name=row[2], memory_bytes=int(row[3]) << 20)
        for row in rows
        if len(row) == 4 and row[0].isdecimal() and row[3].isdecimal()
    ]


def slots(devices: str, *, cores: int) -> list[Slot]:
    """`auto`, `cpu`, `cpu:N`, or GPU numbers such as `0,1`; InvalidInput says what there is."""
    if devices == "auto":
        found = find()
        return [_gpu_slot(gpu) for gpu in found] or _cpu_slots(1, cores)
    kind, _, number = devices.partition(":")
    if kind == "cpu":
        if number and not (number.isdecimal() and 1 <= int(number) <= MAX_CPU_WORKERS):
            raise _invalid(f"cpu:N needs 1 to {MAX_CPU_WORKERS} workers, got {devices!r}")
        return _cpu_slots(int(number or 1), cores)
    parts = [part.strip() for part in devices.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise _invalid(f"give auto, cpu, cpu:N or GPU numbers such as 0,1; got {devices!r}")
    if len(set(parts)) != len(parts):
        raise _invalid(f"a GPU is named twice in {devices!r}")
    by_index = {gpu.index: gpu for gpu in find()}
    missing = [part for part in parts if int(part) not in by_index]
    if missing:
        there = ", ".join(map(str, sorted(by_index))) or "none (is nvidia-smi on PATH?)"
        raise _invalid(f"no GPU {', '.join(missing)}; there are: {there}")
    return [_gpu_slot(by_index[int(part)]) for part in parts]


def _gpu_slot(gpu: Gpu) -> Slot:
    return Slot(
        short_name=f"gpu{gpu.index}",
        device=gpu.name,
        memory_bytes=gpu.memory_bytes,
        environment={
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            # By UUID: index order may change between two starts.
            "CUDA_VISIBLE_DEVICES": gpu.uuid,
            "RUSHES_DEVICE": "cuda",
        },
    )


def _cpu_slots(number: int, cores: int) -> list[Slot]:
    threads = str(max(1, cores // number))
    return [
        Slot(
            short_name=f"cpu{index}",
            device="CPU",
            memory_bytes=None,
            environment={
                "CUDA_VISIBLE_DEVICES": "",
                "RUSHES_DEVICE": "cpu",
                # Else every worker would use all cores, and all would be slow.
                "OMP_NUM_THREADS": threads,
                "MKL_NUM_THREADS": threads,
            },
        )
        for index in range(number)
    ]


def _invalid(message: str) -> errors.InvalidInput:
    return errors.InvalidInput("--devices", [errors.Problem(line=None, message=message)])
