"""Keeps an attempt's lease alive while it makes progress, and hears when to stop."""

import threading
import time
from types import TracebackType
from typing import Self

import structlog
from sqlalchemy.exc import DBAPIError

from jobs import database, lifecycle
from worker import errors
from worker.settings import WorkerSettings

log = structlog.get_logger()

REPORT_SECONDS = 0.5  # between two reports of progress; decode chunks can come much faster


class Heartbeat:
    """Reports from the render loop and, when that is busy for long, from a thread of its own.

    The thread renews the lease only while the loop goes on: a device that hangs loses its job.
    """

    def __init__(
        self,
        db: database.Database,
        attempt_id: int,
        *,
        lease_seconds: float,
        worker_settings: WorkerSettings,
    ) -> None:
        self._db = db
        self._attempt_id = attempt_id
        self._lease_seconds = lease_seconds
        self._interval = min(worker_settings.heartbeat_seconds, lease_seconds / 3)
        self._stall_seconds = worker_settings.stall_seconds
        self._place: tuple[str, int, int] = ("load", 0, 0)
        self._moved_at = time.monotonic()
        self._reported_at = 0.0
        self._verdict = lifecycle.Verdict.GO_ON
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def reached(self, stage: str, step: int, steps: int) -> None:
        """The render loop is here. Raises AttemptCancelled or AttemptSuperseded when it is over."""
        is_new_stage = stage != self._place[0]
        self._place = (stage, step, steps)
        self._moved_at = time.monotonic()
        if is_new_stage or self._moved_at - self._reported_at >= REPORT_SECONDS:
            self._report()
        if self._verdict is lifecycle.Verdict.CANCELLED:
            raise errors.AttemptCancelled
        if self._verdict is lifecycle.Verdict.SUPERSEDED:
            raise errors.AttemptSuperseded

    def _renew(self) -> None:
        while not self._stop.wait(self._interval):
            idle = time.monotonic() - self._moved_at
            if idle > self._stall_seconds:
                log.error("attempt.stalled", attempt_id=self._attempt_id, seconds=round(idle))
                return
            self._report()

    def _report(self) -> None:
        stage, step, steps = self._place
        self._reported_at = time.monotonic()
        try:
            self._verdict = self._db.write(
                lifecycle.heartbeat,
                self._attempt_id,
                lease_seconds=self._lease_seconds,
                stage=stage,
                step=step,
                steps=steps,
            )
        except DBAPIError as error:
            # Go on: the lease outlives a short outage, and the fence decides about a long one.
            log.warning("heartbeat.missed", attempt_id=self._attempt_id, error=str(error)[:200])
