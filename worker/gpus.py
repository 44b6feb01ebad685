"""The GPUs of this machine, found without loading CUDA."""

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import structlog

from jobs import errors, programs

log = structlog.get_logger()

ASK_SECONDS = 20.0
ROW = re.compile(r"\d+, |GPU \d+:|\s+MIG ")  # of an answer, where other lines are warnings
NO_DEVICES = ("", "-1", "NoDevFiles")  # what hides all of them in CUDA_VISIBLE_DEVICES
MAX_CPU_WORKERS = 256
MAX_SIMULATED = 256
SIMULATED = "simulated"


@dataclass(frozen=True, kw_only=True)
class Slot:
    """One worker process is to run here."""

    short_name: str
    """`gpu0`, `gpu0.1` (the second MIG slice of the first GPU), `cpu1`"""
    device: str
    """For people: `NVIDIA H200`, `CPU`, `simulated`."""
    memory_bytes: int | None
    environment: dict[str, str]
    """What hides the other devices; must be set before anything is imported."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, or a MIG slice of one, as nvidia-smi tells it."""

    number: str
    """`0`, or `0.1` for a slice"""
    uuid: str
    name: str
    memory_bytes: int | None
    """None where it is shared with the CPU or cut into slices."""


def find() -> list[Gpu]:
    """The GPUs that we may use; empty without an NVIDIA driver. GpusUnknown where that fails."""
    limit = os.environ.get("CUDA_VISIBLE_DEVICES")
    if limit is not None and limit.strip() in NO_DEVICES:
        return []
    found, trouble = _all_gpus()
    left = _left_to_us(found, limit)
    if trouble and not left:
        # No reason to compute on the CPU what was meant for GPUs.
        raise errors.GpusUnknown(trouble)
    return left


def slots(devices: str, *, cores: int) -> list[Slot]:
    """`auto`, `cpu`, `cpu:N`, `sim:N`, or GPU numbers such as `0,1`.

    InvalidInput says what would do; GpusUnknown, why nobody can tell.
    """
    if devices == "auto":
        return [_gpu_slot(gpu) for gpu in find()] or _cpu_slots(1, cores)
    kind, _, number = devices.partition(":")
    if kind == "cpu":
        if number and not (number.isdecimal() and 1 <= int(number) <= MAX_CPU_WORKERS):
            raise _invalid(f"cpu:N needs 1 to {MAX_CPU_WORKERS} workers, got {devices!r}")
        return _cpu_slots(int(number or 1), cores)
    if kind == "sim":
        if number and not (number.isdecimal() and 1 <= int(number) <= MAX_SIMULATED):
            raise _invalid(f"sim:N needs 1 to {MAX_SIMULATED} workers, got {devices!r}")
        return [_simulated_slot(index) for index in range(int(number or 1))]
    parts = [part.strip() for part in devices.split(",")]
    if not all(re.fullmatch(r"[0-9]+(\.[0-9]+)?", part) for part in parts):
        raise _invalid(f"give auto, cpu, cpu:N, sim:N or GPU numbers such as 0,1; got {devices!r}")
    if len(set(parts)) != len(parts):
        raise _invalid(f"a GPU is named twice in {devices!r}")
    by_number = {gpu.number: gpu for gpu in find()}
    missing = [part for part in parts if part not in by_number]
    if missing:
        there = ", ".join(by_number) or "none (is nvidia-smi on PATH?)"
        limit = os.environ.get("CUDA_VISIBLE_DEVICES")
        because = "" if limit is None else f"; CUDA_VISIBLE_DEVICES is {limit!r}"
        raise _invalid(f"no GPU {', '.join(missing)}; there are: {there}{because}")
    return [_gpu_slot(by_number[part]) for part in parts]


