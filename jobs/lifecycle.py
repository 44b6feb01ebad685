"""What attempts make of their jobs: every change one function, as one compare-and-set.

An attempt's id is a fence: a change names the attempt that it believes holds the job, and does
nothing when another one does. Every function is safe to call twice. Order of row locks: all the
jobs by batch and id, then their batches, then attempts, then workers. `orders` has what people ask.
Lost attempts are locked before their batches: a heartbeat, which holds nothing else, is the only
one to lock an attempt without its job.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from pydantic import ValidationError
from sqlalchemy import (
    BigInteger,
    BindParameter,
    ColumnElement,
    Float,
    Select,
    bindparam,
    case,
    func,
    insert,
    or_,
    select,
)
from sqlalchemy.orm import Session

from jobs import attempt_ids, database, health, looks, moves, retries, schema, states, workers
from jobs.schema import Attempt, Batch, Job, Owner

MAX_ERROR_CHARS = 2_000
MAX_DETAIL_CHARS = 20_000
LOST_AT_ONCE = 500  # leases ended in one transaction
SPARED_TRIES = 2  # attempts that a worker's death in their tail costs nothing; it might be theirs


class Verdict(StrEnum):
    """What an attempt hears when it reports."""

    GO_ON = "go_on"
    CANCELLED = "cancelled"
    """Stop: somebody asked for it. Then call `cancel_attempt`."""
    SUPERSEDED = "superseded"
    """Stop and say nothing more: the job is no longer this attempt's."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A job that this worker now holds, and everything needed to render it."""

    attempt_id: int
    job_id: int
    batch_id: str
    custom_id: str | None
    number: int
    meta: dict[str, Any] | None
    queue: str
    spec: looks.RenderSpec


@dataclass(frozen=True, kw_only=True)
class StoredVideo:
    """Where the winner lies, as verified after the upload."""

    key: str
    size_bytes: int
    sha256: str


def claim(
    session: Session,
    job_id: int,
    *,
    worker: str,
    lease_seconds: float,
    max_running_per_owner: int | None = None,
) -> Claim | None:
    """Queued -> running. None: not runnable any more, so a doubled message ends here.

    None also for a job of a batch that is paused or being stopped, beyond its owner's quota, where
    this worker takes nothing of the job's queue for now, and where another one is there for a job
    that failed on this one: its message is sent again, of such a job after a while.
    """
    now = database.now(session)
    job = session.scalar(_RUNNABLE, {"of_job": job_id, "at": now})
    if job is None or workers.refuses(session, worker, job.queue, now=now):
        return None
    wait = health.wait_for_others(session, job, worker, now)
    if wait is not None:
        job.not_before = now + wait
        return None
    lease_until = now + timedelta(seconds=lease_seconds)
    begun = {"of_job": job_id, "by": worker, "at": now, "until": lease_until}
    ids = {"new_id": attempt_ids.new(now), "ahead": attempt_ids.ahead()}
    attempt = session.execute(_BEGUN, begun | ids).one()
    moved = moves.move(
        session,
        job_id,
        states.JobState.QUEUED,
        states.JobState.RUNNING,
        attempt_id=attempt.id,
        started_at=now,
    )
    assert moved, "the row is locked"
    if not _may_run(session, job.batch_id, now, max_running_per_owner):
        session.rollback()
        return None
    try:
        spec = _spec(session, job)
    except ValidationError as error:
        # Stored by a newer version, or damaged: no worker like this one can ever start it.
        _refuse(session, attempt.id, error)
        return None
    return Claim(
        attempt_id=attempt.id,
        job_id=job_id,
        batch_id=job.batch_id,
        custom_id=job.custom_id,
        number=attempt.number,
        meta=job.meta,
        queue=job.queue,
        spec=spec,
    )


def is_open(now: datetime) -> list[ColumnElement[bool]]:
    """Batches whose jobs may start."""
    return [
        Batch.finished_at.is_(None),
        Batch.paused_at.is_(None),
        Batch.cancel_requested_at.is_(None),
        or_(Batch.deadline_at.is_(None), Batch.deadline_at > now),
    ]


def _may_run(session: Session, batch_id: str, now: datetime, most: int | None) -> bool:
    """Asked once the batch's count holds its row: who pauses it now waits until we are through."""
    owner = session.scalar(select(Batch.owner).where(Batch.id == batch_id, *is_open(now)))
    if owner is None:
        return False
    if most is None:
        return True
    # The owner's row makes those wait for each other that start jobs in different batches.
    session.execute(select(Owner.name).where(Owner.name == owner).with_for_update())
    running = select(func.sum(Batch.running)).where(
        Batch.owner == owner, Batch.finished_at.is_(None)
    )
    return (session.scalar(running) or 0) <= most


