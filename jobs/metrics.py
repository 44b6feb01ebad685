"""The farm in numbers for Prometheus, read from the database at each scrape.

Nothing is counted in a process of ours, so no restart and no forked child loses a count, and every
web service tells the same. Attempts never change once they have ended: sums over the old ones are
kept, and a scrape reads the new ones. When `rushes gc` deletes attempts their totals stay in the
database, and what is left is added up again.
"""

import importlib.metadata
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs import database, queries, retries, schema, states, totals
from jobs.schema import Attempt, Batch, Firing, Job, Notice

LATECOMERS = 2_000
"""The newest attempts are read each time: a claim may commit after one with a higher id."""
LOST, FAILED = states.AttemptState.LOST.value, states.AttemptState.FAILED.value
NO_FAILURES = {
    (LOST if kind in retries.CRASHES else FAILED, kind.value): 0 for kind in states.FailureKind
}
"""Told before there are any: Prometheus sees no increase in a series that begins with its first."""


class Farm(Collector):
    """What a scrape is answered with. Safe to ask from several threads."""

    def __init__(self, db: database.Database) -> None:
        self._db = db
        self._settled_to = 0
        self._settled: totals.Totals = Counter()
        self._past: totals.Totals = Counter()
        self._lock = threading.Lock()

    def collect(self) -> Iterator[Metric]:
        """Raises what the database raises: no numbers are better than wrong ones."""
        with self._db.snapshot() as session:
            past = totals.past(session)
            yield from _build()
            yield from _jobs(session)
            yield from _queues(session)
            yield from _attempts_now(session)
            yield from _workers(session)
            yield from _firings(session, past)
            yield from _notices(session)
            yield from _attempts_ever(past + self._attempts_left(session, past))

    def _attempts_left(self, session: Session, past: totals.Totals) -> totals.Totals:
        with self._lock:
            if past != self._past:  # some that are in our sums may be in theirs by now
                self._settled_to, self._settled, self._past = 0, Counter(), past
            newest = session.scalar(select(func.max(Attempt.id))) or 0
            live = session.scalars(select(Attempt.id).where(schema.IS_LIVE))
            oldest_live = min(live, default=None)
            before_late = queries.attempt_before_newest(session, LATECOMERS)
            settled_to = max(min(before_late, (oldest_live or newest) - 1), 0)
            if settled_to > self._settled_to:
                self._settled += _between(session, after=self._settled_to, until=settled_to)
                self._settled_to = settled_to
            return self._settled + _between(session, after=self._settled_to, until=newest)


class Registry:
    """Prometheus's text form of one farm."""

    def __init__(self, db: database.Database) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(Farm(db))

    def text(self) -> bytes:
        return generate_latest(self._registry)


