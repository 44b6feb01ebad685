"""Main memory that a process of this host is about to take, so that no other counts it as free."""

import contextlib
import fcntl
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import structlog

log = structlog.get_logger()

TURN = "turn"


class Reservations:
    """Of the render processes that share a home on one host; each holds one at most.

    A reservation is a locked file, so that of a process that was killed ends with it. Where the
    folder cannot be written there are none, and each process relies on what it measures.
    """

    def __init__(self, home: Path) -> None:
        # A home may be shared by hosts, whose memory is not.
        self._folder = home / "locks" / f"memory@{socket.gethostname()}"
        self._own: IO[bytes] | None = None

    @contextlib.contextmanager
    def turn(self) -> Iterator[int]:
        """Measure and reserve inside, while no other does; yields bytes that others reserved."""
        with contextlib.ExitStack() as stack:
            pending_bytes = 0
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                lock = stack.enter_context((self._folder / TURN).open("w"))
                fcntl.flock(lock, fcntl.LOCK_EX)
                pending_bytes = self._pending_bytes()
            except OSError as error:
                log.warning("memory.not_reserved", error=str(error))
            yield pending_bytes

    def reserve(self, num_bytes: int) -> None:
        """In one's turn, until `release`; in place of what was reserved before."""
        self.release()
        if num_bytes <= 0:
            return
        try:
            # Unbuffered: what a full disk refused would be written, and refused, at its closing.
            self._own = (self._folder / uuid.uuid4().hex).open("xb", buffering=0)
            fcntl.flock(self._own, fcntl.LOCK_EX)
            self._own.write(b"%d" % num_bytes)
        except OSError as error:
            log.warning("memory.not_reserved", error=str(error))

    def release(self) -> None:
        """It has been taken, and can be measured. Safe to call twice."""
        if self._own is not None:
            Path(self._own.name).unlink(missing_ok=True)
            self._own.close()
            self._own = None

    def _pending_bytes(self) -> int:
        return sum(
            _bytes_in(path)
            for path in self._folder.iterdir()
            if path.name != TURN and (self._own is None or path != Path(self._own.name))
        )


def _bytes_in(path: Path) -> int:
    """What its process has reserved; one that is gone leaves its file unlocked."""
    with contextlib.suppress(FileNotFoundError), path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = file.read()
            return int(text) if text.isdecimal() else 0
        path.unlink(missing_ok=True)
    return 0