def _all_gpus() -> tuple[list[Gpu], str]:
    """Those that nvidia-smi lists, and what went wrong; it may fail for one and list the others."""
    found: list[Gpu] = []
    query = ("--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits")
    lines, trouble = _ask(*query)
    for row in csv.reader(lines, skipinitialspace=True):
        cells = [cell.strip() for cell in row]
        if len(cells) != 4 or not cells[0].isdecimal() or not cells[1].startswith("GPU-"):
            continue
        memory_bytes = int(cells[3]) << 20 if cells[3].isdecimal() else None
        found.append(Gpu(number=cells[0], uuid=cells[1], name=cells[2], memory_bytes=memory_bytes))
    slices = _mig_slices() if found else {}
    return [part for gpu in found for part in slices.get(gpu.number) or [gpu]], trouble


def _mig_slices() -> dict[str, list[Gpu]]:
    """GPU number -> its MIG slices: CUDA would show only the first slice of such a GPU."""
    slices: dict[str, list[Gpu]] = {}
    number, name = "", ""
    lines, _ = _ask("-L")
    for line in lines:
        if gpu := re.match(r"GPU (\d+): (.*) \(UUID", line):
            number, name = gpu[1], gpu[2]
        elif part := re.match(r"\s+MIG (\S+)\s.*\(UUID: (MIG-[^)]+)\)", line):
            of_gpu = slices.setdefault(number, [])
            of_gpu.append(
                Gpu(
                    number=f"{number}.{len(of_gpu)}",
                    uuid=part[2],
                    name=f"{name} MIG {part[1]}",
                    memory_bytes=None,
                )
            )
    return slices


def _ask(*question: str) -> tuple[list[str], str]:
    """What nvidia-smi says, and how it failed; empty where it did not, or is not here."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], ""
    try:
        try:
            done = programs.run([program, *question], seconds=ASK_SECONDS)
        except subprocess.TimeoutExpired:  # which may have woken the driver
            done = programs.run([program, *question], seconds=ASK_SECONDS)
    except (subprocess.SubprocessError, OSError) as error:
        log.warning("gpus.unreadable", error=str(error))
        return [], str(error)
    lines = done.stdout.splitlines()
    if done.returncode == 0:
        return lines, ""
    odd = [line for line in (*lines, *done.stderr.splitlines()) if not ROW.match(line)]
    said = " ".join(" ".join(odd).split())[:300]
    log.warning("gpus.unreadable", error=f"exit status {done.returncode}", said=said)
    return lines, f"exit status {done.returncode}, {said or 'not a word'}"


def _left_to_us(gpus: list[Gpu], limit: str | None) -> list[Gpu]:
    """What a scheduler or a container's CUDA_VISIBLE_DEVICES leaves of them, as CUDA reads it."""
    if limit is None:
        return gpus
    return list(dict.fromkeys(_named(gpus, limit)))  # of one that is named twice, one worker


def _named(gpus: list[Gpu], limit: str) -> Iterator[Gpu]:
    # Numbers count GPUs in the order of nvidia-smi, and whole ones: CUDA gives the first slice.
    by_number = {gpu.number.removesuffix(".0"): gpu for gpu in gpus}
    for name in (part.strip() for part in limit.split(",")):
        named = [
            gpu for gpu in gpus if name.startswith(("GPU-", "MIG-")) and gpu.uuid.startswith(name)
        ]
        gpu = named[0] if len(named) == 1 else by_number.get(name)
        if gpu is None:
            return  # CUDA, too, takes nothing after the first name that it does not know
        yield gpu


def _gpu_slot(gpu: Gpu) -> Slot:
    return Slot(
        short_name=f"gpu{gpu.number}",
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


def _simulated_slot(index: int) -> Slot:
    return Slot(
        short_name=f"sim{index}",
        device=SIMULATED,
        memory_bytes=None,
        environment={"CUDA_VISIBLE_DEVICES": "", "RUSHES_DEVICE": "sim"},
    )


def _invalid(message: str) -> errors.InvalidInput:
    return errors.InvalidInput("--devices", [errors.Problem(line=None, message=message)])
