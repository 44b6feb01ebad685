"""Runs a program to its end, or leaves it behind."""

import contextlib
import subprocess
from collections.abc import Sequence

END_SECONDS = 1.0


def run(command: Sequence[str], *, seconds: float) -> subprocess.CompletedProcess[str]:
    """What it said, and its status, which may be any. Raises OSError, subprocess.TimeoutExpired.

    `subprocess.run` would wait without limit for one that no signal ends: a program that asks a
    driver which does not answer sleeps in the kernel.
    """
    process = subprocess.Popen(  # noqa: S603  # our own argument lists, no shell
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        errors="replace",
    )
    try:
        said, complained = process.communicate(timeout=seconds)
    except BaseException:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_SECONDS)
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        raise
    return subprocess.CompletedProcess(command, process.returncode, said, complained)
