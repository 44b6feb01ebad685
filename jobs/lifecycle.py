"""Every change of a job's state, one function each, as one compare-and-set.

An attempt's id is a fence: a change names the attempt that it believes holds the job, and does
nothing when another one does. Every function is safe to call twice. Order of row locks: all the
jobs by batch and id, then their batches, then attempts, then workers.
"""

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from pydantic import ValidationError
from sqlalchemy import (
    BindParameter,
    ColumnElement,
    CursorResult,
    Float,
    Integer,
    Update,
    bindparam,
    func,
    insert,
    or_,
    select,
    update,
)
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from jobs import database, errors, health, outbox, presets, retries, schema, states, workers
from jobs.schema import Attempt, Batch, Job, Owner

MAX_ERROR_CHARS = 2_000
MAX_DETAIL_CHARS = 20_000
LOST_AT_ONCE = 500  # leases ended in one transaction
SPARED_TRIES = 2  # attempts that a worker's death in their tail costs nothing; it might be theirs
STOPPED_AT_ONCE = 10_000  # queued jobs cancelled in one transaction: under a second

NOW = database.Clock()
"""The moment at which a statement runs."""


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
    spec: presets.RenderSpec


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
    that failed on this one: its message is sent again.
    """
    now = database.now(session)
    job = session.scalar(_RUNNABLE, {"of_job": job_id, "at": now})
    if job is None or workers.refuses(session, worker, job.queue, now=now):
        return None
    if health.is_for_others(session, job, worker, now):
        return None
    lease_until = now + timedelta(seconds=lease_seconds)
    begun = {"of_job": job_id, "by": worker, "at": now, "until": lease_until}
    attempt = session.execute(_BEGUN, begun).one()
    moved = _move(
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
    where = "; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in error.errors()[:3])
    fail(
        session,
        attempt_id,
        kind=states.FailureKind.INPUT,
        error=f"this version of rushes cannot render what was stored: {where}",
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
    moved = _move(
        session,
        job_id,
        states.JobState.RUNNING,
        states.JobState.SUCCEEDED,
        holder=attempt_id,
        failure_kind=None,
        error=None,
        finished_at=NOW,
    )
    if not moved:
        # Perhaps by the same call, a moment ago in another thread.
        _, state = session.execute(how).one()
        return bool(state is states.AttemptState.SUCCEEDED)
    _end_attempt(
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
    machines = {name for name, _ in health.failed_on(session, job)}
    if kind in retries.OF_MACHINE:
        machines.add(worker)
    now = database.now(session)
    target, values = _after_failure(
        job, kind=kind, machines=len(machines), budgets=budgets, now=now
    )
    told = database.storable(error)[:MAX_ERROR_CHARS]
    values |= {"failure_kind": kind, "error": told}
    _move(session, job.id, states.JobState.RUNNING, target, holder=attempt_id, **values)
    _end_attempt(
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
    job: Job, *, kind: states.FailureKind, machines: int, budgets: retries.Budgets, now: datetime
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
    )
    if decision is not None and not job.cancel_requested:
        not_before = now + timedelta(seconds=decision.wait_seconds)
        return states.JobState.QUEUED, spent | _requeued(not_before=not_before)
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
    _move(
        session,
        job.id,
        states.JobState.RUNNING,
        states.JobState.QUEUED,
        holder=attempt_id,
        **_requeued(not_before=_after(session, wait_seconds)),
    )
    _end_attempt(session, attempt_id, states.AttemptState.RELEASED, note=database.storable(reason))
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
    _move(
        session,
        job.id,
        states.JobState.RUNNING,
        states.JobState.CANCELLED,
        holder=attempt_id,
        finished_at=database.now(session),
    )
    _end_attempt(session, attempt_id, states.AttemptState.CANCELLED)
    return True


def request_cancel(session: Session, batch_id: str) -> tuple[int, int]:
    """From now on no job of it starts. `cancel_batch` then stops what is there.

    How many wait and how many run at this moment: all that this request will stop, whoever does
    it. (0, 0) if that was asked for before.
    """
    asked = update(Batch).where(
        Batch.id == batch_id, Batch.finished_at.is_(None), Batch.cancel_requested_at.is_(None)
    )
    found = session.execute(
        asked.values(cancel_requested_at=database.now(session)).returning(
            Batch.queued, Batch.running
        )
    ).one_or_none()
    return (0, 0) if found is None else (found.queued, found.running)


def cancel_batch(session: Session, batch_id: str) -> tuple[int, int]:
    """Queued jobs are cancelled now, running ones at their next step: (cancelled, asked to).

    At most STOPPED_AT_ONCE queued ones: then the dispatcher goes on, or whoever calls this again.
    """
    stopped = _stop_jobs(session, batch_id, {})
    request_cancel(session, batch_id)
    return stopped


def go_on_cancelling(session: Session, batch_id: str) -> tuple[int, int]:
    """The same, unless its jobs have been asked for again meanwhile: (0, 0)."""
    is_asked = Batch.cancel_requested_at.is_not(None)
    if session.scalar(select(Batch.id).where(Batch.id == batch_id, is_asked)) is None:
        return 0, 0
    stopped = _stop_jobs(session, batch_id, {})
    return stopped if _is_still(session, batch_id, is_asked) else (0, 0)


def expire_batch(session: Session, batch_id: str) -> tuple[int, int]:
    """The same for a batch whose deadline has passed, with the reason; finished jobs stay."""
    batch = session.get_one(Batch, batch_id)
    now = database.now(session)
    if batch.deadline_at is None or batch.deadline_at > now:
        return 0, 0
    why = f"not finished by its deadline, {batch.deadline_at:%Y-%m-%d %H:%M:%S} UTC"
    stopped = _stop_jobs(
        session, batch_id, {"failure_kind": states.FailureKind.DEADLINE, "error": why}
    )
    if not _is_still(session, batch_id, Batch.deadline_at <= now):
        return 0, 0
    session.execute(
        update(Batch).where(Batch.id == batch_id, Batch.expired_at.is_(None)).values(expired_at=now)
    )
    return stopped


def _is_still(session: Session, batch_id: str, condition: ColumnElement[bool]) -> bool:
    """After its jobs were stopped, and until the end of this transaction; else all is undone.

    A retry that was faster has taken back what they are stopped for.
    """
    held = select(Batch.id).where(Batch.id == batch_id, condition).with_for_update()
    if session.scalar(held) is not None:
        return True
    session.rollback()
    return False


def _stop_jobs(session: Session, batch_id: str, why: dict[str, Any]) -> tuple[int, int]:
    of_batch = select(Job.id).where(Job.batch_id == batch_id)
    running = of_batch.where(Job.state == states.JobState.RUNNING, schema.HAS_STARTED)
    queued = of_batch.where(Job.state == states.JobState.QUEUED)
    in_index_order = queued.order_by(Job.queue, Job.rank, Job.id).limit(STOPPED_AT_ONCE)
    ids = [*session.scalars(in_index_order), *session.scalars(running)]
    # Locked before the first is changed: a job that is claimed or requeued between the two
    # statements below would be missed by both.
    _lock_jobs(session, Job.id.in_(ids))
    asked = session.execute(
        update(Job)
        .where(Job.id.in_(ids), Job.state == states.JobState.RUNNING)
        .where(Job.cancel_requested.is_(False))
        .values(cancel_requested=True, **why)
    )
    cancelled = _cancel_queued(session, batch_id, [Job.id.in_(ids)], database.now(session), why)
    return cancelled, _count(asked)


def pause_batch(session: Session, batch_id: str) -> bool:
    """No job of it starts any more, what runs goes on. False: finished, or paused before."""
    return _change_batch(
        session,
        batch_id,
        Batch.finished_at.is_(None),
        Batch.paused_at.is_(None),
        paused_at=database.now(session),
    )


def resume_batch(session: Session, batch_id: str) -> bool:
    return _change_batch(session, batch_id, Batch.paused_at.is_not(None), paused_at=None)


def pause_job(session: Session, job_id: int) -> bool:
    """False: it does not wait any more, or is paused already."""
    return _change_queued(
        session,
        job_id,
        or_(Job.not_before.is_(None), Job.not_before != schema.PAUSED_UNTIL),
        not_before=schema.PAUSED_UNTIL,
    )


def resume_job(session: Session, job_id: int) -> bool:
    is_paused = Job.not_before == schema.PAUSED_UNTIL
    return _change_queued(session, job_id, is_paused, not_before=None)


def prioritize_batch(session: Session, batch_id: str, priority: int) -> bool:
    """Move all jobs of a batch, those with a priority of their own by the same distance."""
    boost = priority - Batch.priority
    return _change_batch(session, batch_id, Batch.finished_at.is_(None), boost=boost)


def prioritize_job(session: Session, job_id: int, priority: int) -> bool:
    """False: it does not wait any more."""
    boost = select(Batch.boost).where(Batch.id == Job.batch_id).scalar_subquery()
    return _change_queued(session, job_id, rank=boost - priority)


def _change_queued(
    session: Session, job_id: int, *which: ColumnElement[bool], **values: Any
) -> bool:
    is_queued = Job.state == states.JobState.QUEUED
    changed = session.execute(update(Job).where(Job.id == job_id, is_queued, *which).values(values))
    return _count(changed) == 1


def unsend(session: Session, job_ids: Collection[int]) -> None:
    """Their messages have been taken back: they may be sent again at once."""
    if not job_ids:
        return
    waiting = [database.among(session, Job.id, job_ids), Job.state == states.JobState.QUEUED]
    _lock_jobs(session, *waiting)
    session.execute(update(Job).where(*waiting).values(dispatched_at=None))


def _change_batch(
    session: Session, batch_id: str, *which: ColumnElement[bool], **values: Any
) -> bool:
    changed = session.execute(update(Batch).where(Batch.id == batch_id, *which).values(values))
    return _count(changed) == 1


def cancel_job(session: Session, job_id: int) -> states.JobState:
    """Cancel now if it waits, at its next step if it runs; the state it is left in."""
    job = session.scalars(select(Job).where(Job.id == job_id).with_for_update()).one()
    if job.state is states.JobState.QUEUED:
        _cancel_queued(session, job.batch_id, [Job.id == job_id], database.now(session), {})
        return states.JobState.CANCELLED
    if job.state is states.JobState.RUNNING:
        session.execute(update(Job).where(Job.id == job_id).values(cancel_requested=True))
    return job.state


def retry_jobs(
    session: Session,
    batch_id: str,
    *,
    from_states: Sequence[states.JobState] = (states.JobState.FAILED,),
    job_ids: Sequence[int] | None = None,
) -> int:
    """Failed or cancelled -> queued with fresh budgets; the batch is open again. How many.

    With CANCELLED, those that still run and were to stop at their next step go on: they count too.
    BatchExpired where its results, its input images or its jobs are being deleted as old.
    """
    assert set(from_states) <= {states.JobState.FAILED, states.JobState.CANCELLED}
    total = 0
    for state in from_states:
        statement = update(Job).where(
            Job.batch_id == batch_id, Job.state == state, schema.HAS_STARTED
        )
        if job_ids is not None:
            statement = statement.where(Job.id.in_(job_ids))
        reopened = _count(
            session.execute(
                statement.values(
                    state=states.JobState.QUEUED,
                    error_count=0,
                    crash_count=0,
                    quarantined=False,
                    failure_kind=None,
                    error=None,
                    finished_at=None,
                    **_requeued(not_before=None),
                )
            )
        )
        _count_moved(session, batch_id, state, states.JobState.QUEUED, reopened)
        total += reopened
    if states.JobState.CANCELLED in from_states:
        total += _let_run(session, batch_id, job_ids)
    if total:
        _check_not_expired(session, batch_id)
        session.execute(
            update(Batch)
            .where(Batch.id == batch_id)
            .values(
                finished_at=None,
                manifest_at=None,
                results_lease_until=None,  # who writes the files of that end leaves off
                cancel_requested_at=None,
                # Who asks for them again wants them, however late.
                deadline_at=None,
                expired_at=None,
            )
        )
    return total


def _let_run(session: Session, batch_id: str, job_ids: Sequence[int] | None) -> int:
    """Take back that they stop at their next step."""
    statement = update(Job).where(
        Job.batch_id == batch_id,
        Job.state == states.JobState.RUNNING,
        Job.cancel_requested,
        schema.HAS_STARTED,
    )
    if job_ids is not None:
        statement = statement.where(Job.id.in_(job_ids))
    let = statement.values(cancel_requested=False, failure_kind=None, error=None)
    return _count(session.execute(let))


def _check_not_expired(session: Session, batch_id: str) -> None:
    """Asked once the batch's count holds its row: who deletes what is old now waits for us."""
    results, inputs, jobs = session.execute(
        select(Batch.results_expired_at, Batch.inputs_expired_at, Batch.forgotten_at).where(
            Batch.id == batch_id
        )
    ).one()
    for what, when in (("results", results), ("input images", inputs), ("jobs", jobs)):
        if when is not None:
            raise errors.BatchExpired(batch_id, what=what, when=when)


