"""Main memory that this process may still take: of the machine, and of the container it is in."""

import contextlib
import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil


@dataclass(frozen=True, kw_only=True)
class HostMemory:
    """Now; caches of files count as free, since the kernel gives them up for us."""

    total_bytes: int
    free_bytes: int


@dataclass(frozen=True, kw_only=True)
class _Controller:
    """Where one version of Linux control groups says what a group may have and has."""

    mount: str
    limit: str
    used: str
    cached: str
    """Name in memory.stat."""


V1 = _Controller(
    mount="memory",
    limit="memory.limit_in_bytes",
    used="memory.usage_in_bytes",
    cached="total_inactive_file",
)
V2 = _Controller(mount="", limit="memory.max", used="memory.current", cached="inactive_file")


def now(*, root: Path = Path("/")) -> HostMemory:
    """The tightest of the machine and of the control groups that this process is in."""
    machine = psutil.virtual_memory()
    found = [HostMemory(total_bytes=machine.total, free_bytes=machine.available)]
    found += _groups(root)
    return HostMemory(
        total_bytes=min(each.total_bytes for each in found),
        free_bytes=min(each.free_bytes for each in found),
    )


def process_bytes() -> int:
    """Main memory that this process holds."""
    resident: int = psutil.Process().memory_info().rss
    return resident


def trim() -> None:
    """What this process let go of is free for others: glibc keeps pieces of up to 32 MB."""
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def _groups(root: Path) -> Iterator[HostMemory]:
    """Of this process's group and all above it: each of them limits what is below."""
    for controller, path in _paths(root):
        mount = root / "sys/fs/cgroup" / controller.mount
        for group in (path, *path.parents):
            # In a container the path may be that of the machine: then only the mount is there.
            limited = _limit_of(mount / str(group).lstrip("/"), controller)
            if limited is not None:
                yield limited


def _paths(root: Path) -> Iterator[tuple[_Controller, PurePosixPath]]:
    """From lines like `0::/user.slice` (version 2) and `4:memory:/docker/1f` (version 1)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if not names:
            yield V2, PurePosixPath(path)
        elif "memory" in names.split(","):
            yield V1, PurePosixPath(path)


def _limit_of(group: Path, controller: _Controller) -> HostMemory | None:
    limit, used = _read(group / controller.limit), _read(group / controller.used)
    if not (limit.isdecimal() and used.isdecimal()):
        return None  # "max", or no such group
    stat = dict(line.split(" ", 1) for line in _read(group / "memory.stat").splitlines())
    held = int(used) - int(stat.get(controller.cached, "0"))
    return HostMemory(total_bytes=int(limit), free_bytes=max(int(limit) - held, 0))


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8").strip()
    except OSError:
        return ""
