"""Which queued jobs are sent now, and to which queue. Any number of dispatchers may run."""

import itertools
import operator
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import structlog
from sqlalchemy import or_, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from jobs import (
    broker,
    database,
    errors,
    lifecycle,
    presets,
    queries,
    results,
    retries,
    settings,
    states,
    storage,
)
from jobs.schema import Attempt, Batch, Job, Look

log = structlog.get_logger()

IN_FLIGHT_SECONDS = 5.0  # between leaving Redis and the claim in the database
LOOK_AHEAD = 32  # jobs that may be looked at for weights that are loaded already
OVERTAKEN_BY = 4 * LOOK_AHEAD  # ids; then it is a job's turn, whatever is loaded
AGAIN_SECONDS = 30.0  # after the database or the object store failed


@dataclass(frozen=True, kw_only=True)
class Tick:
    """What one look at the queue did."""

    sent: int = 0
    ended_attempts: int = 0
    finished_batches: int = 0
    broker_error: str | None = None


class Dispatcher:
    """Feeds Redis from the database. Holds no state that another dispatcher would miss."""

    def __init__(self, config: settings.Settings, *, db: database.Database) -> None:
        self._config = config
        self._db = db
        self._broker = broker.Broker(config)
        self._store: storage.ObjectStore | None = None
        self._store_again_at = 0.0
        self._leases_count_from = 0.0
        self._slow_seconds = config.lease_seconds / 6
        self._budgets = budgets(config)

    def tick(self) -> Tick:
        """End lost attempts, write the result files of finished batches, fill the windows."""
        ended = self._end_lost()
        for attempt_id in ended:
            log.warning("attempt.lost", attempt_id=attempt_id)
        sent, broker_error = 0, None
        try:
            with self._in_time():
                sent = self._fill_windows()
        except _DatabaseSilent:
            log.warning("dispatch.database_slow", leases_count_in=self._config.lease_seconds)
        except broker.BrokerUnavailable as error:
            broker_error = str(error)
        return Tick(
            sent=sent,
            ended_attempts=len(ended),
            finished_batches=self._finish_batches(),
            broker_error=broker_error,
        )

    def run(self, stop: threading.Event) -> None:
        """Tick until told to stop: at once after a kick, else every `tick_seconds`."""
        was_down = False
        while not stop.is_set():
            try:
                tick = self.tick()
            except (DBAPIError, database.DatabaseUnavailable) as error:
                log.error("dispatch.database_unavailable", error=str(error)[:300])
                self._pardon()
                stop.wait(min(self._config.tick_seconds, AGAIN_SECONDS))
                continue
            if tick.sent or tick.ended_attempts or tick.finished_batches:
                log.info(
                    "dispatch.tick",
                    sent=tick.sent,
                    ended_attempts=tick.ended_attempts,
                    finished_batches=tick.finished_batches,
                )
            if (tick.broker_error is not None) != was_down:
                was_down = not was_down
                report = log.warning if was_down else log.info
                report("broker.lost" if was_down else "broker.back", error=tick.broker_error)
            self._wait(stop)

    def _end_lost(self) -> list[int]:
        """Not while the database is slow to answer, nor in the time of a lease after that."""
        try:
            with self._in_time():
                if time.monotonic() < self._leases_count_from:
                    with self._db.reading() as session:
                        database.now(session)
                    return []
                return self._db.write(self._end_lost_in_time)
        except _DatabaseSilent:
            log.warning("dispatch.database_slow", leases_count_in=self._config.lease_seconds)
            return []

    def _end_lost_in_time(self, session: Session) -> list[int]:
        """Rolled back if the database fell silent in the middle of it."""
        with self._in_time():
            return lifecycle.end_lost_attempts(session, budgets=self._budgets)

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        began = time.monotonic()
        yield
        if time.monotonic() - began > self._slow_seconds:
            self._pardon()
            raise _DatabaseSilent

    def _pardon(self) -> None:
        """Nobody could renew a lease meanwhile: silence says nothing about a worker."""
        self._leases_count_from = time.monotonic() + self._config.lease_seconds

    def _wait(self, stop: threading.Event) -> None:
        try:
            self._broker.wait_for_kick(self._config.tick_seconds)
        except broker.BrokerUnavailable:
            stop.wait(self._config.tick_seconds)

    def _fill_windows(self) -> int:
        with self._db.reading() as session:
            groups = queries.live_workers_by_queues(session)
        sent = 0
        for group, number in groups.items():
            waiting = set().union(*(self._broker.waiting(queue) for queue in group))
            room = min(number * self._config.window, broker.MOST_READ) - len(waiting)
            if room > 0:
                chosen = self._db.write(choose, queues=group, room=room, waiting=waiting)
                # Committed before sending: a worker may take the message up at once.
                for queue, jobs in itertools.groupby(chosen, key=operator.attrgetter("queue")):
                    sent += self._broker.send_renders(queue, [job.id for job in jobs])
        return sent

    def _finish_batches(self) -> int:
        if time.monotonic() < self._store_again_at:
            return 0
        with self._db.reading() as session:
            finished = session.scalars(
                select(Batch.id)
                .where(Batch.finished_at.is_not(None), Batch.manifest_at.is_(None))
                .order_by(Batch.finished_at)
            ).all()
        written = 0
        for batch_id in finished:
            try:
                self._store = self._store or storage.open_store(self._config)
                written += results.write(self._db, self._store, batch_id)
            except (errors.RushesError, OSError) as error:
                # The videos themselves are there already.
                log.warning("batch.manifest_delayed", batch_id=batch_id, error=str(error))
                self._store_again_at = time.monotonic() + AGAIN_SECONDS
                if isinstance(error, storage.StorageUnavailable):
                    # Waiting for an answer once is enough: other batches want their jobs sent.
                    break
        return written


