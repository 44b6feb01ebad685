"""What is deleted as old: the rows' part of it, each call one short transaction.

A batch is marked before anything of it is deleted, under the condition that it is still finished
and old; from then on it cannot be reopened. So a run that was killed is gone on with by the next.
"""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    delete,
    exists,
    func,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.orm import Session

from jobs import database, schema, states, totals, workers
from jobs.schema import (
    ApiRequest,
    ApiToken,
    Attempt,
    Base,
    Batch,
    Firing,
    Job,
    Notice,
    Refusal,
    StoredFile,
    Worker,
)

BATCHES_AT_ONCE = 500
JOBS_AT_ONCE = 2_000


# Results.


def batches_with_old_results(before: datetime, *, but_not: Collection[str]) -> Select[Batch]:
    """Finished before, and their result files written: nobody writes below their keys any more."""
    return (
        select(Batch)
        .where(Batch.finished_at < before, Batch.manifest_at.is_not(None))
        .where(Batch.results_expired_at.is_(None), Batch.forgotten_at.is_(None))
        .where(Batch.id.not_in(but_not))
    )


def expire_results(session: Session, before: datetime, *, but_not: Collection[str]) -> int:
    """Decide that the results of some of them go; how many."""
    found = batches_with_old_results(before, but_not=but_not).with_only_columns(Batch.id)
    return _marked(session, found, results_expired_at=database.now(session))


def batches_to_empty(session: Session) -> Sequence[str]:
    """Whose results are to go and may still be there."""
    return session.scalars(
        select(Batch.id)
        .where(Batch.results_expired_at.is_not(None), Batch.results_removed_at.is_(None))
        .order_by(Batch.id)
    ).all()


def results_removed(session: Session, batch_id: str) -> None:
    now = database.now(session)
    session.execute(update(Batch).where(Batch.id == batch_id).values(results_removed_at=now))


# Rows of batches.


def batches_to_forget(
    before: datetime, *, results_before: datetime | None, but_not: Collection[str] = ()
) -> Select[Batch]:
    """Old ones whose results are gone; with None, results stay for ever and need no rows.

    `results_before`: those count too whose results will go by that rule.
    """
    old = select(Batch).where(Batch.finished_at < before, Batch.manifest_at.is_not(None))
    old = old.where(Batch.forgotten_at.is_(None))
    if results_before is None:
        # Of one whose results are half deleted, the rows say what is left to do.
        return old.where(
            or_(Batch.results_expired_at.is_(None), Batch.results_removed_at.is_not(None))
        )
    will_go = (Batch.finished_at < results_before) & Batch.id.not_in(but_not)
    return old.where(or_(Batch.results_removed_at.is_not(None), will_go))


def forget(session: Session, before: datetime, *, keeps_results: bool) -> int:
    """Decide that the rows of some of them go; how many. Nobody is told of them any more."""
    found = batches_to_forget(before, results_before=None)
    if not keeps_results:
        found = found.where(Batch.results_removed_at.is_not(None))
    # The key is free at once: who submits with it again must not be given a batch that vanishes.
    return _marked(
        session,
        found.with_only_columns(Batch.id),
        forgotten_at=database.now(session),
        idempotency_key=None,
    )


def forgotten(session: Session) -> Sequence[str]:
    return session.scalars(
        select(Batch.id).where(Batch.forgotten_at.is_not(None)).order_by(Batch.id)
    ).all()


def delete_jobs(session: Session, batch_id: str) -> int:
    """Some of the jobs of a forgotten batch, with their attempts; how many. Zero: none are left."""
    ids = session.scalars(
        select(Job.id)
        .join(Batch, Batch.id == Job.batch_id)
        .where(Job.batch_id == batch_id, Batch.forgotten_at.is_not(None))
        .order_by(Job.position)
        .limit(JOBS_AT_ONCE)
        # What another run deletes in the same moment counts once.
        .with_for_update(of=Job)
    ).all()
    of_them = Attempt.job_id.in_(ids)
    totals.keep(session, totals.of_attempts(session, of_them))
    session.execute(delete(Attempt).where(of_them))
    return database.row_count(session.execute(delete(Job).where(Job.id.in_(ids))))


def delete_batch(session: Session, batch_id: str) -> None:
    """The row of a forgotten batch without jobs. What its schedule did stays told, without it."""
    session.execute(update(Firing).where(Firing.batch_id == batch_id).values(batch_id=None))
    session.execute(delete(ApiRequest).where(ApiRequest.batch_id == batch_id))
    session.execute(delete(Batch).where(Batch.id == batch_id, Batch.forgotten_at.is_not(None)))


# Input images.