def _refuse(session: Session, attempt_id: int, error: ValidationError) -> None:
    fail(
        session,
        attempt_id,
        kind=states.FailureKind.INPUT,
        error=f"{looks.UNREADABLE}: {looks.unreadable(error)}",
        budgets=retries.Budgets(max_errors=1, max_crashes=1, retry_seconds=0),
    )


def heartbeat(
    session: Session,
    attempt_id: int,
    *,
    lease_seconds: float,
    stage: str | None = None,
    step: int = 0,
    steps: int = 0,
    note: str | None = None,
) -> Verdict:
    """Renew the lease and leave word of the progress; hear whether to go on."""
    told = {
        "of_attempt": attempt_id,
        "lease_seconds": lease_seconds,
        "said": None if note is None else database.storable(note),
    }
    if stage is None:
        return _verdict(session.scalar(_RENEWED, told))
    place = {"at_stage": stage, "at_step": step, "of_steps": steps}
    return _verdict(session.scalar(_RENEWED_AT_STAGE, told | place))


def rendered(
    session: Session,
    attempt_id: int,
    *,
    seconds: dict[str, float],
    peak_memory_bytes: int | None,
    lease_seconds: float,
    memory: str | None = None,
    note: str | None = None,
) -> Verdict:
    """The mp4 is finished on this host; from here on the publisher renews the lease with this."""
    verdict = _verdict(session.scalar(_HELD, {"of_attempt": attempt_id}))
    if verdict is Verdict.GO_ON:
        told = {
            "of_attempt": attempt_id,
            "lease_seconds": lease_seconds,
            "said": None if note is None else database.storable(note),
            "took": seconds,
            "peak": peak_memory_bytes,
            "parts": None if memory is None else database.storable(memory),
        }
        session.execute(_RENDERED, told)
    return verdict


def succeed(session: Session, attempt_id: int, *, video: StoredVideo) -> bool:
    """Running -> succeeded, if this attempt holds the job. True also when it already had."""
    how = select(Attempt.job_id, Attempt.state).where(Attempt.id == attempt_id)
    job_id, state = session.execute(how).one()
    if state is states.AttemptState.SUCCEEDED:
        return True
    moved = moves.move(
        session,
        job_id,
        states.JobState.RUNNING,
        states.JobState.SUCCEEDED,
        holder=attempt_id,
        failure_kind=None,
        error=None,
        finished_at=moves.NOW,
    )
    if not moved:
        # Perhaps by the same call, a moment ago in another thread.
        _, state = session.execute(how).one()
        return bool(state is states.AttemptState.SUCCEEDED)
    moves.end_attempt(
        session,
        attempt_id,
        states.AttemptState.SUCCEEDED,
        step=1,
        note=None,
        video_key=video.key,
        video_bytes=video.size_bytes,
        video_sha256=video.sha256,
    )
    return True


def fail(
    session: Session,
    attempt_id: int,
    *,
    kind: states.FailureKind,
    error: str,
    budgets: retries.Budgets,
    detail: str | None = None,
) -> states.JobState | None:
    """Close the attempt; requeue its job or fail it. None: the attempt did not hold the job."""
    failed = _fail(session, attempt_id, kind=kind, error=error, budgets=budgets, detail=detail)
    if failed is None:
        return None
    _suspect(session, [failed])
    return failed.target


@dataclass(frozen=True, kw_only=True)
class _Failed:
    """What became of a job whose attempt failed, and whether its machine is a suspect."""

    target: states.JobState
    job_id: int
    worker: str
    is_suspect: bool
    kind: states.FailureKind
    error: str


