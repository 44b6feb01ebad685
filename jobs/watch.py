"""Following a batch to its end: by the database alone, so it works while Redis is down."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError

from jobs import database, errors, queries
from jobs.schema import Attempt, Job, Refusal

log = structlog.get_logger()

INTERVAL_SECONDS = 1.0
IDLE_PER_LOOK = 9.0  # a tenth of the time, at most, is spent looking
LONGEST_PAUSE_SECONDS = 10.0  # between looks while the database is away


class WaitTimeout(errors.RushesError):
    """The batch was not finished in the time that was given. It goes on."""

    exit_code = 124

    def __init__(self, batch_id: str, *, timeout_seconds: float) -> None:
        self.batch_id = batch_id
        super().__init__(
            f"batch {batch_id} is not finished after {timeout_seconds:g} s; it goes on"
        )


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """How far a batch is, at one moment of the database's clock."""

    now: datetime
    progress: queries.Progress
    running: Sequence[tuple[Job, Attempt]]
    idle_queues: Sequence[str]
    """Queues that its jobs wait in and that no live worker takes from."""
    refusals: Sequence[Refusal] = ()
    """Why live workers that have the weights take nothing of these queues now."""

    @property
    def is_finished(self) -> bool:
        return self.progress.batch.finished_at is not None


def look(db: database.Database, batch_id: str) -> Snapshot:
    with db.reading() as session:
        progress = queries.progress(session, batch_id)
        idle = queries.queues_without_workers(session, progress.batch.id)
        if idle and idle == queries.queues_waited_in(session, progress.batch.id):
            progress = dataclasses.replace(progress, seconds_left=None)
        return Snapshot(
            now=database.now(session),
            progress=progress,
            running=queries.running(session, progress.batch.id),
            idle_queues=idle,
            refusals=queries.refusals_of(session, idle) if idle else (),
        )


def until_finished(
    db: database.Database,
    batch_id: str,
    *,
    timeout_seconds: float | None = None,
    interval_seconds: float = INTERVAL_SECONDS,
) -> Iterator[Snapshot]:
    """A snapshot now and one per interval; the last one is finished. Raises WaitTimeout.

    Only the first look needs the database to be there: a night's wait outlasts its restarts.
    """
    deadline = None if timeout_seconds is None else time.monotonic() + timeout_seconds
    began = time.monotonic()
    snapshot = look(db, batch_id)
    pause = _pause(interval_seconds, began)
    yield snapshot
    while not snapshot.is_finished:
        _sleep(pause, deadline, batch_id, timeout_seconds)
        began = time.monotonic()
        try:
            with database.answering_within(math.inf if deadline is None else deadline - began):
                snapshot = look(db, batch_id)
        except (OperationalError, InterfaceError) as error:
            pause = min(pause * 2, max(LONGEST_PAUSE_SECONDS, interval_seconds))
            log.warning("watch.database_unavailable", error=str(error.orig)[:200])
            continue
        pause = _pause(interval_seconds, began)
        yield snapshot


def _pause(interval_seconds: float, began: float) -> float:
    """Longer for a huge batch: looking must not become work for the database."""
    return max(interval_seconds, IDLE_PER_LOOK * (time.monotonic() - began))


def _sleep(
    pause: float, deadline: float | None, batch_id: str, timeout_seconds: float | None
) -> None:
    if deadline is None or timeout_seconds is None:
        time.sleep(pause)
        return
    left = deadline - time.monotonic()
    if left <= 0:
        raise WaitTimeout(batch_id, timeout_seconds=timeout_seconds)
    time.sleep(min(pause, left))
