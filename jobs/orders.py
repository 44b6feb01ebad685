"""What people ask of batches and jobs: cancel, retry, pause, prioritize; and what a deadline does.

Each is safe to call twice, and keeps the order of row locks that `lifecycle` tells.
"""

import itertools
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, or_, select, union_all, update
from sqlalchemy.orm import Session

from jobs import database, errors, failures, moves, schema, states
from jobs.schema import Batch, Job

STOPPED_AT_ONCE = 10_000  # queued jobs cancelled in one transaction: under a second


def request_cancel(session: Session, batch_id: str) -> tuple[int, int]:
    """From now on no job of it starts. `go_on_cancelling` then stops what is there.

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


def go_on_cancelling(session: Session, batch_id: str) -> tuple[int, int]:
    """Queued jobs are cancelled now, running ones at their next step: (cancelled, asked to).

    At most STOPPED_AT_ONCE queued ones: then the dispatcher goes on, or whoever calls this again.
    (0, 0) where nothing is left, and where its jobs have been asked for again meanwhile.
    """
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
    # In one statement: a job that is given back between two would be found by neither.
    ids = session.scalars(union_all(select(in_index_order.subquery().c.id), running)).all()
    # Locked before the first is changed: a job that is claimed or requeued between the two
    # statements below would be missed by both.
    moves.lock_jobs(session, Job.id.in_(ids))
    asked = session.execute(
        update(Job)
        .where(Job.id.in_(ids), Job.state == states.JobState.RUNNING)
        .where(Job.cancel_requested.is_(False))
        .values(cancel_requested=True, **why)
    )
    cancelled = _cancel_queued(session, batch_id, [Job.id.in_(ids)], database.now(session), why)
    return cancelled, database.row_count(asked)


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
    return database.row_count(changed) == 1


def unsend(session: Session, job_ids: Collection[int]) -> None:
    """Their messages have been taken back: they may be sent again at once."""
    if not job_ids:
        return
    waiting = [database.among(session, Job.id, job_ids), Job.state == states.JobState.QUEUED]
    moves.lock_jobs(session, *waiting)
    session.execute(update(Job).where(*waiting).values(dispatched_at=None))


def _change_batch(
    session: Session, batch_id: str, *which: ColumnElement[bool], **values: Any
) -> bool:
    changed = session.execute(update(Batch).where(Batch.id == batch_id, *which).values(values))
    return database.row_count(changed) == 1


def cancel_job(session: Session, job_id: int) -> states.JobState:
    """Cancel now if it waits, at its next step if it runs; the state it is left in."""
    job = session.scalars(select(Job).where(Job.id == job_id).with_for_update()).one()
    if job.state is states.JobState.QUEUED:
        _cancel_queued(session, job.batch_id, [Job.id == job_id], database.now(session), {})
        return states.JobState.CANCELLED
    if job.state is states.JobState.RUNNING:
        session.execute(update(Job).where(Job.id == job_id).values(cancel_requested=True))
    return job.state


def _cancel_queued(
    session: Session,
    batch_id: str,
    which: list[ColumnElement[bool]],
    now: datetime,
    why: dict[str, Any],
) -> int:
    cancelled = database.row_count(
        session.execute(
            update(Job)
            .where(Job.state == states.JobState.QUEUED, *which)
            .values(state=states.JobState.CANCELLED, finished_at=now, **why)
        )
    )
    moves.count_moved(
        session, batch_id, states.JobState.QUEUED, states.JobState.CANCELLED, cancelled
    )
    return cancelled


@dataclass(frozen=True, kw_only=True)
class Retried:
    """What a retry did."""

    jobs: int
    doubtful: Mapping[str, int]
    """How many of them will probably fail as before, by why: a key of `failures.PARTS`."""
    is_paused: bool
    """The batch is: none of them starts before somebody resumes it."""


def retry_jobs(
    session: Session,
    batch_id: str,
    *,
    from_states: Sequence[states.JobState] = (states.JobState.FAILED,),
    which: failures.Which = failures.ALL,
    job_ids: Sequence[int] | None = None,
) -> Retried:
    """Failed or cancelled -> queued with fresh budgets; the batch is open again.

    With CANCELLED, those that still run and were to stop at their next step go on: they count too.
    BatchExpired where its results, its input images or its jobs are being deleted as old.
    """
    assert set(from_states) <= {states.JobState.FAILED, states.JobState.CANCELLED}
    wanted = [Job.batch_id == batch_id, schema.HAS_STARTED, *which.conditions()]
    if job_ids is not None:
        wanted.append(Job.id.in_(job_ids))
    total = 0
    # First: one whose worker stops just now is waited for here, and found cancelled below.
    if states.JobState.CANCELLED in from_states:
        total += _let_run(session, wanted)
    reopened: Counter[states.JobState] = Counter()
    doubtful: Counter[str] = Counter()
    for state, (doubt, part) in itertools.product(from_states, failures.PARTS.items()):
        number = database.row_count(
            session.execute(
                update(Job)
                .where(Job.state == state, *part, *wanted)
                .values(
                    state=states.JobState.QUEUED,
                    error_count=0,
                    crash_count=0,
                    quarantined=False,
                    failure_kind=None,
                    error=None,
                    finished_at=None,
                    **moves.requeued(not_before=None),
                )
            )
        )
        reopened[state] += number
        if doubt is not None:
            doubtful[doubt] += number
    for state, number in reopened.items():
        moves.count_moved(session, batch_id, state, states.JobState.QUEUED, number)
    total += reopened.total()
    if total:
        # Once the batch's count holds its row: who deletes what is old now waits for us.
        check_not_expired(session, batch_id)
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
    paused_at = session.scalar(select(Batch.paused_at).where(Batch.id == batch_id))
    return Retried(jobs=total, doubtful=+doubtful, is_paused=paused_at is not None)


def _let_run(session: Session, wanted: Sequence[ColumnElement[bool]]) -> int:
    """Take back that they stop at their next step."""
    held = update(Job).where(Job.state == states.JobState.RUNNING, Job.cancel_requested, *wanted)
    let = held.values(cancel_requested=False, failure_kind=None, error=None)
    return database.row_count(session.execute(let))


def check_not_expired(session: Session, batch_id: str) -> None:
    """BatchExpired when something was deleted that its jobs would need, or is being deleted."""
    results, inputs, jobs = session.execute(
        select(Batch.results_expired_at, Batch.inputs_expired_at, Batch.forgotten_at).where(
            Batch.id == batch_id
        )
    ).one()
    for what, when in (("results", results), ("input images", inputs), ("jobs", jobs)):
        if when is not None:
            raise errors.BatchExpired(batch_id, what=what, when=when)