def _fail(
    session: Session,
    attempt_id: int,
    *,
    kind: states.FailureKind,
    error: str,
    budgets: retries.Budgets,
    detail: str | None = None,
) -> _Failed | None:
    job = _locked_by(session, attempt_id)
    if job is None:
        return None
    worker = session.scalars(select(Attempt.worker).where(Attempt.id == attempt_id)).one()
    now = database.now(session)
    failures = [*health.failures(session, job), (worker, now, kind)]
    machines = {name for name, _, its in failures if its in retries.OF_MACHINE}
    hosts = None
    if kind in retries.OF_HOST:
        hosts = health.hosts_failed_on(session, job, failures, kind)
    target, values = _after_failure(
        job,
        kind=kind,
        machines=len(machines),
        hosts=hosts,
        repeats=health.repeats(failures),
        budgets=budgets,
        now=now,
    )
    told = database.storable(error)[:MAX_ERROR_CHARS]
    values |= {"failure_kind": kind, "error": told}
    moves.move(session, job.id, states.JobState.RUNNING, target, holder=attempt_id, **values)
    moves.end_attempt(
        session,
        attempt_id,
        states.AttemptState.LOST if kind in retries.CRASHES else states.AttemptState.FAILED,
        failure_kind=kind,
        error=told,
        error_detail=None if detail is None else database.storable(detail)[-MAX_DETAIL_CHARS:],
    )
    return _Failed(
        target=target,
        job_id=job.id,
        worker=worker,
        # One that has failed elsewhere too says nothing against this machine.
        is_suspect=machines == {worker} and kind in retries.OF_MACHINE,
        kind=kind,
        error=error,
    )


def _after_failure(
    job: Job,
    *,
    kind: states.FailureKind,
    machines: int,
    hosts: int | None,
    repeats: int,
    budgets: retries.Budgets,
    now: datetime,
) -> tuple[states.JobState, dict[str, Any]]:
    """The job's next state, and the columns that go with it."""
    is_crash = kind in retries.CRASHES
    spent = {
        "error_count": job.error_count + (not is_crash),
        "crash_count": job.crash_count + is_crash,
    }
    decision = retries.decide(
        kind,
        errors=spent["error_count"],
        crashes=spent["crash_count"],
        budgets=budgets,
        machines=machines,
        hosts=hosts,
        repeats=repeats,
    )
    if decision is not None and not job.cancel_requested:
        not_before = now + timedelta(seconds=decision.wait_seconds)
        return states.JobState.QUEUED, spent | moves.requeued(not_before=not_before)
    target = states.JobState.CANCELLED if job.cancel_requested else states.JobState.FAILED
    is_harmful = is_crash or machines >= retries.MAX_MACHINES
    is_quarantined = is_harmful and target is states.JobState.FAILED
    return target, spent | {"finished_at": now, "quarantined": is_quarantined}


def _suspect(session: Session, failures: Sequence[_Failed]) -> None:
    """After everything else: rows of workers come last in the order of locks, by name."""
    for failed in sorted(failures, key=lambda each: each.worker):
        if failed.is_suspect:
            health.suspect(
                session,
                failed.worker,
                job_id=failed.job_id,
                kind=failed.kind,
                error=failed.error,
            )


def release(
    session: Session, attempt_id: int, *, reason: str, wait_seconds: float | None = None
) -> bool:
    """Running -> queued at no cost to any budget: the job did nothing wrong.

    With `wait_seconds` no worker tries it before.
    """
    job = _locked_by(session, attempt_id)
    if job is None:
        return False
    if job.cancel_requested:
        return cancel_attempt(session, attempt_id)
    moves.move(
        session,
        job.id,
        states.JobState.RUNNING,
        states.JobState.QUEUED,
        holder=attempt_id,
        **moves.requeued(not_before=_after(session, wait_seconds)),
    )
    moves.end_attempt(
        session, attempt_id, states.AttemptState.RELEASED, note=database.storable(reason)
    )
    return True


def cancel_attempt(session: Session, attempt_id: int) -> bool:
    """Running -> cancelled: the attempt has stopped because its job was to be cancelled.

    Running -> queued where somebody asked for it again meanwhile.
    """
    job = _locked_by(session, attempt_id)
    if job is None:
        return False
    if not job.cancel_requested:
        return release(session, attempt_id, reason="cancelled, and asked for again")
    moves.move(
        session,
        job.id,
        states.JobState.RUNNING,
        states.JobState.CANCELLED,
        holder=attempt_id,
        finished_at=database.now(session),
    )
    moves.end_attempt(session, attempt_id, states.AttemptState.CANCELLED)
    return True


@dataclass(frozen=True, kw_only=True)
class Lost:
    """Attempts whose lease has ended."""

    by_batch: dict[str, list[int]]
    """Their ids, the longest silent ones first."""
    busy: frozenset[int]
    """Those that a transaction holds: a heartbeat, perhaps one that waits to be committed."""


