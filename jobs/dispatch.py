"""Feeds Redis with queued jobs, ends what is lost or too late. Any number of them may run."""

import hashlib
import itertools
import json
import math
import operator
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import structlog
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from jobs import (
    beat,
    broker,
    database,
    errors,
    lifecycle,
    orders,
    queries,
    retries,
    selection,
    settings,
)

log = structlog.get_logger()

P = ParamSpec("P")
R = TypeVar("R")

REST_SECONDS = 0.05  # between two looks however often a farm of thousands kicks; at least
MOST_REST_SECONDS = 1.0
REST = 4.0  # times what the look before it took
AGAIN_SECONDS = 30.0  # after the database failed
DEAF_SECONDS = 2.0  # while it listens for a kick, it hears that it should stop as late


@dataclass(frozen=True, kw_only=True)
class Tick:
    """What one look at the queue did."""

    sent: int = 0
    ended_attempts: int = 0
    stopped_jobs: int = 0
    broker_error: str | None = None


class Dispatcher:
    """Feeds Redis from the database. Holds no state that another dispatcher would miss.

    `after_look` is called after each look that went well.
    """

    def __init__(
        self,
        config: settings.Settings,
        *,
        db: database.Database,
        after_look: Callable[[], None] = lambda: None,
    ) -> None:
        self._config = config
        self._db = db
        self._after_look = after_look
        self._broker = broker.Broker(config)
        self._leases_count_from = 0.0
        self._seconds_at_broker = 0.0
        self._slow_seconds = config.lease_seconds / 6
        self._lock_seconds = self._slow_seconds / 4
        self._busy_until: dict[int, float] = {}
        self._passed_over: set[str] = set()
        self._budgets = retries.budgets(config)

    def tick(self) -> Tick:
        """End lost attempts and what is past its deadline, fill the windows.

        Each also when the one before it failed; the first error is raised at the end.
        """
        failures: list[DBAPIError] = []
        ended = self._or_later(self._end_lost, failures) or 0
        stopped = self._or_later(self._stop_batches, failures) or 0
        sent, broker_error = 0, None
        served: set[str] = set()
        try:
            with self._in_time():
                sent = self._fill_windows(served)
        except _DatabaseSilent:
            pass  # told; what was sent counts at the next look
        except broker.BrokerUnavailable as error:
            broker_error = str(error)
        self._or_later(lambda: self._mark_served(sorted(served)), failures)
        if failures:
            raise failures[0]
        return Tick(
            sent=sent,
            ended_attempts=ended,
            stopped_jobs=stopped,
            broker_error=broker_error,
        )

    def _or_later(self, part: Callable[[], R], failures: list[DBAPIError]) -> R | None:
        try:
            return part()
        except DBAPIError as error:
            failures.append(error)
            return None

    def run(self, stop: threading.Event) -> None:
        """Tick until told to stop: at once after a kick, else every `tick_seconds`."""
        sign, was_down = beat.of_dispatcher(self._config), False
        # Before us nobody may have heard what the workers had to say: the database was away, or we.
        self._pardon()
        while not stop.is_set():
            sign.touch()
            began = time.monotonic()
            try:
                tick = self.tick()
            except (DBAPIError, database.DatabaseUnavailable) as error:
                log.error("dispatch.database_unavailable", error=str(error)[:300])
                self._pardon()
                stop.wait(min(self._config.tick_seconds, AGAIN_SECONDS))
                continue
            self._after_look()
            if tick.sent or tick.ended_attempts or tick.stopped_jobs:
                log.info(
                    "dispatch.tick",
                    sent=tick.sent,
                    ended_attempts=tick.ended_attempts,
                    stopped_jobs=tick.stopped_jobs,
                )
            refusal = tick.broker_error
            if was_down and refusal is None and not tick.sent:
                refusal = self._broker.refusal()  # it may answer and yet take nothing
            if (refusal is not None) != was_down:
                was_down = not was_down
                report = log.warning if was_down else log.info
                report("broker.lost" if was_down else "broker.back", error=refusal)
            self._wait(stop, took=time.monotonic() - began)

    def _end_lost(self) -> int:
        """Not while the database is slow to answer, nor in the time of a lease after that."""
        ended = 0
        # What could not be ended leaves room for others each second time: a look is limited.
        passed_over, self._passed_over = self._passed_over, set()
        try:
            with self._in_time():
                if time.monotonic() < self._leases_count_from:
                    with self._db.reading() as session:
                        database.now(session)
                    return 0
                lost = self._db.write(lifecycle.lost_attempts, but_not=passed_over)
            self._spare(lost.busy)
            # Each batch on its own: one whose row is held for long keeps the others from nothing.
            for batch_id, ids in lost.by_batch.items():
                silent = [each for each in ids if each not in self._busy_until]
                if not silent:
                    continue
                with self._in_time():
                    found = self._unless_held_up(self._end_lost_in_time, silent)
                if found is None:
                    self._passed_over.add(batch_id)
                for attempt_id in found or ():
                    log.warning("attempt.lost", attempt_id=attempt_id)
                    ended += 1
        except _DatabaseSilent:
            pass
        return ended

    def _spare(self, busy: Collection[int]) -> None:
        """What is being written when a lease ends is as good as said, once it can be committed.

        The lease that it brings may be over by then: its worker has another one to say more.
        """
        now = time.monotonic()
        until = dict.fromkeys(busy, now + self._config.lease_seconds)
        self._busy_until = {k: v for k, v in self._busy_until.items() if v > now} | until

    def _end_lost_in_time(self, session: Session, ids: Sequence[int]) -> list[int]:
        """Rolled back if the database fell silent in the middle of it."""
        with self._in_time():
            return lifecycle.end_lost_attempts(session, budgets=self._budgets, ids=ids)

    def _mark_served(self, batch_ids: Sequence[str]) -> None:
        """Once they are sent; in transactions of their own, since claims hold rows of batches."""
        if not batch_ids:
            return
        if self._unless_held_up(selection.mark_served, batch_ids) is None and len(batch_ids) > 1:
            for batch_id in batch_ids:
                self._unless_held_up(selection.mark_served, [batch_id])

    def _unless_held_up(
        self, change: Callable[Concatenate[Session, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R | None:
        """None: somebody has held a row that it needs for long, or the rows themselves are to
        blame. It is tried at the next look, and keeps nothing else from being done.
        """

        def briefly(session: Session) -> R:
            if not self._db.is_sqlite:  # which has no locks of rows
                database.wait_briefly(session, self._lock_seconds)
            return change(session, *args, **kwargs)

        try:
            return self._db.write(briefly)
        except DBAPIError as error:
            if database.is_held_up(error):
                event = "dispatch.held_up"
            elif database.is_of_rows(error):
                event = "dispatch.batch_failed"
            else:
                raise
            log.warning(event, error=errors.first_line(error))
            return None

    @contextmanager
    def _in_time(self) -> Iterator[None]:
        began = time.monotonic() - self._seconds_at_broker
        yield
        if time.monotonic() - self._seconds_at_broker - began > self._slow_seconds:
            self._pardon()
            log.warning("dispatch.database_slow", leases_count_in=self._config.lease_seconds)
            raise _DatabaseSilent

    @contextmanager
    def _asking_broker(self) -> Iterator[None]:
        """While it keeps us waiting, the database answers others."""
        began = time.monotonic()
        try:
            yield
        finally:
            self._seconds_at_broker += time.monotonic() - began

    def _pardon(self) -> None:
        """Nobody could renew a lease meanwhile: silence says nothing about a worker."""
        self._leases_count_from = time.monotonic() + self._config.lease_seconds

    def _wait(self, stop: threading.Event, *, took: float) -> None:
        ended = time.monotonic()
        try:
            was_kicked = self._is_kicked(stop)
        except broker.BrokerUnavailable:
            stop.wait(self._config.tick_seconds)
            return
        rest = min(max(REST_SECONDS, REST * took), MOST_REST_SECONDS)
        if was_kicked:
            stop.wait(max(0.0, ended + rest - time.monotonic()))

    def _is_kicked(self, stop: threading.Event) -> bool:
        """Within a tick; False once told to stop."""
        turns = math.ceil(self._config.tick_seconds / DEAF_SECONDS)
        seconds = self._config.tick_seconds / turns
        return any(not stop.is_set() and self._broker.wait_for_kick(seconds) for _ in range(turns))

    def _fill_windows(self, served: set[str]) -> int:
        """How many were sent; their batches are added to `served`."""
        with self._db.reading() as session:
            groups = queries.live_workers_by_queues(session)
        sent = 0
        marks = {group: _mark(group) for group in groups}
        with self._asking_broker():
            in_queue = {queue: self._broker.lying(queue) for queue in set().union(*groups)}
        for group, number in groups.items():
            lying = [message for queue in group for message in in_queue[queue]]
            waiting = {message.subject for message in lying}
            for_others = set(marks.values()) - {marks[group]}
            own = _sent_for_us(lying, for_others)
            room = min(number * self._config.window - own, broker.MOST_READ - len(waiting))
            if room > 0:
                with self._db.reading() as session:
                    chosen = selection.choose(
                        session,
                        queues=group,
                        room=room,
                        waiting=waiting,
                        max_running_per_owner=self._config.max_running_per_owner,
                    )
                # Committed before sending: a worker may take the message up at once.
                taken = self._db.write(selection.take, chosen) if chosen else []
                served.update(job.batch_id for job in taken)
                for queue, jobs in itertools.groupby(taken, key=operator.attrgetter("queue")):
                    ids = [job.id for job in jobs]
                    with self._asking_broker():
                        sent += self._broker.send_renders(queue, ids, mark=marks[group])
                    in_queue[queue] += [broker.Message(each, marks[group]) for each in ids]
        return sent

    def _stop_batches(self) -> int:
        """Go on with what a cancel or a deadline left open, a few thousand jobs at a time."""
        with self._db.reading() as session:
            asked, overdue = queries.batches_to_stop(session)
        stopped = 0
        for batch_id in asked:
            stopped += (self._unless_held_up(orders.go_on_cancelling, batch_id) or (0, 0))[0]
        for batch_id in overdue:
            stopped += (self._unless_held_up(orders.expire_batch, batch_id) or (0, 0))[0]
        return stopped


def _sent_for_us(lying: Sequence[broker.Message], for_others: Collection[str]) -> int:
    """How many count for these workers' window: not those sent for others that share a queue.

    Else a backlog there would leave these workers' other queues empty.
    """
    return len({message.subject for message in lying if message.mark not in for_others})


def _mark(group: Sequence[str]) -> str:
    """Of workers that take from just these queues."""
    return hashlib.sha256(json.dumps(sorted(group)).encode()).hexdigest()[:8]


class _DatabaseSilent(Exception):
    """It answered, but so late that leases may have ended meanwhile."""
