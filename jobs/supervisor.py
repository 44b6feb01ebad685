"""Processes that are started again, with growing pauses, when they end by themselves."""

import contextlib
import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from jobs import errors, servers

log = structlog.get_logger()

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
SETTLED_SECONDS = 60.0  # alive for this long, its next end is a new story


class AlreadyRunning(errors.RushesError):
    """Another process does this here."""


class FolderUnusable(errors.RushesError):
    """A folder of ours cannot be written."""


@dataclass
class Child:
    """One process of ours. It is told to end when we end, however that happens."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    log_path: Path | None = None
    """Where its output goes; None: where ours goes."""
    ends_with_us_by: signal.Signals = signal.SIGTERM
    """What it gets when we die. SIGKILL for one that must not outlive us by a moment."""
    restarts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _pauses: "Pauses" = field(default_factory=lambda: Pauses())

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        self._process = None
        self._pauses.started()
        with contextlib.ExitStack() as stack:
            output = None
            if self.log_path is not None:
                self.log_path.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(self.log_path.open("ab"))
            self._process = subprocess.Popen(  # noqa: S603  # our own argument list, no shell
                [*servers.tied_to_parent(self.ends_with_us_by), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env={**os.environ, **self.environment},
                # Ctrl-C in the terminal goes to us alone: we decide who ends when.
                start_new_session=True,
            )

    def revive(self) -> bool:
        """Call this often. True at the moment when its end is noticed."""
        if self.is_alive:
            return False
        if not self._pauses.is_pausing:
            status = None if self._process is None else self._process.returncode
            self.kill()  # what it started may still hold the device
            self._process = None
            seconds = self._pauses.ended()
            facts = {} if self.log_path is None else {"log": str(self.log_path)}
            log.warning(
                "process.ended",
                name=self.name,
                status=status,
                again_in_seconds=seconds,
                **facts,
            )
            return True
        if self._pauses.is_over:
            self.restarts += 1
            try:
                self.start()
            except OSError as error:
                seconds = self._pauses.ended()
                log.error(
                    "process.not_started",
                    name=self.name,
                    error=str(error),
                    again_in_seconds=seconds,
                )
        return False

    def send(self, number: signal.Signals) -> None:
        if self.is_alive:
            assert self._process is not None
            self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """False when it is still alive after this long."""
        if self._process is not None:
            try:
                self._process.wait(seconds)
            except subprocess.TimeoutExpired:
                return False
        return True

    def kill(self) -> None:
        """It and what it started, at once."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


@dataclass
class Pauses:
    """How long to wait before something that ended is started again."""

    _seconds: float = FIRST_PAUSE_SECONDS
    _started_at: float = 0.0
    _until: float | None = None

    @property
    def is_pausing(self) -> bool:
        return self._until is not None

    @property
    def is_over(self) -> bool:
        return self._until is not None and time.monotonic() >= self._until

    def started(self) -> None:
        self._started_at, self._until = time.monotonic(), None

    def ended(self) -> float:
        """Begins a pause and returns its seconds: twice the last one, unless it had settled."""
        now = time.monotonic()
        if now - self._started_at >= SETTLED_SECONDS:
            self._seconds = FIRST_PAUSE_SECONDS
        seconds = self._seconds
        self._until = now + seconds
        self._seconds = min(2 * seconds, LONGEST_PAUSE_SECONDS)
        return seconds


@contextmanager
def only_one(path: Path, refusal: str) -> Iterator[None]:
    """Hold a lock file; AlreadyRunning with `refusal` while another process does.

    The kernel lets go of it when we end, however that happens; the empty file stays.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise FolderUnusable(f"{path.parent} cannot be written: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AlreadyRunning(refusal) from None
        yield
