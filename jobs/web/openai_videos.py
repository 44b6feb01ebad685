"""OpenAI's videos API. A video is a job, `video_<number>`, whoever submitted it."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request, Response
from pydantic import BaseModel, ConfigDict
from sqlalchemy import select
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from jobs import (
    database,
    errors,
    orders,
    presets,
    prompt_row,
    queries,
    readers,
    requests,
    results,
    states,
)
from jobs.schema import Attempt, Batch, Job, Look
from jobs.web import access, answers, bodies, finding, form, images, receiving, service, videos
from jobs.web.batches import Serving, images_for, options

router = APIRouter(
    prefix="/v1", tags=["OpenAI"], responses=answers.OPENAI_ERRORS, route_class=access.ApiRoute
)

ALIASES = frozenset({"sora-2", "sora-2-pro"})
"""Models that scripts name because they must: our default preset."""
REFERENCE = readers.REFERENCE
FORM_TYPES = ("multipart/form-data", "application/x-www-form-urlencoded")
STATUSES = {
    states.JobState.QUEUED: "queued",
    states.JobState.RUNNING: "in_progress",
    states.JobState.SUCCEEDED: "completed",
    states.JobState.FAILED: "failed",
    states.JobState.CANCELLED: "failed",
}
STAGES = {"text": 5, "image": 8, "denoise": 10, "decode": 80, "mux": 95, "hash": 96, "upload": 97}
"""Per cent at which a stage begins; the one before it ends there."""

FORM = {
    "type": "object",
    "required": ["prompt"],
    "properties": {
        "prompt": {"type": "string"},
        "model": {"type": "string", "description": "A preset."},
        "seconds": {"type": "string"},
        "size": {"type": "string", "examples": ["832x480"]},
        REFERENCE: {"type": "string", "format": "binary"},
        "seed": {"type": "integer"},
        "negative_prompt": {"type": "string"},
        "width": {"type": "integer"},
        "height": {"type": "integer"},
        "lora": {
            "type": "string",
            "description": "JSON, or the name of one.",
            "examples": ['[{"name": "film", "strength": 0.8}]'],
        },
        "metadata": {"type": "string", "description": "JSON.", "examples": ['{"scene": "12"}']},
    },
}
JSON = {
    "type": "object",
    "required": ["prompt"],
    "description": "And the other keys of a prompt row.",
    "properties": {
        "prompt": {"type": "string"},
        "model": {"type": "string", "description": "A preset."},
        "seconds": {"type": ["string", "number"]},
        "size": {"type": "string", "examples": ["832x480"]},
        REFERENCE: {
            "type": "object",
            "description": "One of the two.",
            "properties": {"file_id": {"type": "string"}, "image_url": {"type": "string"}},
        },
        "seed": {"type": "integer"},
        "lora": {"type": "array", "items": {"type": "object"}},
        "metadata": {"type": "object", "additionalProperties": {"type": "string"}},
    },
}
BODY = {
    "requestBody": {
        "content": {
            "multipart/form-data": {"schema": FORM},
            "application/json": {"schema": JSON},
        }
    }
}


class Video(BaseModel):
    """OpenAI's video object."""

    model_config = ConfigDict(extra="allow")

    id: str
    object: Literal["video"] = "video"
    status: str
    progress: int
    created_at: int
    model: str
    prompt: str
    seconds: str
    size: str


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The fields of a create request, from a form or from JSON."""

    fields: dict[str, Any]
    image: bytes | None = None
    """The image itself, where it came with the request."""


async def _asked(request: Request) -> Asked:
    try:
        return await _read(request)
    except HTTPException as refused:
        if "maximum size" not in refused.detail:
            raise
        # Of a text: Starlette does not say that files may be larger.
        detail = f"{refused.detail} Send an image as a file, or upload it and name its file_id."
        raise HTTPException(refused.status_code, detail) from None


async def _read(request: Request) -> Asked:
    kind = request.headers.get("content-type", "").lower()
    if kind.startswith("application/json"):
        try:
            body = await request.json()
        except (ValueError, RecursionError):
            raise errors.invalid("body", "is not JSON") from None
        if not isinstance(body, dict):
            raise errors.invalid("body", "must be an object")
        return Asked(fields=body)
    if not kind.startswith(FORM_TYPES):
        message = "must be a form, or JSON sent with Content-Type: application/json"
        raise errors.invalid("body", message)
    async with request.form(
        max_files=1, max_fields=bodies.MAX_FIELDS, max_part_size=bodies.MAX_TEXT_BYTES
    ) as sent:
        texts: list[tuple[str, str]] = []
        reference: dict[str, Any] = {}
        image = None
        for name, value in sent.multi_items():
            if isinstance(value, UploadFile):
                if name != REFERENCE:
                    raise errors.invalid(name, f"is a file: only {REFERENCE} may be one")
                who = access.known(request)
                assert who is not None  # before the body was read
                serving = service.of(request)
                image = await run_in_threadpool(receiving.image, serving, who, value)
            elif inside := re.fullmatch(rf"{REFERENCE}\[(file_id|image_url)\]", name):
                reference = {REFERENCE: {inside[1]: value}}
            elif name.startswith("{"):
                raise errors.invalid("body", "JSON needs Content-Type: application/json")
            else:
                texts.append((name, value))
        return Asked(fields=form.values(texts) | reference, image=image)


@router.post("/videos", response_model=Video, openapi_extra=BODY)
def create(
    asked: Annotated[Asked, Depends(_asked)],
    serving: Serving,
    principal: access.Submitter,
) -> dict[str, Any]:
    """One prompt, one video. Also takes `seed` and the other keys of a prompt file."""
    pictures = images_for(serving, principal)
    row = as_row(asked.fields)
    if asked.image is not None:
        if "image" in row:
            raise errors.invalid(REFERENCE, readers.BOTH_GIVEN)
        row["image"] = pictures.give(asked.image)
    elif str(row.get("image")).startswith("data:"):
        row["image"] = pictures.give(row["image"])
    preset = preset_of(serving, row.pop("model", None), with_image="image" in row)
    asked_model = asked.fields.get("model") or preset.name
    answer: dict[str, Any] = {}

    def beside(session: Session, batch_id: str) -> None:
        job = session.scalars(select(Job).where(Job.batch_id == batch_id)).one()
        requests.add(
            session,
            api=requests.VIDEOS,
            owner=principal.owner,
            name=requests.video_name(job.id),
            batch_id=batch_id,
            body={"model": asked_model},
        )
        # Before the commit: after it, a database that goes away would make this a failure.
        answer.update(shape(session, job))

    serving.submit_rows(
        [row], options=options(serving, preset, principal), pictures=pictures, beside=beside
    )
    return answer


def as_row(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a create request as a row of a prompt file, with its model."""
    row = {key: value for key, value in fields.items() if value is not None and key != REFERENCE}
    if isinstance(row.get("seconds"), str):
        text = row["seconds"].strip()
        row["seconds"] = float(text) if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", text) else text
    reference = fields.get(REFERENCE)
    if reference is not None:
        if "image" in row:
            raise errors.invalid(REFERENCE, readers.BOTH_GIVEN)
        row["image"] = _image(reference)
    return row


