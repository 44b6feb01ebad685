"""Batches and jobs by what a request calls them; those of others are not there."""

from collections.abc import Iterable, Sequence

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import database, errors, queries, states
from jobs.schema import Batch, Job
from jobs.web import access


def batch(session: Session, reference: str, principal: access.Principal) -> Batch:
    """By its whole id. NotFound."""
    found = _kept(session, reference, principal)
    if found.forgotten_at is not None:
        raise _unknown(reference)
    return found


def batches(
    session: Session,
    principal: access.Principal,
    *,
    limit: int,
    cursor: str | None,
    owner: str | None = None,
    states_wanted: Sequence[states.BatchState] = (),
) -> Sequence[Batch]:
    """Newest first; `cursor` is the last batch that was seen, being forgotten or not. NotFound."""
    last = None if cursor is None else _kept(session, cursor, principal)
    if owner is None:
        owner = principal.sees
    elif not principal.may_see(owner):
        return []
    return queries.batches(
        session, limit=limit, before=last, owner=owner, states_wanted=states_wanted
    )


def prompts(
    session: Session, principal: access.Principal, job_ids: Iterable[int]
) -> dict[int, str]:
    """Of those of these jobs that the principal may see, by their ids."""
    statement = select(Job.id, Job.prompt).join(Batch, Batch.id == Job.batch_id)
    statement = statement.where(
        database.among(session, Job.id, job_ids), Batch.forgotten_at.is_(None)
    )
    if principal.sees is not None:
        statement = statement.where(Batch.owner == principal.sees)
    return {row.id: row.prompt for row in session.execute(statement)}


def _kept(session: Session, reference: str, principal: access.Principal) -> Batch:
    """One whose row is there. NotFound."""
    found = session.get(Batch, reference) if queries.BATCH_ID_PART.fullmatch(reference) else None
    if found is None or not principal.may_see(found.owner):
        raise _unknown(reference)
    return found


def _unknown(reference: str) -> errors.NotFound:
    return errors.NotFound(f"no batch {reference[:60]!r}")


def job(session: Session, job_id: int, principal: access.Principal) -> Job:
    """NotFound, also for one of a batch that is being forgotten."""
    statement = (
        select(Job, Batch.owner)
        .join(Batch, Batch.id == Job.batch_id)
        .where(Job.id == job_id, Batch.forgotten_at.is_(None))
    )
    row = session.execute(statement).one_or_none() if 0 < job_id < 2**63 else None
    if row is None or not principal.may_see(row.owner):
        raise errors.NotFound(f"no job {job_id}")
    found: Job = row.Job
    return found
