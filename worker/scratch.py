"""One folder per attempt on this host's disk: the video until it is uploaded, and its facts.

A folder with `sidecar.json` holds a finished video: the file is written last, by rename.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worker import errors

VIDEO = "video.mp4"
SIDECAR = "sidecar.json"
LOCK = "lock"

DISK_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO})


@dataclass(frozen=True, kw_only=True)
class AttemptFolder:
    """Where the files of one attempt are; the id is the folder's name."""

    root: Path
    attempt_id: int

    @property
    def path(self) -> Path:
        return self.root / str(self.attempt_id)

    @property
    def video(self) -> Path:
        return self.path / VIDEO

    @property
    def is_finished(self) -> bool:
        return (self.path / SIDECAR).is_file()

    def make(self) -> None:
        with disk_errors():
            self.path.mkdir(parents=True, exist_ok=True)

    def finish(self, sidecar: dict[str, Any]) -> None:
        """Mark the video as complete: from here on a publisher may take it up."""
        with disk_errors():
            part = self.path / f"{SIDECAR}.part"
            with part.open("w", encoding="utf-8") as file:
                json.dump(sidecar, file, indent=2, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            part.rename(self.path / SIDECAR)

    def sidecar(self) -> dict[str, Any]:
        text = (self.path / SIDECAR).read_text("utf-8")
        found: dict[str, Any] = json.loads(text)
        return found

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """True for one publisher at a time, false for the others and when the folder is gone."""
        try:
            file = (self.path / LOCK).open("a")
        except FileNotFoundError:
            yield False
            return
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                yield False
                return
            yield self.is_finished


def folders(root: Path) -> list[AttemptFolder]:
    """Every attempt that has left something on this disk, oldest first."""
    with contextlib.suppress(FileNotFoundError):
        ids = sorted(int(entry.name) for entry in root.iterdir() if entry.name.isdecimal())
        return [AttemptFolder(root=root, attempt_id=attempt_id) for attempt_id in ids]
    return []


def sha256_or_none(path: Path) -> str | None:
    """None when the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


@contextmanager
def disk_errors() -> Iterator[None]:
    """Failures that are the disk's and not the job's are named so."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRNOS:
            raise errors.DiskUnusable(f"scratch folder: {error}") from error
        raise
