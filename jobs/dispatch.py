"""Which queued jobs are sent now, and to which queue. Any number of dispatchers may run."""

import hashlib
import itertools
import json
import math
import operator
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Concatenate, ParamSpec, TypeVar

import structlog
from pydantic import ValidationError
from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from jobs import (
    broker,
    database,
    lifecycle,
    order,
    orders,
    presets,
    queries,
    retries,
    settings,
    states,
)
from jobs.schema import Attempt, Batch, Job, Look, Owner

log = structlog.get_logger()

P = ParamSpec("P")
R = TypeVar("R")

IN_FLIGHT_SECONDS = 5.0  # between leaving Redis and the claim in the database
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
    """Feeds Redis from the database. Holds no state that another dispatcher would miss."""

    def __init__(self, config: settings.Settings, *, db: database.Database) -> None:
        self._config = config
        self._db = db
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
        was_down = False
        # Before us nobody may have heard what the workers had to say: the database was away, or we.
        self._pardon()
        while not stop.is_set():
            began = time.monotonic()
            try:
                tick = self.tick()
            except (DBAPIError, database.DatabaseUnavailable) as error:
                log.error("dispatch.database_unavailable", error=str(error)[:300])
                self._pardon()
                stop.wait(min(self._config.tick_seconds, AGAIN_SECONDS))
                continue
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
        if self._unless_held_up(mark_served, batch_ids) is None and len(batch_ids) > 1:
            for batch_id in batch_ids:
                self._unless_held_up(mark_served, [batch_id])

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
            log.warning(event, error=str(error.orig).splitlines()[0])
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
                    chosen = choose(
                        session,
                        queues=group,
                        room=room,
                        waiting=waiting,
                        max_running_per_owner=self._config.max_running_per_owner,
                    )
                # Committed before sending: a worker may take the message up at once.
                taken = self._db.write(take, chosen) if chosen else []
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


def choose(
    session: Session,
    *,
    queues: Sequence[str],
    room: int,
    waiting: Iterable[int],
    max_running_per_owner: int | None = None,
) -> list[order.Candidate]:
    """The next jobs of these queues whose message is not under way, in the order of `jobs.order`.

    Reads only: a seek per open batch, then the first jobs of those whose turn it is.
    """
    now = database.now(session)
    under_way = list(waiting)
    lanes, boosts, waits = _lanes(session, queues, now)
    left = _left_of_quotas(session, under_way, max_running_per_owner)
    lanes = [lane for lane in lanes if left is None or left[lane.owner] > 0]
    rows: list[tuple[order.Lane, Any]] = []
    for lane, number in _next_lanes(lanes, waits, rows, room=room):
        found = _next_of(session, lane, number, now=now, under_way=under_way)
        rows += [(lane, row) for row in found]
    last_look = _look_sent_last(session, queues, under_way) if rows else None
    looks = {row.look_id for _, row in rows}
    weights = _weights_of(session, looks if last_look is None else looks | {last_look})
    candidates = [
        order.Candidate(
            id=row.id,
            batch_id=lane.batch_id,
            owner=lane.owner,
            queue=lane.queue,
            rank=row.rank - boosts[lane.batch_id],
            weights=weights[row.look_id],
        )
        for lane, row in rows
    ]
    running = None if last_look is None else weights[last_look]
    return list(
        itertools.islice(
            _within_quotas(order.arrange(candidates, waits, running=running), left), room
        )
    )


def take(session: Session, chosen: Sequence[order.Candidate]) -> list[order.Candidate]:
    """Mark them as sent; those of them that no other dispatcher was faster with."""
    now = database.now(session)
    free = session.scalars(
        select(Job.id)
        .where(Job.id.in_([job.id for job in chosen]), *_can_be_sent(now))
        .order_by(Job.batch_id, Job.id)
        .with_for_update(skip_locked=True)
    ).all()
    taken = [job for job in chosen if job.id in set(free)]
    session.execute(update(Job).where(Job.id.in_(free)).values(dispatched_at=now))
    # Those that a submit holds, to count its quota, are passed over rather than waited for.
    owners = (
        select(Owner.name)
        .where(Owner.name.in_({job.owner for job in taken}))
        .order_by(Owner.name)
        .with_for_update(skip_locked=True)
    )
    names = session.scalars(owners).all()
    session.execute(update(Owner).where(Owner.name.in_(names)).values(served_at=now))
    return taken


def mark_served(session: Session, batch_ids: Sequence[str]) -> bool:
    """They have had their turn. Always true."""
    which = Batch.id.in_(batch_ids)
    # In order: two dispatchers wait for each other, not in a circle.
    session.scalars(select(Batch.id).where(which).order_by(Batch.id).with_for_update()).all()
    session.execute(update(Batch).where(which).values(served_at=database.now(session)))
    return True