def end_lost_attempts(
    session: Session, *, budgets: retries.Budgets, worker: str | None = None
) -> list[int]:
    """Fail the attempts whose lease has ended; with `worker`, all that this dead worker held.

    The newest one of a worker was on its device. One before it was only being finished, and one
    that is rendered waits for its upload on a host that is away: it goes back at no cost, unless
    it is the job's third.
    """
    is_lost = Attempt.lease_until < database.now(session)
    if worker is not None:
        # What is rendered lies on the disk of its host, for the publisher to find.
        is_lost = (Attempt.worker == worker) & (Attempt.state == states.AttemptState.RUNNING)
    ended, ids = [], []
    for attempt in _locked_attempts(session, is_lost):
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
                ids.append(attempt.id)
                continue
        _end_attempt(session, attempt.id, states.AttemptState.LOST, error=why)
    _suspect(session, ended)
    return ids


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


def _locked_attempts(session: Session, which: ColumnElement[bool]) -> Sequence[Attempt]:
    """Live attempts, the longest silent ones, with their jobs locked in the order for all."""
    found = (
        select(Attempt.id, Attempt.job_id)
        .where(Attempt.state.in_(states.LIVE_ATTEMPT_STATES), which)
        .order_by(Attempt.lease_until)
        .limit(LOST_AT_ONCE)
    )
    ids = session.execute(found).all()
    if not ids:
        return []
    _lock_jobs(session, Job.id.in_([job_id for _, job_id in ids]))
    # Looked at again under the lock: meanwhile a worker may have reported after all.
    return session.scalars(
        select(Attempt)
        .join(Job, Job.id == Attempt.job_id)
        .where(Attempt.id.in_([attempt_id for attempt_id, _ in ids]))
        .where(Attempt.state.in_(states.LIVE_ATTEMPT_STATES), which)
        .order_by(Job.batch_id, Job.id, Attempt.id)
    ).all()


