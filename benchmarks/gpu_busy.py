"""How long a GPU ran kernels, as its driver counts: sampled beside what is measured.

The driver tells the share of the time since its last look, at most a second ago, in which any
kernel ran, however few of the GPU's processors it used. Of MIG slices it tells nothing.
"""

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

EVERY_MS = 200


@contextlib.contextmanager
def sampled(number: str, path: Path) -> Iterator[None]:
    """nvidia-smi writes times and percents of this GPU into the file."""
    program = shutil.which("nvidia-smi")
    assert program is not None, "the GPU was found by it"
    what = ("--query-gpu=timestamp,utilization.gpu", "--format=csv,noheader,nounits")
    with path.open("wb") as lines:
        smi = subprocess.Popen(
            [program, "-i", number.partition(".")[0], *what, "-lms", str(EVERY_MS)],
            stdout=lines,
        )
        try:
            yield
        finally:
            smi.terminate()
            smi.wait()


def share(path: Path, *, since: float, until: float) -> float | None:
    """Of the time between two moments, in seconds since 1970; None where nothing was told."""
    found = [percent for at, percent in _samples(path) if since <= at <= until]
    return sum(found) / len(found) / 100 if found else None


def _samples(path: Path) -> Iterator[tuple[float, float]]:
    for line in path.read_text().splitlines():
        told, _, percent = line.partition(",")
        # The last line may be half written, and `[N/A]` is no number.
        with contextlib.suppress(ValueError):
            at = datetime.strptime(told.strip(), "%Y/%m/%d %H:%M:%S.%f").astimezone()
            yield at.timestamp(), float(percent)
