"""Our own API: single jobs and their videos."""

from collections.abc import Callable
from datetime import datetime
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request, Response
from sqlalchemy.orm import Session

from jobs import cancelling, errors, orders, queries, requests, shapes, states
from jobs.schema import Attempt, Batch
from jobs.web import access, answers, finding, objects
from jobs.web.batches import Serving

router = APIRouter(
    prefix="/api/jobs", tags=["jobs"], responses=answers.PROBLEMS, route_class=access.ApiRoute
)


class NoVideo(errors.NotFound):
    """There is none yet, never will be, or not any more."""

    def __init__(self, job_id: int, state: str, *, deleted_at: datetime | None) -> None:
        super().__init__(f"job {job_id} has no video: {why_none(state, deleted_at=deleted_at)}")


def why_none(state: str, *, deleted_at: datetime | None) -> str:
    return f"it is {state}" if deleted_at is None else f"it was deleted at {deleted_at:%F %T} UTC"


JobId = Annotated[int, Path(ge=1, lt=2**63)]


@router.get("/{job_id}", response_model=answers.Job)
def show(job_id: JobId, serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """Everything about a job, its attempts and the link to its video."""
    with serving.db.reading() as session:
        row = finding.job(session, job_id, principal)
        look = queries.look(session, row)
        attempts = [shapes.attempt(attempt) for attempt in queries.attempts(session, job_id)]
        winner = queries.winning_attempt(session, row)
        deleted_at = requests.video_deleted_at(session, row) if winner else None
        batch = session.get_one(Batch, row.batch_id)
    return shapes.job(
        row,
        of=batch,
        look=look,
        attempts=attempts,
        video=shapes.video(serving.store, winner) if deleted_at is None else None,
        video_deleted_at=deleted_at,
    )


@router.post("/{job_id}/cancel", response_model=answers.Cancelled)
def cancel(job_id: JobId, serving: Serving, principal: access.Submitter) -> dict[str, int]:
    """Now if it waits, at its next step if it runs."""
    with serving.db.reading() as session:
        job = finding.job(session, job_id, principal)
    cancelled, stopping = cancelling.cancel_job(serving.db, job)
    return {"cancelled": cancelled, "stopping": stopping}


@router.post("/{job_id}/retry", response_model=answers.Retried)
def retry(job_id: JobId, serving: Serving, principal: access.Submitter) -> dict[str, Any]:
    """Queue it again if it failed or was cancelled."""
    with serving.db.reading() as session:
        batch_id = finding.job(session, job_id, principal).batch_id
    retried = serving.db.write(
        orders.retry_jobs,
        batch_id,
        from_states=(states.JobState.FAILED, states.JobState.CANCELLED),
        job_ids=[job_id],
    )
    serving.wake(retried.jobs)
    return shapes.retried(retried)


@router.post("/{job_id}/pause", response_model=answers.ChangedJob)
def pause(job_id: JobId, serving: Serving, principal: access.Submitter) -> dict[str, Any]:
    """Do not start it, whatever its batch does."""
    return _changed(job_id, serving, principal, orders.pause_job)


@router.post("/{job_id}/resume", response_model=answers.ChangedJob)
def resume(job_id: JobId, serving: Serving, principal: access.Submitter) -> dict[str, Any]:
    """Let it start after a pause of its own."""
    return _changed(job_id, serving, principal, orders.resume_job)


def _changed(
    job_id: int,
    serving: Serving,
    principal: access.Principal,
    change: Callable[[Session, int], bool],
) -> dict[str, Any]:
    with serving.db.reading() as session:
        finding.job(session, job_id, principal)
    changed = serving.db.write(change, job_id)
    serving.wake(changed)
    with serving.db.reading() as session:
        job = finding.job(session, job_id, principal)
    return {"job_id": job.id, "state": job.state, "is_paused": job.is_paused, "changed": changed}


@router.head("/{job_id}/video", include_in_schema=False)
@router.get(
    "/{job_id}/video",
    response_class=Response,
    responses=answers.bytes_of("video/mp4"),
)
def video(job_id: JobId, request: Request, serving: Serving, principal: access.Reader) -> Response:
    """The video itself; understands Range."""
    with serving.db.reading() as session:
        row = finding.job(session, job_id, principal)
        winner = queries.winning_attempt(session, row)
        deleted_at = requests.video_deleted_at(session, row) if winner else None
    if winner is None or deleted_at is not None:
        raise NoVideo(job_id, row.state, deleted_at=deleted_at)
    return video_of(request, serving, winner, name=f"{row.batch_id}-{row.position:05}.mp4")


def video_of(request: Request, serving: Serving, winner: Attempt, *, name: str) -> Response:
    assert winner.video_key is not None
    assert winner.video_bytes is not None
    assert winner.video_sha256 is not None
    return objects.respond(
        request,
        serving,
        winner.video_key,
        size_bytes=winner.video_bytes,
        sha256=winner.video_sha256,
        content_type="video/mp4",
        file_name=name,
    )