def _lock_jobs(session: Session, *which: ColumnElement[bool]) -> None:
    """Always in the same order: two that lock many jobs wait for each other, not in a circle."""
    locked = select(Job.id).where(*which).order_by(Job.batch_id, Job.id).with_for_update()
    session.execute(select(func.count()).select_from(locked.subquery()))


def _after(session: Session, seconds: float | None) -> datetime | None:
    return None if seconds is None else database.now(session) + timedelta(seconds=seconds)


def _requeued(*, not_before: datetime | None) -> dict[str, Any]:
    return {
        "attempt_id": None,
        "dispatched_at": None,
        "started_at": None,
        "not_before": not_before,
        "cancel_requested": False,
    }


def _spec(session: Session, job: Job) -> presets.RenderSpec:
    look = session.get_one(schema.Look, job.look_id)
    return presets.RenderSpec(
        look=presets.Look.model_validate(look.body),
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


def _move(
    session: Session,
    job_id: int,
    expected: states.JobState,
    target: states.JobState,
    *,
    holder: int | None = None,
    **values: Any,
) -> bool:
    """The one statement that changes the state of a single job, and its batch's counts."""
    assert target in states.TRANSITIONS[expected], f"{expected} -> {target}"
    shape, told = _told(values)
    moved = _moved(expected, target, is_held=holder is not None, shape=shape)
    if holder is not None:
        told["holder"] = holder
    batch_id = session.scalar(moved, told | {"of_job": job_id})
    if batch_id is None:
        return False
    _count_moved(session, batch_id, expected, target, 1)
    return True


def _cancel_queued(
    session: Session,
    batch_id: str,
    which: list[ColumnElement[bool]],
    now: datetime,
    why: dict[str, Any],
) -> int:
    cancelled = _count(
        session.execute(
            update(Job)
            .where(Job.state == states.JobState.QUEUED, *which)
            .values(state=states.JobState.CANCELLED, finished_at=now, **why)
        )
    )
    _count_moved(session, batch_id, states.JobState.QUEUED, states.JobState.CANCELLED, cancelled)
    return cancelled


def _count_moved(
    session: Session, batch_id: str, source: states.JobState, target: states.JobState, number: int
) -> None:
    if not number:
        return
    counted = {"of_batch": batch_id, "number": number}
    open_jobs = session.execute(_counted(source, target), counted).scalar_one()
    if open_jobs == 0:
        session.execute(
            update(Batch).where(Batch.id == batch_id).values(finished_at=database.now(session))
        )
        outbox.batch_ended(session, outbox.BATCH_FINISHED, batch_id)


def _end_attempt(
    session: Session, attempt_id: int, state: states.AttemptState, **values: Any
) -> None:
    shape, told = _told(values)
    session.execute(_ended(state, shape), told | {"of_attempt": attempt_id})


def _count(result: Any) -> int:
    assert isinstance(result, CursorResult)
    return result.rowcount


# Statements of every job, made once: making one costs SQLAlchemy twice what sending it does. They
# do not change objects that the session holds already.

Shape = tuple[tuple[str, ColumnElement[Any] | None], ...]
"""Names of columns, each with the expression that it is set to; None: to a value told later."""


def _told(values: dict[str, Any]) -> tuple[Shape, dict[str, Any]]:
    """Expressions have to be constants: each new one would be a statement of its own for ever."""
    is_told = {name: not isinstance(value, ColumnElement) for name, value in values.items()}
    shape = tuple((name, None if is_told[name] else value) for name, value in values.items())
    return shape, {f"new_{name}": value for name, value in values.items() if is_told[name]}


def _values(shape: Shape) -> dict[str, ColumnElement[Any]]:
    return {name: bindparam(f"new_{name}") if how is None else how for name, how in shape}


@functools.cache
def _moved(
    expected: states.JobState, target: states.JobState, *, is_held: bool, shape: Shape
) -> ReturningUpdate[str]:
    statement = update(Job).where(Job.id == bindparam("of_job"), Job.state == expected)
    if is_held:
        statement = statement.where(Job.attempt_id == bindparam("holder"))
    moved = statement.values(state=target, **_values(shape)).returning(Job.batch_id)
    return moved.execution_options(synchronize_session=False)


@functools.cache
def _counted(source: states.JobState, target: states.JobState) -> ReturningUpdate[int]:
    left, entered = getattr(Batch, source.value), getattr(Batch, target.value)
    number = bindparam("number", type_=Integer())
    return (
        update(Batch)
        .where(Batch.id == bindparam("of_batch"))
        .values({left: left - number, entered: entered + number})
        .returning(Batch.queued + Batch.running)
        .execution_options(synchronize_session=False)
    )


@functools.cache
def _ended(state: states.AttemptState, shape: Shape) -> Update:
    return _LIVE.values(state=state, finished_at=NOW, **_values(shape))


_LIVE = (
    update(Attempt)
    .where(Attempt.id == bindparam("of_attempt"))
    .where(Attempt.state.in_(states.LIVE_ATTEMPT_STATES))
    .execution_options(synchronize_session=False)
)

_LEASE = {
    "heartbeat_at": NOW,
    "lease_until": database.Clock(bindparam("lease_seconds", type_=Float())),
    "note": bindparam("said"),
}

# The job without a lock: waiting for one here would turn the order of locks around. SQLite is given
# the names in it without their tables: `job_id` may not become a column of jobs.
_RENEWED = _LIVE.values(_LEASE).returning(
    select(Job.cancel_requested)
    .where(Job.id == Attempt.job_id, *_fence(bindparam("of_attempt")))
    .scalar_subquery()
)

_RENEWED_AT_STAGE = _RENEWED.values(
    stage=bindparam("at_stage"), step=bindparam("at_step"), steps=bindparam("of_steps")
)

_HELD = select(Job.cancel_requested).where(*_held_by(bindparam("of_attempt"))).with_for_update()

_RENDERED = _LIVE.values(
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

_BEGUN = (
    insert(Attempt)
    .values(
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
