"""The register of render processes: kept by their launchers, filled in by themselves."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import bindparam, delete, func, or_, select, update
from sqlalchemy.orm import Session

from jobs import database, errors, reports, retries, schema, states
from jobs.schema import Attempt, Refusal, Worker

MIN_FREE_BYTES = 64 << 20  # with less on its scratch disk, a few videos, a worker takes no jobs
ALIVE_SECONDS = 30.0  # three missed beats of the launcher
BEAT_SECONDS = 10.0
FIRST_REFUSAL_SECONDS = 30.0
ALL_QUEUES = ""


class NameTaken(errors.RushesError):
    """Another launcher that is alive has workers of this name."""

    def __init__(self, name: str, launcher: str | None) -> None:
        self.name = name
        self.launcher = launcher
        super().__init__(
            f"{name} is run by another `rushes worker` or `rushes up`"
            + (f" ({launcher})" if launcher else "")
            + ": stop that one, or give this one another RUSHES_HOST"
        )


class NotForgotten(errors.RushesError):
    """A worker that is still counted on; its row stays."""


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What a launcher knows about one of its processes."""

    name: str
    host: str
    device: str
    memory_bytes: int | None
    queues: tuple[str, ...]
    version: str
    pid: int
    restarts: int
    launcher: str
    """The same for those launchers only that can not run at once."""


@dataclass(frozen=True, kw_only=True)
class Held:
    """A name that another launcher has, and when that one was last seen."""

    name: str
    launcher: str | None
    """None: of a version that did not say."""
    seen_at: datetime


def take_names(session: Session, registrations: Sequence[Registration]) -> Held | None:
    """Register all of them, or none and say who holds the first that is not free.

    What they refused before counts no more, but for what needs a test: a person may have mended it.
    """
    for registration in registrations:
        held = _held(session, registration)
        if held is not None:
            return held
    for registration in registrations:
        _enter(session, registration)
        ask_again(session, registration.name)
    return None


def ask_again(session: Session, name: str) -> bool:
    """End what it refuses for a while. False: nothing, or only what needs a test."""
    ended = delete(Refusal).where(Refusal.worker == name, Refusal.needs_test.is_(False))
    return bool(session.execute(ended.returning(Refusal.queue)).all())


def register(session: Session, registration: Registration) -> bool:
    """Make or renew the row of a worker; also its heartbeat. False: another launcher has it."""
    if _renew(session, registration):
        return True
    if _held(session, registration) is not None:
        return False
    _enter(session, registration)
    return True


def _renew(session: Session, registration: Registration) -> bool:
    """In one statement, as almost every beat finds the row as the last one left it."""
    return session.scalar(_RENEWED, _new(_facts(registration))) is not None


def _new(values: dict[str, Any]) -> dict[str, Any]:
    return {f"new_{name}": value for name, value in values.items()}


_RENEWED = (
    update(Worker)
    .where(Worker.name == bindparam("new_name"), Worker.launcher == bindparam("new_launcher"))
    .where(Worker.pid == bindparam("new_pid"), Worker.stopped_at.is_(None))
    .values({field.name: bindparam(f"new_{field.name}") for field in fields(Registration)})
    .values(heartbeat_at=database.Clock())
    .returning(Worker.pid)
    .execution_options(synchronize_session=False)
)


def _enter(session: Session, registration: Registration) -> None:
    now = database.now(session)
    row = session.get(Worker, registration.name)
    is_new = row is None or row.stopped_at is not None or row.pid != registration.pid
    session.merge(
        Worker(
            **_facts(registration),
            started_at=now if row is None or is_new else row.started_at,
            heartbeat_at=now,
            stopped_at=None,
        )
    )


def _facts(registration: Registration) -> dict[str, Any]:
    return asdict(registration) | {"queues": list(registration.queues)}


def _held(session: Session, registration: Registration) -> Held | None:
    row = session.get(Worker, registration.name, with_for_update=True)
    if row is None or row.launcher == registration.launcher:
        return None
    now = database.now(session)
    if row.stopped_at is None:
        is_there = row.heartbeat_at >= now - timedelta(seconds=ALIVE_SECONDS)
    else:
        is_there = _renders(session, row.name, now)
    return (
        Held(name=row.name, launcher=row.launcher, seen_at=row.heartbeat_at) if is_there else None
    )


def _renders(session: Session, name: str, now: datetime) -> bool:
    """A launcher that has been told to stop lets its jobs end."""
    live = select(Attempt.id).where(
        Attempt.worker == name,
        Attempt.state == states.AttemptState.RUNNING,
        Attempt.lease_until >= now,
    )
    return session.scalar(live.limit(1)) is not None


