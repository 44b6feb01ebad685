"""What the benchmarks of networks share: times, peaks of memory, pairs in turns, a report."""

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks import hardware
from models import attention

REPEATS = 5
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"  # proc(5): the peak of resident memory is counted from now on


class Report:
    """Facts by part, on the terminal and in a file."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.facts: dict[str, dict[str, Any]] = {}

    def add(self, part: str, facts: dict[str, Any]) -> None:
        self.facts[part] = facts
        line = json.dumps({"part": part, **facts})
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(line + "\n")


def run_parts(
    report: Report, parts: dict[str, Callable[[], dict[str, Any]]], *, only: set[str] | None
) -> None:
    """A part that fails says so, and the next one begins."""
    for name, part in parts.items():
        if only and name not in only:
            continue
        began = time.perf_counter()
        try:
            facts = part()
        except Exception as error:  # the others are worth having
            facts = {"error": f"{type(error).__name__}: {error}"[:600]}
        report.add(name, {**facts, "took_seconds": round(time.perf_counter() - began, 1)})
        give_back()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def give_back() -> None:
    """What nobody holds any more goes back to device and machine."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def once(work: Callable[[], object]) -> float:
    """Seconds, with the device's work."""
    synchronize()
    began = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - began


def seconds(work: Callable[[], object], *, repeats: int = REPEATS) -> dict[str, float]:
    """Median and spread, after one call that is not counted."""
    work()
    return spread([once(work) for _ in range(repeats)], "seconds")


def spread(found: list[float], name: str) -> dict[str, float]:
    return {name: statistics.median(found), "least": min(found), "most": max(found)}


def peak_bytes(work: Callable[[], object]) -> int | None:
    """What a call takes beside what is held already; None where nothing counts it.

    On a processor that is resident memory, so the allocator's and the libraries' share is in it.
    """
    give_back()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    if not CLEAR_REFS.exists():
        return None
    CLEAR_REFS.write_text(RESET_PEAK)
    before = psutil.Process().memory_info().rss
    work()
    return _highest_resident_bytes() - before


def _highest_resident_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def in_turns(
    ours: Callable[[], object], theirs: Callable[[], object], *, pairs: int
) -> dict[str, Any]:
    """How many times as fast ours is: per pair of calls, one after the other in one process.

    Each goes first in every second pair, so that a machine that slows down slows both.
    """
    peaks = {"ours": peak_bytes(ours), "theirs": peak_bytes(theirs)}
    wall: dict[str, list[float]] = {"ours": [], "theirs": []}
    processor: dict[str, list[float]] = {"ours": [], "theirs": []}
    for number in range(pairs):
        turns = [("ours", ours), ("theirs", theirs)]
        for name, work in turns if number % 2 == 0 else reversed(turns):
            began = time.process_time()
            wall[name].append(once(work))
            processor[name].append(time.process_time() - began)
    # Others on the same cores make wall times mean little; those of a GPU are its own.
    counting = wall if torch.cuda.is_available() else processor
    ratios = [two / one for one, two in zip(counting["ours"], counting["theirs"], strict=True)]
    return {
        "times_as_fast": spread(ratios, "median"),
        "by": "wall" if counting is wall else "processor",
        **{
            name: {
                "wall": spread(wall[name], "seconds"),
                "processor": spread(processor[name], "seconds"),
            }
            for name in wall
        },
        "peak_bytes": peaks,
        "pairs": pairs,
    }


def relative(some: Tensor, other: Tensor) -> float:
    return float((some.float() - other.float()).norm() / other.float().norm())


@contextmanager
def same_attention() -> Iterator[None]:
    """Other people's networks use the kernels that ours use, inside."""
    backends = list(attention.choose(attention.this_machine()).backends)
    with sdpa_kernel(backends, set_priority=True) if backends else nullcontext():
        yield


def machine() -> dict[str, Any]:
    """Hardware, versions and load. Lets our networks use the fastest kernel that is right."""
    choice = attention.choose(attention.this_machine())
    attention.use(attention.TorchKernels(choice.backends))
    facts: dict[str, Any] = {
        "processor": hardware.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "attention": [backend.name for backend in choice.backends],
        "warning": choice.warning,
    }
    if torch.cuda.is_available():
        facts |= {
            "device": torch.cuda.get_device_name(),
            "memory_gb": torch.cuda.mem_get_info()[1] / 1e9,
            "driver": told_by_driver("driver_version"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        }
    return facts


def drop_from_cache(path: Path) -> None:
    """The system's copy of a file: it is read from the disk again."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def told_by_driver(*names: str) -> str:
    """What nvidia-smi says of these, separated by commas; a line for each GPU."""
    return subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(names)}", "--format=csv,noheader"],  # noqa: S607
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
