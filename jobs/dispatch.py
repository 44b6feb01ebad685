"""Which queued jobs are sent now, and to which queue. Any number of dispatchers may run."""

import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

import structlog
from sqlalchemy import or_, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from jobs import (
    broker,
    database,
    errors,
    lifecycle,
    queries,
    results,
    retries,
    settings,
    states,
    storage,
)
from jobs.schema import Batch, Job

log = structlog.get_logger()

IN_FLIGHT_SECONDS = 5.0  # between leaving Redis and the claim in the database
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
        self._budgets = budgets(config)

    def tick(self) -> Tick:
        """End lost attempts, write the result files of finished batches, fill the windows."""
        ended = self._db.write(lifecycle.end_lost_attempts, budgets=self._budgets)
        for attempt_id in ended:
            log.warning("attempt.lost", attempt_id=attempt_id)
        sent, broker_error = 0, None
        try:
            sent = self._fill_windows()
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

    def _wait(self, stop: threading.Event) -> None:
        try:
            self._broker.wait_for_kick(self._config.tick_seconds)
        except broker.BrokerUnavailable:
            stop.wait(self._config.tick_seconds)

    def _fill_windows(self) -> int:
        with self._db.reading() as session:
            workers = queries.live_workers_by_queue(session)
        sent = 0
        for queue, number in workers.items():
            waiting = self._broker.waiting(queue)
            room = min(number * self._config.window, broker.MOST_READ) - len(waiting)
            if room > 0:
                chosen = self._db.write(choose, queue=queue, room=room, waiting=waiting)
                # Committed before sending: a worker may take the message up at once.
                sent += self._broker.send_renders(queue, chosen)
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


def choose(session: Session, *, queue: str, room: int, waiting: Iterable[int]) -> list[int]:
    """The next jobs of this queue whose message is not under way; marks them as sent."""
    now = database.now(session)
    lost_before = now - timedelta(seconds=IN_FLIGHT_SECONDS)
    chosen = session.scalars(
        select(Job.id)
        .where(Job.state == states.JobState.QUEUED, Job.queue == queue)
        .where(or_(Job.not_before.is_(None), Job.not_before <= now))
        .where(or_(Job.dispatched_at.is_(None), Job.dispatched_at < lost_before))
        .where(Job.id.not_in(list(waiting)))
        .order_by(Job.rank, Job.id)
        .limit(room)
        .with_for_update(skip_locked=True)
    ).all()
    if chosen:
        session.execute(update(Job).where(Job.id.in_(chosen)).values(dispatched_at=now))
    return list(chosen)


def budgets(config: settings.Settings) -> retries.Budgets:
    return retries.Budgets(
        max_errors=config.max_errors,
        max_crashes=config.max_crashes,
        retry_seconds=config.retry_seconds,
    )