def lost_attempts(session: Session, *, but_not: Collection[str] = ()) -> Lost:
    """What there is for `end_lost_attempts`, which ends none that is busy; not of some batches."""
    is_lost = Attempt.lease_until < database.now(session)
    found = _longest_silent(is_lost & Job.batch_id.not_in(but_not))
    rows = session.execute(found.add_columns(Job.batch_id)).all()
    ids = [attempt_id for attempt_id, _, _ in rows]
    by_batch: dict[str, list[int]] = defaultdict(list)
    for attempt_id, _, batch_id in rows:
        by_batch[batch_id].append(attempt_id)
    free = select(Attempt.id).where(Attempt.id.in_(ids)).with_for_update(skip_locked=True)
    busy = set(ids) - set(session.scalars(free)) if ids else set()
    return Lost(by_batch=dict(by_batch), busy=frozenset(busy))


def end_lost_attempts(
    session: Session,
    *,
    budgets: retries.Budgets,
    worker: str | None = None,
    ids: Collection[int] | None = None,
) -> list[int]:
    """Fail the attempts whose lease has ended; with `worker`, all that this dead worker held.

    The newest one of a worker was on its device. One before it was only being finished, and one
    that is rendered waits for its upload on a host that is away: it goes back at no cost, unless
    it is the job's third. With `ids`, only of these.
    """
    is_lost = Attempt.lease_until < database.now(session)
    if ids is not None:
        is_lost &= Attempt.id.in_(ids)
    if worker is not None:
        # What is rendered lies on the disk of its host, for the publisher to find.
        is_lost = (Attempt.worker == worker) & (Attempt.state == states.AttemptState.RUNNING)
    # A row that is held says that somebody is there, or will be held for as long as a host that
    # froze in the middle of a transaction is not given up: the others do not wait for it.
    attempts = _locked_attempts(session, is_lost, passes_over_held=worker is None)
    ended, lost = [], []
    for attempt in attempts:
        silent = (database.now(session) - attempt.heartbeat_at).total_seconds()
        where = f"{attempt.worker} in stage {attempt.stage or 'start'}"
        why = f"{where}: the worker died" if worker else f"{where}: silent for {silent:.0f} s"
        if attempt.number <= SPARED_TRIES and _is_tail(session, attempt):
            if release(session, attempt.id, reason=f"{why}, with the next job"):
                continue
        else:
            kind = states.FailureKind.WORKER_LOST
            failed = _fail(session, attempt.id, kind=kind, error=why, budgets=budgets)
            if failed is not None:
                ended.append(failed)
                lost.append(attempt.id)
                continue
        moves.end_attempt(session, attempt.id, states.AttemptState.LOST, error=why)
    _suspect(session, ended)
    return lost


def _is_tail(session: Session, attempt: Attempt) -> bool:
    """Whether its device has nothing to do with it any more."""
    if attempt.state is states.AttemptState.RENDERED:
        return True
    later = (Attempt.id > attempt.id) & (Attempt.worker == attempt.worker)
    return session.scalar(select(Attempt.id).where(later).limit(1)) is not None


def release_worker(
    session: Session, worker: str, *, reason: str, keep: Sequence[int] = ()
) -> list[int]:
    """Give back everything that a stopped worker still held, at no cost to the jobs.

    `keep` are attempts that it does work on.
    """
    is_held = (Attempt.worker == worker) & (Attempt.state == states.AttemptState.RUNNING)
    is_held &= Attempt.id.not_in(keep)
    held = _locked_attempts(session, is_held)
    return [attempt.id for attempt in held if release(session, attempt.id, reason=reason)]


def _longest_silent(which: ColumnElement[bool]) -> Select[int, int]:
    """Live attempts, and their jobs."""
    return (
        select(Attempt.id, Attempt.job_id)
        .join(Job, Job.id == Attempt.job_id)
        .where(schema.IS_LIVE, which)
        .order_by(Attempt.lease_until)
        .limit(LOST_AT_ONCE)
    )


