"""One folder per attempt on this host's disk: the video until it is uploaded, and its facts.

    scratch/<batch>.<attempt>/video.mp4
    scratch/<batch>.<attempt>/sidecar.json      written last, by rename: the video is finished

The batch is in the name because several farms, or a farm and the one before it, may use the same
disk, and two databases may have given the same id.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import structlog
from pydantic import BaseModel, ValidationError

from worker import errors

log = structlog.get_logger()

VIDEO = "video.mp4"
SIDECAR = "sidecar.json"


class VideoFacts(BaseModel, frozen=True):
    """What is checked before an upload."""

    sha256: str


class Facts(BaseModel, frozen=True):
    """What a publisher needs of a sidecar; the rest is for the people who find it."""

    batch_id: str
    job_id: int
    video: VideoFacts
    seconds: dict[str, float]
    peak_memory_bytes: int | None
    memory: str | None = None
    ran_out_of_memory: str | None = None


@dataclass(frozen=True, kw_only=True)
class AttemptFolder:
    """Where the files of one attempt are."""

    root: Path
    batch_id: str
    attempt_id: int

    @property
    def path(self) -> Path:
        return self.root / f"{self.batch_id}.{self.attempt_id}"

    @property
    def video(self) -> Path:
        return self.path / VIDEO

    @property
    def sidecar(self) -> Path:
        return self.path / SIDECAR

    @property
    def is_finished(self) -> bool:
        return self.sidecar.is_file()

    def make(self) -> None:
        with disk_errors():
            self.path.mkdir(parents=True, exist_ok=True)

    def finish(self, facts: dict[str, Any]) -> None:
        """Mark the video as complete: from here on a publisher may take it up."""
        with disk_errors():
            part = self.path / f"{SIDECAR}.part"
            with part.open("w", encoding="utf-8") as file:
                json.dump(facts, file, indent=2, ensure_ascii=False)
                file.flush()
                os.fsync(file.fileno())
            part.rename(self.sidecar)

    def facts(self) -> Facts:
        """DiskUnusable when the sidecar cannot be read or is not what `finish` wrote."""
        with disk_errors():
            data = self.sidecar.read_bytes()
        try:
            return Facts.model_validate_json(data)
        except ValidationError as error:
            what = error.errors()[0]
            raise errors.DiskUnusable(f"{self.sidecar}: {what['loc']}: {what['msg']}") from None

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def _sidecar_to_lock(self) -> BinaryIO:
        try:
            return self.sidecar.open("rb+")  # NFS locks no file that cannot be written
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES):
                raise
            # A disk that was mounted read-only after an error of its own: no NFS.
            return self.sidecar.open("rb")

    @contextmanager
    def locked(self) -> Iterator[bool]:
        """True for one publisher at a time; false for the others and for an unfinished folder."""
        with contextlib.ExitStack() as stack:
            try:
                # Its own file is the lock: on a full disk no other could be made.
                file = stack.enter_context(self._sidecar_to_lock())
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except (BlockingIOError, FileNotFoundError, NotADirectoryError):
                yield False
            except OSError as error:
                log.error("scratch.not_locked", path=str(self.path), error=str(error))
                yield False
            else:
                # Perhaps removed by the one who held it before.
                yield self.is_finished


def free_bytes(root: Path) -> int:
    """Room on the disk of the scratch folder, whether it exists yet or not."""
    nearest = next(path for path in (root, *root.parents) if path.exists())
    usage = shutil.disk_usage(nearest)
    return usage.free if usage.total else sys.maxsize  # some filesystems do not count


def folders(root: Path) -> list[AttemptFolder]:
    """Every attempt that has left something on this disk, oldest first; no other files."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for entry in root.iterdir():
            batch_id, _, number = entry.name.rpartition(".")
            if batch_id and number.isascii() and number.isdecimal() and len(number) < 19:
                found.append(AttemptFolder(root=root, batch_id=batch_id, attempt_id=int(number)))
    return sorted(found, key=lambda folder: folder.attempt_id)


def sha256(path: Path) -> str:
    with disk_errors(), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def disk_errors() -> Iterator[None]:
    """Around file operations on the scratch disk: a failure is the disk's, not the job's."""
    try:
        yield
    except OSError as error:
        raise errors.DiskUnusable(f"scratch folder: {error}") from error