def _image(reference: Any) -> str:
    try:
        kind, value = readers.referred(reference)
    except prompt_row.Invalid:
        raise errors.invalid(
            REFERENCE, "must be a file, or an object with file_id or image_url"
        ) from None
    return f"{images.UPLOAD}{value}" if kind == "file_id" else value


def preset_of(serving: service.Service, model: Any, *, with_image: bool) -> presets.Preset:
    """The preset that a client calls its model. NotFound names those that there are."""
    if not isinstance(model, str | None):
        raise errors.invalid("model", "must be the name of a preset")
    if model is None or model in ALIASES:
        return serving.default_preset(with_image=with_image)
    return serving.preset(model)


@router.get("/videos")
def list_videos(
    serving: Serving,
    principal: access.Reader,
    after: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> dict[str, Any]:
    """Those that were made by `POST /v1/videos`."""
    with serving.db.reading() as session:
        rows = requests.page(
            session,
            api=requests.VIDEOS,
            owner=principal.sees,
            after=after,
            limit=limit + 1,
            oldest_first=order == "asc",
        )
        jobs = [
            queries.jobs(session, row.batch_id, limit=1)[0]
            for row in rows[:limit]
            if row.batch_id is not None
        ]
        found = shapes(session, jobs)
    return page_of(found, has_more=len(rows) > limit)


def page_of(found: list[dict[str, Any]], *, has_more: bool) -> dict[str, Any]:
    return {
        "object": "list",
        "data": found,
        "first_id": found[0]["id"] if found else None,
        "last_id": found[-1]["id"] if found else None,
        "has_more": has_more,
    }


@router.get("/videos/{video_id}", response_model=Video)
def retrieve(video_id: str, serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """How far it is."""
    with serving.db.reading() as session:
        return shape(session, _find(session, video_id, principal))


@router.head("/videos/{video_id}/content", include_in_schema=False)
@router.get(
    "/videos/{video_id}/content", response_class=Response, responses=answers.bytes_of("video/mp4")
)
def content(
    video_id: str,
    request: Request,
    serving: Serving,
    principal: access.Reader,
    variant: str = "video",
) -> Response:
    """The mp4; understands Range."""
    if variant != "video":
        raise errors.invalid("variant", "must be video: there are no thumbnails")
    with serving.db.reading() as session:
        job = _find(session, video_id, principal)
        winner = queries.winning_attempt(session, job)
        deleted_at = requests.video_deleted_at(session, job) if winner else None
    if winner is None or deleted_at is not None:
        why = videos.why_none(STATUSES[job.state], deleted_at=deleted_at)
        raise errors.NotFound(f"{video_id} has no content: {why}")
    return videos.video_of(request, serving, winner, name=f"{video_id}.mp4")


@router.delete("/videos/{video_id}")
def delete(video_id: str, serving: Serving, principal: access.Submitter) -> dict[str, Any]:
    """Stops it if it is not finished, and deletes what is stored of it."""
    with serving.db.reading() as session:
        job = _find(session, video_id, principal)
    winner, asked_at = serving.db.write(_stop, job.id)
    if winner is not None and winner.video_key is not None:
        with serving.storing():
            serving.store.delete(winner.video_key)
            serving.store.delete(results.sidecar_key(job.batch_id, job.id, winner.id))
    serving.db.write(_mark_deleted, job, asked_at)
    return {"id": video_id, "deleted": True, "object": "video.deleted"}


def _stop(session: Session, job_id: int) -> tuple[Attempt | None, datetime]:
    """The attempt whose video is to go, and the moment: what succeeds later is another video."""
    orders.cancel_job(session, job_id)
    job = session.get_one(Job, job_id, populate_existing=True)
    return queries.winning_attempt(session, job), database.now(session)


def _mark_deleted(session: Session, job: Job, asked_at: datetime) -> None:
    name = requests.video_name(job.id)
    owner = session.get_one(Batch, job.batch_id).owner
    row = requests.get(session, api=requests.VIDEOS, owner=owner, name=name)
    if row is None:  # of another API's batch
        row = requests.add(
            session, api=requests.VIDEOS, owner=owner, name=name, batch_id=job.batch_id, body={}
        )
    # Another request may have deleted a later video meanwhile.
    row.deleted_at = max(asked_at, row.deleted_at or asked_at)


@router.get("/models/{name}")
def retrieve_model(name: str, serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """A preset. 404 names those that there are."""
    return _model(serving.preset(name))


@router.get("/models")
def list_models(serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """The presets."""
    return {"object": "list", "data": [_model(preset) for preset in serving.usable_presets()]}


def _model(preset: presets.Preset) -> dict[str, Any]:
    return {"id": preset.name, "object": "model", "created": 0, "owned_by": "rushes"}


def _find(session: Session, video_id: str, principal: access.Principal) -> Job:
    number = re.fullmatch(r"video_([0-9]{1,18})", video_id)
    if number is None:
        raise errors.NotFound(f"no video {video_id[:60]!r}")
    try:
        job = finding.job(session, int(number[1]), principal)
    except errors.NotFound:
        raise errors.NotFound(f"no video {video_id!r}") from None
    if requests.delete_asked_at(session, job) is not None:
        raise errors.NotFound(f"no video {video_id!r}: it was deleted")
    return job


def shape(session: Session, job: Job) -> dict[str, Any]:
    """OpenAI's video object of a job."""
    return shapes(session, [job])[0]


def shapes(session: Session, jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Of many, with no more queries than of one."""
    their_batches = select(Batch).where(Batch.id.in_({job.batch_id for job in jobs}))
    batches = {batch.id: batch for batch in session.scalars(their_batches)}
    their_looks = select(Look).where(Look.id.in_({job.look_id for job in jobs}))
    looks = {look.id: look.body for look in session.scalars(their_looks)}
    attempts = queries.running_attempts(session, jobs)
    asked = requests.bodies(
        session,
        api=requests.VIDEOS,
        owners={batch.owner for batch in batches.values()},
        names=[requests.video_name(job.id) for job in jobs],
    )
    found = []
    for job in jobs:
        batch, attempt = batches[job.batch_id], attempts.get(job.id)
        body = asked.get((batch.owner, requests.video_name(job.id)), {})
        found.append(_shape(job, batch=batch, look=looks[job.look_id], attempt=attempt, asked=body))
    return found


def _shape(
    job: Job,
    *,
    batch: Batch,
    look: Mapping[str, Any],
    attempt: Attempt | None,
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "id": requests.video_name(job.id),
        "object": "video",
        "status": STATUSES[job.state],
        "progress": progress(job, attempt),
        "created_at": seconds(batch.created_at),
        "completed_at": seconds(job.finished_at)
        if job.state is states.JobState.SUCCEEDED
        else None,
        "expires_at": None,
        "error": _error(job),
        "model": asked.get("model", batch.preset),
        "prompt": job.prompt,
        "seconds": f"{look['num_frames'] / look['fps']:g}",
        "size": f"{look['width']}x{look['height']}",
        "remixed_from_video_id": None,
        "seed": job.seed,
    }


def seconds(moment: datetime | None) -> int | None:
    return None if moment is None else int(moment.timestamp())


def progress(job: Job, attempt: Attempt | None) -> int:
    """Per cent, from the stage and its step; an estimate."""
    if job.state is states.JobState.SUCCEEDED:
        return 100
    if job.state is not states.JobState.RUNNING or attempt is None or attempt.stage not in STAGES:
        return 0
    begins = list(STAGES.values())
    place = list(STAGES).index(attempt.stage)
    start, end = begins[place], [*begins, 99][place + 1]
    done = attempt.step / attempt.steps if attempt.steps else 0.0
    return int(start + (end - start) * min(done, 1.0))


def _error(job: Job) -> dict[str, str] | None:
    if job.state is states.JobState.CANCELLED:
        if job.failure_kind is states.FailureKind.DEADLINE:
            return {"code": "batch_expired", "message": job.error or ""}
        return {"code": "cancelled", "message": "it was cancelled"}
    if job.state is states.JobState.FAILED:
        return {"code": str(job.failure_kind), "message": job.error or ""}
    return None