def stopped(session: Session, names: Sequence[str], *, launcher: str) -> None:
    """Their processes end, perhaps after the job that they have, and will not come back."""
    which = Worker.name.in_(names) & (Worker.launcher == launcher)
    session.scalars(select(Worker.name).where(which).order_by(Worker.name).with_for_update()).all()
    session.execute(update(Worker).where(which).values(stopped_at=database.now(session)))


def forget(session: Session, name: str) -> bool:
    """Delete the row of a silent one. False: there is none; NotForgotten: it is needed yet.

    Should it come back after all, it registers anew, and a test that it owed is still due.
    """
    row = session.get(Worker, name, with_for_update=True)
    if row is None or row.stopped_at is not None:
        return False
    seconds = (database.now(session) - row.heartbeat_at).total_seconds()
    if seconds <= ALIVE_SECONDS:
        raise NotForgotten(
            f"{name} was seen {max(seconds, 0):.0f} s ago: only silent ones can be forgotten. Stop "
            "`rushes worker` on its host, and it is off the list"
        )
    live = Attempt.worker == name, schema.IS_LIVE
    if held := session.scalar(select(func.count()).where(*live)):
        raise NotForgotten(
            f"{name} still holds jobs ({held}): what it rendered goes back when its lease ends, "
            "a finished video counts as lost after RUSHES_PUBLISH_LEASE_SECONDS. Try again then"
        )
    session.delete(row)
    return True


def report(session: Session, name: str, told: reports.Report) -> None:
    """What the render process holds and has done; its launcher has made the row."""
    values = {**asdict(told), "resident": [asdict(model) for model in told.resident]}
    session.execute(_REPORTED, _new(values) | {"of": name})


_REPORTED = (
    update(Worker)
    .where(Worker.name == bindparam("of"))
    .values({field.name: bindparam(f"new_{field.name}") for field in fields(reports.Report)})
    .execution_options(synchronize_session=False)
)


def refuse(
    session: Session, name: str, *, queue: str, kind: states.FailureKind, reason: str
) -> float:
    """This worker takes nothing of a queue (ALL_QUEUES: of any) for so many seconds.

    Each time in a row for twice as long, until `accept`. One that is taken out stays so, and
    messages that arrive while it refuses make it no longer.
    """
    now = database.now(session)
    row = session.get(Refusal, (name, queue), with_for_update=True)
    if row is not None and row.until > now and not row.needs_test:
        return (row.until - now).total_seconds()
    times = 1 if row is None else row.times + 1
    seconds = wait_seconds(times)
    if row is not None and row.needs_test:
        return seconds
    session.merge(
        Refusal(
            worker=name,
            queue=queue,
            kind=kind,
            reason=database.storable(reason),
            times=times,
            since=now if row is None else row.since,
            until=now + timedelta(seconds=seconds),
        )
    )
    return seconds


def accept(session: Session, name: str, *, queue: str) -> None:
    """It has rendered a job of this queue: what was wrong is over, but for what needs a test."""
    session.execute(_ACQUITTED, {"of": name})
    session.execute(_ACCEPTED, {"of": name, "what": queue})


_ACQUITTED = (
    update(Worker)
    .where(Worker.name == bindparam("of"))
    .where(or_(Worker.suspects.is_not(None), Worker.removals > 0))
    .values(suspects=None, removals=0)
    .execution_options(synchronize_session=False)
)

_ACCEPTED = (
    delete(Refusal)
    .where(Refusal.worker == bindparam("of"), Refusal.needs_test.is_(False))
    .where(or_(Refusal.queue == bindparam("what"), Refusal.queue == ALL_QUEUES))
    .execution_options(synchronize_session=False)
)


def wait_seconds(times: int) -> float:
    """Until a worker that refused for the n-th time in a row is asked again."""
    return retries.growing_wait(FIRST_REFUSAL_SECONDS, times)


def refusals(
    session: Session, *, worker: str | None = None, now: datetime | None = None
) -> Sequence[Refusal]:
    """Those that still hold, of one worker or of all; `now` is asked for if it is not given."""
    now = now or database.now(session)
    found = select(Refusal).where(or_(Refusal.until > now, Refusal.needs_test))
    if worker is not None:
        found = found.where(Refusal.worker == worker)
    return session.scalars(found.order_by(Refusal.worker, Refusal.queue)).all()


def refuses(session: Session, worker: str, queue: str, *, now: datetime) -> bool:
    held = refusals(session, worker=worker, now=now)
    return any(refusal.queue in (queue, ALL_QUEUES) for refusal in held)
