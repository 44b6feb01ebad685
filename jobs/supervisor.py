"""Child processes that are started again, with growing pauses, when they end by themselves."""

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from jobs import servers

log = structlog.get_logger()

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
SETTLED_SECONDS = 60.0  # alive for this long, its next end is a new story


@dataclass
class Child:
    """One process of ours. It is told to end when we end, however that happens."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    log_path: Path | None = None
    """Where its output goes; None: where ours goes."""
    restarts: int = 0
    _process: subprocess.Popen[bytes] | None = None
    _started_at: float = 0.0
    _pause_seconds: float = FIRST_PAUSE_SECONDS
    _start_at: float = 0.0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        with contextlib.ExitStack() as stack:
            output = None
            if self.log_path is not None:
                self.log_path.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(self.log_path.open("ab"))
            self._process = subprocess.Popen(  # noqa: S603  # our own argument list, no shell
                [*servers.tied_to_parent(), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                env={**os.environ, **self.environment},
                # Ctrl-C in the terminal goes to us alone: we decide who ends when.
                start_new_session=True,
            )
        self._started_at = time.monotonic()

    def revive(self) -> bool:
        """Call this often. True at the moment when its end is noticed."""
        now = time.monotonic()
        if self.is_alive:
            return False
        if self._start_at == 0.0:
            self._note_end(now)
            return True
        if now >= self._start_at:
            self._start_at = 0.0
            self.restarts += 1
            self.start()
        return False

    def send(self, number: signal.Signals) -> None:
        if self.is_alive:
            assert self._process is not None
            self._process.send_signal(number)

    def wait(self, seconds: float) -> bool:
        """False when it is still alive after this long."""
        assert self._process is not None
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def _note_end(self, now: float) -> None:
        assert self._process is not None
        if now - self._started_at >= SETTLED_SECONDS:
            self._pause_seconds = FIRST_PAUSE_SECONDS
        log.warning(
            "process.ended",
            name=self.name,
            status=self._process.returncode,
            again_in_seconds=self._pause_seconds,
        )
        self._start_at = now + self._pause_seconds
        self._pause_seconds = min(2 * self._pause_seconds, LONGEST_PAUSE_SECONDS)
