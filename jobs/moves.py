"""The statements by which a job changes its state, its batch its counts and an attempt ends.

For `lifecycle` and `orders`, which say when. Made once: making one costs SQLAlchemy twice what
sending it does. They do not change objects that the session holds already.
"""

import functools
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Integer,
    Update,
    bindparam,
    func,
    select,
    update,
)
from sqlalchemy.orm import Session
from sqlalchemy.sql.dml import ReturningUpdate

from jobs import database, outbox, states
from jobs.schema import Attempt, Batch, Job

NOW = database.Clock()
"""The moment at which a statement runs."""

LIVE = (
    update(Attempt)
    .where(Attempt.id == bindparam("of_attempt"))
    .where(Attempt.state.in_(states.LIVE_ATTEMPT_STATES))
    .execution_options(synchronize_session=False)
)

Shape = tuple[tuple[str, ColumnElement[Any] | None], ...]
"""Names of columns, each with the expression that it is set to; None: to a value told later."""


def move(
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
    count_moved(session, batch_id, expected, target, 1)
    return True


def count_moved(
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


def end_attempt(
    session: Session, attempt_id: int, state: states.AttemptState, **values: Any
) -> None:
    shape, told = _told(values)
    session.execute(_ended(state, shape), told | {"of_attempt": attempt_id})


def requeued(*, not_before: datetime | None) -> dict[str, Any]:
    return {
        "attempt_id": None,
        "dispatched_at": None,
        "started_at": None,
        "not_before": not_before,
        "cancel_requested": False,
    }


def lock_jobs(session: Session, *which: ColumnElement[bool]) -> None:
    """Always in the same order: two that lock many jobs wait for each other, not in a circle."""
    locked = select(Job.id).where(*which).order_by(Job.batch_id, Job.id).with_for_update()
    session.execute(select(func.count()).select_from(locked.subquery()))


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
    return LIVE.values(state=state, finished_at=NOW, **_values(shape))