def _locked_attempts(
    session: Session, which: ColumnElement[bool], *, passes_over_held: bool = False
) -> Sequence[Attempt]:
    """The longest silent ones, locked with their jobs in the order for all."""
    ids = session.execute(_longest_silent(which)).all()
    if not ids:
        return []
    if not passes_over_held:
        moves.lock_jobs(session, Job.id.in_([job_id for _, job_id in ids]))
    # Looked at again under the locks: meanwhile a worker may have reported after all. The attempts
    # are locked as well, because a heartbeat that is not yet committed has renewed its lease.
    return session.scalars(
        select(Attempt)
        .join(Job, Job.id == Attempt.job_id)
        .where(Attempt.id.in_([attempt_id for attempt_id, _ in ids]))
        .where(Attempt.state.in_(states.LIVE_ATTEMPT_STATES), which)
        .order_by(Job.batch_id, Job.id, Attempt.id)
        .with_for_update(of=(Job, Attempt), skip_locked=passes_over_held)
    ).all()


def _after(session: Session, seconds: float | None) -> datetime | None:
    return None if seconds is None else database.now(session) + timedelta(seconds=seconds)


def _spec(session: Session, job: Job) -> looks.RenderSpec:
    look = session.get_one(schema.Look, job.look_id)
    return looks.RenderSpec(
        look=looks.Look.model_validate(look.body),
        prompt=job.prompt,
        negative_prompt=job.negative_prompt,
        image_key=job.image_key,
        seed=job.seed,
    )


def _locked_by(session: Session, attempt_id: int) -> Job | None:
    """The job that this attempt holds, locked; None when it holds none."""
    held = select(Job).where(*_held_by(attempt_id)).with_for_update()
    return session.scalar(held.execution_options(populate_existing=True))


def _held_by(attempt_id: int | BindParameter[int]) -> list[ColumnElement[bool]]:
    """The attempt's job, if the attempt holds it."""
    of_attempt = select(Attempt.job_id).where(Attempt.id == attempt_id).scalar_subquery()
    return [Job.id == of_attempt, *_fence(attempt_id)]


def _fence(attempt_id: int | BindParameter[int]) -> list[ColumnElement[bool]]:
    return [Job.attempt_id == attempt_id, Job.state == states.JobState.RUNNING]


def _verdict(cancel_requested: bool | None) -> Verdict:
    """None: the attempt holds no job."""
    if cancel_requested is None:
        return Verdict.SUPERSEDED
    return Verdict.CANCELLED if cancel_requested else Verdict.GO_ON


# Statements of every job, as in `moves`.

_LEASE = {
    "heartbeat_at": moves.NOW,
    "lease_until": database.Clock(bindparam("lease_seconds", type_=Float())),
    "note": bindparam("said"),
}

# The job without a lock: waiting for one here would turn the order of locks around. SQLite is given
# the names in it without their tables: `job_id` may not become a column of jobs.
_RENEWED = moves.LIVE.values(_LEASE).returning(
    select(Job.cancel_requested)
    .where(Job.id == Attempt.job_id, *_fence(bindparam("of_attempt")))
    .scalar_subquery()
)

_RENEWED_AT_STAGE = _RENEWED.values(
    stage=bindparam("at_stage"), step=bindparam("at_step"), steps=bindparam("of_steps")
)

_HELD = select(Job.cancel_requested).where(*_held_by(bindparam("of_attempt"))).with_for_update()

_RENDERED = moves.LIVE.values(
    _LEASE
    | {
        "state": states.AttemptState.RENDERED,
        "stage": "upload",
        "step": 0,
        "steps": 1,
        "seconds": bindparam("took"),
        "peak_memory_bytes": bindparam("peak"),
        "memory": bindparam("parts"),
    }
)

_RUNNABLE = (
    select(Job)
    .where(Job.id == bindparam("of_job"), Job.state == states.JobState.QUEUED)
    .where(or_(Job.not_before.is_(None), Job.not_before <= bindparam("at")))
    .with_for_update()
)

_NEWEST = select(func.max(Attempt.id)).scalar_subquery()
_NEW_ID = bindparam("new_id", type_=BigInteger())

_BEGUN = (
    insert(Attempt)
    .values(
        # Higher than all that there are, also in the same millisecond or when a clock goes back.
        id=case(
            (_NEWEST >= _NEW_ID, _NEWEST + bindparam("ahead", type_=BigInteger())), else_=_NEW_ID
        ),
        job_id=bindparam("of_job"),
        number=(
            select(func.count() + 1)
            .select_from(Attempt)
            .where(Attempt.job_id == bindparam("of_job"))
            .scalar_subquery()
        ),
        state=states.AttemptState.RUNNING,
        worker=bindparam("by"),
        started_at=bindparam("at"),
        heartbeat_at=bindparam("at"),
        lease_until=bindparam("until"),
    )
    .returning(Attempt.id, Attempt.number)
)
