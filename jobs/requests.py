"""What the compatible APIs call a batch: a name of their own, and what was asked for."""

from collections.abc import Collection, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import case, exists, or_, select
from sqlalchemy.orm import Session

from jobs import database, errors, states
from jobs.schema import ApiRequest, Batch, Job

VIDEOS = "videos"  # OpenAI's, in which every job is a video


class NameTaken(errors.RushesError):
    """A client chose a name that it has used before."""

    def __init__(self, name: str) -> None:
        super().__init__(f"{name!r} exists already: take another, or none")


def add(
    session: Session,
    *,
    api: str,
    owner: str,
    name: str,
    batch_id: str | None,
    body: dict[str, Any],
) -> ApiRequest:
    """NameTaken."""
    if get(session, api=api, owner=owner, name=name) is not None:
        raise NameTaken(name)
    row = ApiRequest(
        api=api,
        owner=owner,
        name=name,
        batch_id=batch_id,
        body=body,
        created_at=database.now(session),
    )
    session.add(row)
    session.flush()
    return row


def get(
    session: Session, *, api: str, owner: str | None, name: str, own: str | None = None
) -> ApiRequest | None:
    """Deleted ones too. `owner` None: anybody's of this name, that of `own` before all others."""
    statement = select(ApiRequest).where(
        ApiRequest.api == api, ApiRequest.name == name.replace("\0", "")
    )
    if owner is not None:
        statement = statement.where(ApiRequest.owner == owner)
    if own is not None:
        statement = statement.order_by(case((ApiRequest.owner == own, 0), else_=1))
    return session.scalars(statement.order_by(ApiRequest.id)).first()


def find(
    session: Session, *, api: str, owner: str | None, name: str, own: str | None = None
) -> ApiRequest:
    """NotFound, also for a deleted one."""
    row = get(session, api=api, owner=owner, name=name, own=own)
    batch = None if row is None or row.batch_id is None else session.get(Batch, row.batch_id)
    is_forgotten = batch is not None and batch.forgotten_at is not None
    if row is None or row.deleted_at is not None or is_forgotten:
        raise errors.NotFound(f"no {name[:100]!r} here")
    return row


def bodies(
    session: Session, *, api: str, owners: Collection[str], names: Collection[str]
) -> dict[tuple[str, str], dict[str, Any]]:
    """What was asked for, by owner and name; of deleted ones too."""
    found = session.execute(
        select(ApiRequest.owner, ApiRequest.name, ApiRequest.body)
        .where(ApiRequest.api == api)
        .where(ApiRequest.owner.in_(owners), ApiRequest.name.in_(names))
    )
    return {(owner, name): body for owner, name, body in found}


def page(
    session: Session,
    *,
    api: str,
    owner: str | None,
    after: str | None = None,
    limit: int,
    oldest_first: bool = False,
) -> Sequence[ApiRequest]:
    """`after` is the name of the last one that was seen, deleted meanwhile or not. NotFound.

    A deleted one whose video is there again, as `delete_asked_at` tells, is among them, but for
    those of other APIs' batches.
    """
    succeeded_later = exists().where(
        Job.batch_id == ApiRequest.batch_id,
        Job.state == states.JobState.SUCCEEDED,
        Job.finished_at > ApiRequest.deleted_at,
    )
    was_made_here = ApiRequest.body["model"].as_string().is_not(None)
    is_there_again = was_made_here & succeeded_later
    statement = (
        select(ApiRequest)
        .where(ApiRequest.api == api, or_(ApiRequest.deleted_at.is_(None), is_there_again))
        .outerjoin(Batch, Batch.id == ApiRequest.batch_id)
        .where(Batch.forgotten_at.is_(None))
    )
    if owner is not None:
        statement = statement.where(ApiRequest.owner == owner)
    if after is not None:
        last = get(session, api=api, owner=owner, name=after)
        if last is None:
            raise errors.NotFound(f"no {after[:100]!r} here")
        later, earlier = ApiRequest.id > last.id, ApiRequest.id < last.id
        statement = statement.where(later if oldest_first else earlier)
    order = ApiRequest.id if oldest_first else ApiRequest.id.desc()
    return session.scalars(statement.order_by(order).limit(limit)).all()


def video_name(job_id: int) -> str:
    return f"video_{job_id}"


def video_deleted_at(session: Session, job: Job) -> datetime | None:
    """Since when the video of a job that succeeded is gone: with its batch, or by OpenAI's API."""
    batch = session.get_one(Batch, job.batch_id)
    return delete_asked_at(session, job) or batch.results_expired_at


def delete_asked_at(session: Session, job: Job) -> datetime | None:
    """When OpenAI's API was asked to delete its video; None where it succeeded after that.

    Then it was rendered again, or was finished before the cancel was heard.
    """
    batch = session.get_one(Batch, job.batch_id)
    row = get(session, api=VIDEOS, owner=batch.owner, name=video_name(job.id))
    if row is None or row.deleted_at is None or _is_there_again(job, row.deleted_at):
        return None
    return row.deleted_at


def _is_there_again(job: Job, deleted_at: datetime) -> bool:
    if job.state is not states.JobState.SUCCEEDED:
        return False
    assert job.finished_at is not None
    return deleted_at < job.finished_at


def deleted_videos(session: Session, batch_id: str, jobs: Collection[Job]) -> set[int]:
    """The ids of those of these jobs of a batch for which `delete_asked_at` has a time."""
    batch = session.get_one(Batch, batch_id)
    found = session.execute(
        select(ApiRequest.name, ApiRequest.deleted_at)
        .where(ApiRequest.api == VIDEOS, ApiRequest.owner == batch.owner)
        .where(ApiRequest.name.in_([video_name(job.id) for job in jobs]))
        .where(ApiRequest.deleted_at.is_not(None))
    )
    deleted_at = {row.name: row.deleted_at for row in found}
    return {
        job.id
        for job in jobs
        if (moment := deleted_at.get(video_name(job.id))) and not _is_there_again(job, moment)
    }