def needed_inputs(
    session: Session,
    keys: Sequence[str],
    *,
    before: datetime,
    uploaded_since: datetime | None,
    but_not: Collection[str] = (),
) -> set[str]:
    """Those of the keys that a batch may still start from, or that an upload names.

    A batch that is unfinished, or was finished after `before`: then it may be reopened. `but_not`
    are batches whose rows will be gone. `uploaded_since` None: uploads stay for ever.
    """
    by_jobs = (
        select(Job.image_key)
        .join(Batch, Batch.id == Job.batch_id)
        .where(Job.image_key.in_(keys), Batch.forgotten_at.is_(None), Batch.id.not_in(but_not))
        .where(or_(Batch.finished_at.is_(None), Batch.finished_at >= before))
        .distinct()
    )
    is_kept = true() if uploaded_since is None else StoredFile.created_at >= uploaded_since
    by_uploads = select(StoredFile.key).where(StoredFile.key.in_(keys), is_kept)
    return {key for key in (*session.scalars(by_jobs), *session.scalars(by_uploads)) if key}


def expire_inputs(session: Session, keys: Sequence[str], *, before: datetime) -> None:
    """Batches that started from these images cannot be reopened any more.

    Their rows are locked by this: ask `needed_inputs` after it, not before.
    """
    started = select(Job.batch_id).where(Job.image_key.in_(keys)).distinct()
    ids = session.scalars(started).all()
    for batch_id in sorted(ids):
        session.execute(
            update(Batch)
            .where(Batch.id == batch_id, Batch.finished_at < before)
            .where(Batch.inputs_expired_at.is_(None))
            .values(inputs_expired_at=database.now(session))
        )


# Small things: what is old of each, to be counted or deleted.


def old_uploads(before: datetime) -> tuple[type[Base], ColumnElement[bool]]:
    return StoredFile, StoredFile.created_at < before


def old_requests(before: datetime) -> tuple[type[Base], ColumnElement[bool]]:
    """Refused ones. The others go with their batch: that a video was deleted is told by its row."""
    return ApiRequest, ApiRequest.batch_id.is_(None) & (ApiRequest.created_at < before)


def old_tokens(before: datetime) -> tuple[type[Base], ColumnElement[bool]]:
    return ApiToken, or_(ApiToken.revoked_at < before, ApiToken.expires_at < before)


def old_workers(before: datetime) -> tuple[type[Base], ColumnElement[bool]]:
    holds_a_job = exists().where(Attempt.worker == Worker.name, schema.IS_LIVE)
    silent = Worker.heartbeat_at < before - timedelta(seconds=workers.ALIVE_SECONDS)
    is_gone = silent | (Worker.stopped_at < before)
    return Worker, is_gone & ~holds_a_job


def old_refusals(before: datetime) -> tuple[type[Base], ColumnElement[bool]]:
    """Not of a worker that waits for its self-test: however old, it is not to be trusted yet."""
    is_there = exists().where(Worker.name == Refusal.worker)
    return Refusal, (Refusal.until < before) & ~(Refusal.needs_test & is_there)


def old_notices(before: datetime) -> tuple[type[Base], ColumnElement[bool]]:
    """Delivered or given up."""
    return Notice, Notice.next_try_at.is_(None) & (Notice.created_at < before)


def old_firings(before: datetime) -> tuple[type[Base], ColumnElement[bool]]:
    """Without those whose batch is unfinished: the overlap policy asks for them."""
    is_open = exists().where(Batch.id == Firing.batch_id, Batch.finished_at.is_(None))
    return Firing, (Firing.created_at < before) & ~is_open


def count(session: Session, table: type[Base], which: ColumnElement[bool]) -> int:
    return session.scalar(select(func.count()).select_from(table).where(which)) or 0


def delete_rows(session: Session, table: type[Base], which: ColumnElement[bool]) -> int:
    if table is Firing:
        ended = session.scalars(delete(Firing).where(which).returning(Firing.state)).all()
        totals.keep(session, totals.of_firings(ended))
        return len(ended)
    return database.row_count(session.execute(delete(table).where(which)))


def has_old_key(before: datetime) -> ColumnElement[bool]:
    return Batch.idempotency_key.is_not(None) & (Batch.finished_at < before)


def drop_keys(session: Session, before: datetime) -> int:
    """The batches stay; only their idempotency keys are free again."""
    dropped = update(Batch).where(has_old_key(before)).values(idempotency_key=None)
    return database.row_count(session.execute(dropped))


def live_attempts(session: Session, ids: Sequence[int]) -> set[tuple[str, int]]:
    """Batch and id of those whose files on a worker's disk are still needed."""
    found = (
        select(Job.batch_id, Attempt.id)
        .join(Job, Job.id == Attempt.job_id)
        .where(database.among(session, Attempt.id, ids))
        .where(Attempt.state.in_(states.LIVE_ATTEMPT_STATES))
    )
    return {(batch_id, attempt_id) for batch_id, attempt_id in session.execute(found)}


def known_batches(session: Session, ids: Collection[str]) -> set[str]:
    """Those of them that this database has."""
    return set(session.scalars(select(Batch.id).where(Batch.id.in_(ids))))


def _marked(session: Session, found: Select[str], **values: Any) -> int:
    # Locked one by one in order, and looked at again under the lock: one may have been reopened.
    ids = session.scalars(found.order_by(Batch.id).limit(BATCHES_AT_ONCE).with_for_update()).all()
    return database.row_count(
        session.execute(update(Batch).where(Batch.id.in_(ids)).values(values))
    )
