"""Pids are used again: with its start, one tells which process it was."""

from pathlib import Path

import psutil

START_FIELD = 22 - 3  # of /proc/PID/stat, counted behind the name; the state is the third


def start_of(pid: int) -> str | float:
    """Ticks since this boot, which a step of the clock does not move. Raises psutil.Error."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        facts = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:  # macOS has no /proc
        return float(psutil.Process(pid).create_time())
    return f"{boot} {int(facts.rpartition(b')')[2].split()[START_FIELD])}"


def is_still(pid: int, start: str | float) -> bool:
    """Whether it lives, if `start_of` said so then. Raises psutil.Error."""
    if isinstance(start, str):
        return start_of(pid) == start
    return bool(abs(psutil.Process(pid).create_time() - start) < 1.0)  # to a fraction of a second