def _gauge(name: str, about: str, values: Mapping[Any, float], *labels: str) -> Metric:
    family = GaugeMetricFamily(f"rushes_{name}", about, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _counter(name: str, about: str, values: Mapping[Any, float], *labels: str) -> Metric:
    family = CounterMetricFamily(f"rushes_{name}", about, labels=labels)
    for key, value in values.items():
        family.add_metric(key, value)
    return family


def _build() -> Iterator[Metric]:
    version = importlib.metadata.version("rushes")
    yield _gauge("build_info", "The version of rushes.", {(version,): 1}, "version")


def _jobs(session: Session) -> Iterator[Metric]:
    names = [state.value for state in states.JobState]
    counts = session.execute(select(*(func.sum(getattr(Batch, name)) for name in names))).one()
    jobs = {(name,): int(count or 0) for name, count in zip(names, counts, strict=True)}
    yield _gauge("jobs", "Jobs by state.", jobs, "state")
    unfinished = session.scalars(select(Batch).where(Batch.finished_at.is_(None))).all()
    batches = Counter((batch.state.value,) for batch in unfinished)
    yield _gauge("batches_open", "Unfinished batches by state.", batches, "state")
    unwritten = select(func.count()).select_from(Batch)
    unwritten = unwritten.where(Batch.finished_at.is_not(None), Batch.manifest_at.is_(None))
    about = "Finished batches whose result files are not written yet."
    yield _gauge("batches_without_results", about, {(): session.scalar(unwritten) or 0})


def _queues(session: Session) -> Iterator[Metric]:
    # A batch has one preset, so one model, so one queue: a seek for each, however many its jobs.
    queue = (
        select(func.min(Job.queue))
        .where(Job.batch_id == Batch.id, Job.state == states.JobState.QUEUED)
        .scalar_subquery()
    )
    # As the scaler of deploy/kubernetes counts: nobody waits for a worker in the others.
    waiting = select(queue, Batch.queued).where(
        Batch.finished_at.is_(None),
        Batch.queued > 0,
        Batch.paused_at.is_(None),
        Batch.cancel_requested_at.is_(None),
    )
    depth: Counter[tuple[str, ...]] = Counter()
    for name, queued in session.execute(waiting):
        depth[name or "",] += queued
    about = "Queued jobs by queue, but for those of paused and cancelled batches."
    yield _gauge("queue_jobs", about, depth, "queue")
    served = {(name,): n for name, n in queries.live_workers_by_queue(session).items()}
    yield _gauge("queue_workers", "Live workers that take from a queue.", served, "queue")


def _attempts_now(session: Session) -> Iterator[Metric]:
    now = database.now(session)
    by_stage = session.execute(
        select(Attempt.stage, func.count())
        .where(Attempt.state == states.AttemptState.RUNNING, schema.IS_LIVE)
        .group_by(Attempt.stage)
    ).all()
    running = {(stage or "start",): float(number) for stage, number in by_stage}
    yield _gauge("attempts_running", "What is rendered now, by stage.", running, "stage")
    backlog, oldest = session.execute(
        select(func.count(), func.min(Attempt.started_at)).where(
            Attempt.state == states.AttemptState.RENDERED, schema.IS_LIVE
        )
    ).one()
    yield _gauge("uploads_waiting", "Finished videos that wait for the store.", {(): backlog})
    about = "Since the attempt of the longest waiting one began."
    yield _gauge("uploads_oldest_seconds", about, {(): _age(now, oldest)})


def _age(now: datetime, then: datetime | None) -> float:
    return 0.0 if then is None else max((now - then).total_seconds(), 0.0)


def _workers(session: Session) -> Iterator[Metric]:
    live = queries.live_workers(session)
    counted = Counter(
        ("silent" if not each.is_alive else "refuses" if each.refusals else "alive",)
        for each in live
    )
    by_state = {(state,): counted[state,] for state in ("alive", "refuses", "silent")}
    yield _gauge("workers", "Workers that have not stopped, by state.", by_state, "state")
    busy = sum(each.is_alive and each.attempt is not None for each in live)
    yield _gauge("workers_busy", "Live workers that render.", {(): busy})
    about = "Of a worker's process, since its launcher began."
    restarts = {(each.worker.name,): float(each.worker.restarts) for each in live}
    yield _gauge("worker_restarts", about, restarts, "worker")
    used = {(each.worker.name,): float(each.worker.device_used_bytes or 0) for each in live}
    yield _gauge("worker_device_used_bytes", "Device memory in use.", used, "worker")
    there = {(each.worker.name,): float(each.worker.memory_bytes or 0) for each in live}
    yield _gauge("worker_device_bytes", "Device memory there is.", there, "worker")


def _firings(session: Session, past: totals.Totals) -> Iterator[Metric]:
    counted = session.execute(select(Firing.state, func.count()).group_by(Firing.state)).all()
    names = [state.value for state in states.FiringState]
    firings = {(name,): past[name, "", totals.FIRINGS] for name in names}
    for state, number in counted:
        firings[state.value,] += number
    yield _counter("schedule_firings", "Fire times of schedules, by outcome.", firings, "state")


def _notices(session: Session) -> Iterator[Metric]:
    ended = select(
        func.count(Notice.next_try_at),
        func.count(Notice.delivered_at),
        func.count(Notice.given_up_at),
    )
    numbers = session.execute(ended).one()
    names = ("waits", "delivered", "given_up")
    notices = {(name,): float(number) for name, number in zip(names, numbers, strict=True)}
    yield _gauge("notices", "Events for others to be told of, by state.", notices, "state")


def _between(session: Session, *, after: int, until: int) -> totals.Totals:
    """Over the attempts with these ids."""
    return totals.of_attempts(session, (Attempt.id > after) & (Attempt.id <= until))


def _attempts_ever(found: totals.Totals) -> Iterator[Metric]:
    claims, succeeded = Counter[str](), Counter[str]()
    ended, stages = Counter[tuple[str, ...]](NO_FAILURES), Counter[tuple[str, ...]]()
    for (state, kind, name), value in found.items():
        if name == "count":
            claims["all"] += value
            if state not in states.LIVE_ATTEMPT_STATES:
                ended[state, kind] += value
        elif name.startswith("stage:"):
            stages[name.removeprefix("stage:"),] += value
        if state == states.AttemptState.SUCCEEDED:
            succeeded[name] += value
    yield _counter("claims", "Attempts that began.", {(): claims["all"]})
    about = "Attempts that ended; `kind` says what failed."
    yield _counter("attempts", about, ended, "state", "kind")
    seconds = {stage: milliseconds / 1000 for stage, milliseconds in stages.items()}
    yield _counter("stage_seconds", "Time spent in a stage of rendering.", seconds, "stage")
    buckets = [(str(float(edge)), float(succeeded[f"le:{edge}"])) for edge in totals.BUCKETS]
    yield HistogramMetricFamily(
        "rushes_attempt_seconds",
        "From the claim to the verified upload, of attempts that succeeded.",
        buckets=[*buckets, ("+Inf", float(succeeded["count"]))],
        sum_value=succeeded["milliseconds"] / 1000,
    )
