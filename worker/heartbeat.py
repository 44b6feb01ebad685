"""Keeps an attempt's lease alive while it makes progress, and hears when to stop."""

import faulthandler
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

import structlog
from sqlalchemy.exc import SQLAlchemyError

from jobs import database, lifecycle
from worker import errors
from worker.settings import WorkerSettings

log = structlog.get_logger()

REPORT_SECONDS = 0.5  # between two reports of progress; decode chunks can come much faster
DEAF_SECONDS = 60.0
"""So much longer than a stall a heartbeat may itself stand still. Native code that hangs without
letting the interpreter go stops every Python thread; a timer of C then ends the process."""
STALLED = 70  # exit status, for the logs
STDERR = 2  # the file itself: Python's object of it may be anything


_live: set["Heartbeat"] = set()
"""Of this process, which has one timer for all of them."""
_live_lock = threading.Lock()


def end_process() -> None:
    """A device that hangs would hold this process for ever; its parent starts a fresh one."""
    faulthandler.dump_traceback(file=STDERR)
    os._exit(STALLED)


class Progress(Protocol):
    """Hears where a render is."""

    def reached(self, stage: str, step: int, steps: int) -> None:
        """Between steps; what it raises ends the render."""

    def keep(self) -> None:
        """Still there, and at work on it or waiting for what is: no stall."""


class Heartbeat:
    """Reports from a thread of its own: a device never waits for the database.

    The thread renews the lease only while the render loop goes on: a device that hangs loses its
    job, and its process ends, also when the thread itself cannot run any more.
    """

    def __init__(
        self,
        db: database.Database,
        attempt_id: int,
        *,
        lease_seconds: float,
        worker_settings: WorkerSettings,
        on_stall: Callable[[], None] = end_process,
    ) -> None:
        self._db = db
        self._attempt_id = attempt_id
        self._lease_seconds = lease_seconds
        self._interval = min(worker_settings.heartbeat_seconds, lease_seconds / 3)
        self._stall_seconds = worker_settings.stall_seconds
        self._on_stall = on_stall
        self._place: tuple[str, int, int] = ("load", 0, 0)
        self._moved_at = time.monotonic()
        self._verdict = lifecycle.Verdict.GO_ON
        self._stop = threading.Event()
        self._news = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        with _live_lock:
            _live.add(self)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._news.set()
        self._thread.join()
        with _live_lock:
            _live.discard(self)
            if not _live:
                faulthandler.cancel_dump_traceback_later()

    def reached(self, stage: str, step: int, steps: int) -> None:
        """The render loop is here. Raises AttemptCancelled or AttemptSuperseded when it is over.

        What is raised is what the last report heard: at most one step or one interval old.
        """
        self._place = (stage, step, steps)
        self._moved_at = time.monotonic()
        self._news.set()
        if self._verdict is lifecycle.Verdict.CANCELLED:
            raise errors.AttemptCancelled
        if self._verdict is lifecycle.Verdict.SUPERSEDED:
            raise errors.AttemptSuperseded

    def keep(self) -> None:
        self._moved_at = time.monotonic()

    def _run(self) -> None:
        try:
            self._beat()
        except Exception:
            # The lease would end, and the render go on beside that of whoever has the job then.
            log.exception("heartbeat.broken", attempt_id=self._attempt_id)
            end_process()

    def _beat(self) -> None:
        while not self._stop.wait(min(REPORT_SECONDS, self._interval)):
            self._arm()
            self._news.wait(self._interval)
            self._news.clear()
            if self._stop.is_set():
                return
            idle = time.monotonic() - self._moved_at
            if idle > self._stall_seconds:
                log.error("attempt.stalled", attempt_id=self._attempt_id, seconds=round(idle))
                self._on_stall()
                return
            # A database that is locked, or does not answer, is no device that hangs.
            self._arm(more_seconds=self._db.longest_write_seconds)
            self._report()
            self._arm()

    def _arm(self, *, more_seconds: float = 0.0) -> None:
        seconds = self._stall_seconds + DEAF_SECONDS + more_seconds
        faulthandler.dump_traceback_later(seconds, exit=True, file=STDERR)

    def _report(self) -> None:
        stage, step, steps = self._place
        try:
            self._verdict = self._db.write(
                lifecycle.heartbeat,
                self._attempt_id,
                lease_seconds=self._lease_seconds,
                stage=stage,
                step=step,
                steps=steps,
            )
        except SQLAlchemyError as error:
            # Go on: the lease outlives a short outage, and the fence decides about a long one.
            log.warning("heartbeat.missed", attempt_id=self._attempt_id, error=str(error)[:200])