class _DatabaseSilent(Exception):
    """It answered, but so late that leases may have ended meanwhile."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A job that may be sent now."""

    id: int
    queue: str
    rank: int
    weights: str
    """What its worker must have loaded; equal for jobs that need no switch between them."""


def choose(
    session: Session, *, queues: Sequence[str], room: int, waiting: Iterable[int]
) -> list[Candidate]:
    """The next jobs of these queues whose message is not under way; marks them as sent.

    By priority, then jobs for the weights that are in use already, then in order of submit. Only
    the next LOOK_AHEAD jobs are looked at, and nobody is overtaken by more than OVERTAKEN_BY.
    """
    now = database.now(session)
    under_way = list(waiting)
    rows = [
        row
        for queue in queues
        for row in _next_of(session, queue, LOOK_AHEAD + room, now=now, under_way=under_way)
    ]
    rows.sort(key=lambda row: (row.rank, row.id))
    del rows[LOOK_AHEAD + room :]
    in_use = _looks_in_use(session, queues, under_way)
    weights = _weights_of(session, {row.look_id for row in rows} | in_use)
    warm = {weights[look_id] for look_id in in_use}
    chosen = in_runs([_candidate(row, weights) for row in rows], warm)[:room]
    if chosen:
        ids = [job.id for job in chosen]
        session.execute(update(Job).where(Job.id.in_(ids)).values(dispatched_at=now))
    return chosen


def in_runs(candidates: Sequence[Candidate], warm: Set[str]) -> list[Candidate]:
    """By priority; within one, what needs no switch first, then each kind of weights in a run."""
    first_seen: dict[str, int] = {}
    for job in candidates:
        first_seen.setdefault(job.weights, len(first_seen))
    newest = max((job.id for job in candidates), default=0)

    def place(job: Candidate) -> tuple[int, bool, bool, int, int]:
        was_overtaken = newest - job.id > OVERTAKEN_BY
        return (
            job.rank,
            not was_overtaken,
            job.weights not in warm,
            first_seen[job.weights],
            job.id,
        )

    return sorted(candidates, key=place)


def _next_of(
    session: Session, queue: str, number: int, *, now: datetime, under_way: Sequence[int]
) -> Sequence[Any]:
    """From one queue at a time: so the index gives them in order."""
    lost_before = now - timedelta(seconds=IN_FLIGHT_SECONDS)
    return session.execute(
        select(Job.id, Job.queue, Job.rank, Job.look_id)
        .where(Job.state == states.JobState.QUEUED, Job.queue == queue)
        .where(or_(Job.not_before.is_(None), Job.not_before <= now))
        .where(or_(Job.dispatched_at.is_(None), Job.dispatched_at < lost_before))
        .where(Job.id.not_in(under_way))
        .order_by(Job.rank, Job.id)
        .limit(number)
        .with_for_update(skip_locked=True)
    ).all()


def _looks_in_use(session: Session, queues: Sequence[str], under_way: Sequence[int]) -> set[str]:
    """Of what is rendered now or will be next."""
    running = (
        select(Job.look_id)
        .join(Attempt, Attempt.job_id == Job.id)  # the few live attempts have an index of their own
        .where(Attempt.state == states.AttemptState.RUNNING, Job.queue.in_(queues))
    )
    sent = select(Job.look_id).where(Job.id.in_(under_way), Job.state == states.JobState.QUEUED)
    return set(session.scalars(running.union(sent)))


def _weights_of(session: Session, look_ids: Set[str]) -> dict[str, str]:
    bodies = session.execute(select(Look.id, Look.body).where(Look.id.in_(look_ids)))
    return {look_id: presets.Look.model_validate(body).weights for look_id, body in bodies}


def _candidate(row: Any, weights: Mapping[str, str]) -> Candidate:
    return Candidate(id=row.id, queue=row.queue, rank=row.rank, weights=weights[row.look_id])


def budgets(config: settings.Settings) -> retries.Budgets:
    return retries.Budgets(
        max_errors=config.max_errors,
        max_crashes=config.max_crashes,
        retry_seconds=config.retry_seconds,
    )