def _lanes(
    session: Session, queues: Sequence[str], now: datetime
) -> tuple[list[order.Lane], dict[str, int], order.Waits]:
    """Of every open batch: what waits in each of these queues; boosts by batch; who waited."""
    ranks = [
        select(func.min(Job.rank))
        .where(Job.state == states.JobState.QUEUED)
        .where(Job.batch_id == Batch.id, Job.queue == queue)
        .scalar_subquery()
        for queue in queues
    ]
    rows = session.execute(
        select(
            Batch.id,
            Batch.owner,
            Batch.boost,
            func.coalesce(Batch.served_at, Batch.created_at).label("served_at"),
            Owner.served_at.label("owner_served_at"),
            *ranks,
        )
        .outerjoin(Owner, Owner.name == Batch.owner)
        .where(*lifecycle.is_open(now))
    ).all()
    lanes = [
        order.Lane(batch_id=row.id, owner=row.owner, queue=queue, rank=rank - row.boost)
        for row in rows
        for queue, rank in zip(queues, row[5:], strict=True)
        if rank is not None
    ]
    batches = {row.id: (now - row.served_at).total_seconds() for row in rows}
    owners: dict[str, float] = {}
    for row in rows:
        served_at = row.owner_served_at
        waited = batches[row.id] if served_at is None else (now - served_at).total_seconds()
        owners[row.owner] = max(owners.get(row.owner, waited), waited)
    boosts = {row.id: row.boost for row in rows}
    return lanes, boosts, order.Waits(owners=owners, batches=batches)


def _next_lanes(
    lanes: Sequence[order.Lane],
    waits: order.Waits,
    rows: Sequence[tuple[order.Lane, Any]],
    *,
    room: int,
) -> Iterator[tuple[order.Lane, int]]:
    """Lanes to read from and how many jobs of each, until `rows` holds enough of the first rank."""
    enough = order.LOOK_AHEAD + room
    by_rank = sorted(lanes, key=lambda lane: lane.rank)
    for _, equals in itertools.groupby(by_rank, key=lambda lane: lane.rank):
        unread = list(equals)
        began = len(rows)
        while unread and len(rows) - began < enough:
            turn = order.shares(unread, waits, number=enough)
            yield from turn.items()
            # Others come into it when these have jobs that wait for a retry, or are under way.
            unread = [lane for lane in unread if lane not in turn]
        if len(rows) >= room:
            return


def _next_of(
    session: Session, lane: order.Lane, number: int, *, now: datetime, under_way: Sequence[int]
) -> Sequence[Any]:
    return session.execute(
        select(Job.id, Job.rank, Job.look_id)
        .where(Job.batch_id == lane.batch_id, Job.queue == lane.queue, *_can_be_sent(now))
        .where(~database.among(session, Job.id, under_way))
        .order_by(Job.rank, Job.id)
        .limit(number)
    ).all()


def _can_be_sent(now: datetime) -> list[ColumnElement[bool]]:
    lost_before = now - timedelta(seconds=IN_FLIGHT_SECONDS)
    return [
        Job.state == states.JobState.QUEUED,
        or_(Job.not_before.is_(None), Job.not_before <= now),
        or_(Job.dispatched_at.is_(None), Job.dispatched_at < lost_before),
    ]


def _left_of_quotas(
    session: Session, under_way: Sequence[int], most: int | None
) -> dict[str, int] | None:
    """Owner -> jobs that may be sent; owners without running jobs are left out. None: no quota."""
    if most is None:
        return None
    left = {owner: most - number for owner, number in queries.running_by_owner(session).items()}
    sent = session.execute(
        select(Batch.owner, func.count())
        .join(Job, Job.batch_id == Batch.id)
        .where(database.among(session, Job.id, under_way), Job.state == states.JobState.QUEUED)
        .group_by(Batch.owner)
    )
    for owner, number in sent:
        left[owner] = left.get(owner, most) - number
    return defaultdict(lambda: most, left)


def _within_quotas(
    jobs: Iterable[order.Candidate], left: dict[str, int] | None
) -> Iterator[order.Candidate]:
    for job in jobs:
        if left is not None:
            if left[job.owner] <= 0:
                continue
            left[job.owner] -= 1
        yield job


def _look_sent_last(
    session: Session, queues: Sequence[str], under_way: Sequence[int]
) -> str | None:
    """Of what will be next; if nothing is under way, of what was begun last."""
    sent = select(Job.look_id).where(
        database.among(session, Job.id, under_way), Job.state == states.JobState.QUEUED
    )
    last = session.scalar(sent.order_by(Job.dispatched_at.desc().nulls_last()).limit(1))
    if last is not None:
        return last
    running = (
        select(Job.look_id)
        .join(Attempt, Attempt.job_id == Job.id)
        .where(Attempt.state == states.AttemptState.RUNNING, Job.queue.in_(queues))
    )
    # By a column without an index: else PostgreSQL goes back through every attempt there ever was
    # instead of taking the few live ones from theirs.
    return session.scalar(running.order_by(Attempt.started_at.desc()).limit(1))


def _weights_of(session: Session, look_ids: Iterable[str]) -> dict[str, str]:
    bodies = session.execute(select(Look.id, Look.body).where(Look.id.in_(look_ids)))
    return {look_id: _weights(look_id, body) for look_id, body in bodies}


def _weights(look_id: str, body: dict[str, Any]) -> str:
    try:
        return presets.Look.model_validate(body).weights
    except ValidationError:
        return look_id  # of a newer version: no matter here, its worker may know it
