"""The HTTP API of LightX2V's server, over a queue that outlives restarts.

Where ours differs: a cancel stops the device at the next step; a request knows nothing of those
before it; what cannot be had (a file of this machine, audio, an unknown LoRA) is refused.
"""

import base64
import binascii
import re
import uuid
from pathlib import PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, File, Form, HTTPException, Request, Response, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, func, select
from sqlalchemy.orm import Session

from jobs import cancelling, errors, queries, requests, states
from jobs.schema import ApiRequest, Batch, Job
from jobs.web import access, answers, images, receiving, service, videos
from jobs.web.batches import Serving, images_for, options

router = APIRouter(
    prefix="/v1", tags=["LightX2V"], responses=answers.LIGHTX2V_ERRORS, route_class=access.ApiRoute
)

API = "lightx2v"
MAX_LISTED = 1_000
QUEUE_SIZE = 1_000_000  # there is no bound; their clients want a number
STATUSES = {
    states.JobState.QUEUED: "pending",
    states.JobState.RUNNING: "processing",
    states.JobState.SUCCEEDED: "completed",
    states.JobState.FAILED: "failed",
    states.JobState.CANCELLED: "cancelled",
}
RESERVED = frozenset({"video", "image", "queue", "all", ".", ".."})
NOT_RENDERED = (
    "last_frame_path",
    "image_mask_path",
    "audio_path",
    "video_path",
    "presigned_url",
    "talk_objects",
    "sr_ratio",
)
"""Fields that would change the video and that no model here has a use for."""


class VideoTask(BaseModel):
    """Their request. What the preset decides (steps, target_fps and so on) has no effect."""

    model_config = ConfigDict(extra="ignore")

    task_id: str | None = Field(None, max_length=150)
    prompt: str = ""
    negative_prompt: str | None = None
    image_path: str | None = Field(None, description="https:// address, data URL or base64.")
    save_result_path: str | None = Field(None, max_length=1_000)
    seed: int | None = None
    target_video_length: int | None = Field(None, description="Frames.")
    num_frames: int | None = Field(None, description="The same, as they call it since 2026.")
    target_shape: list[int] | None = Field(None, description="Height and width.")
    size: list[int] | None = Field(None, description="The same, as they call it since 2026.")
    lora_name: str | None = None
    lora_strength: float = 1.0
    last_frame_path: str | None = None
    image_mask_path: str | None = None
    audio_path: str | None = None
    video_path: str | None = None
    presigned_url: str | None = None
    talk_objects: list[Any] | None = None
    sr_ratio: float | None = None


@router.post("/tasks/video/")
@router.post("/tasks/video", include_in_schema=False)
@router.post("/tasks/", include_in_schema=False)
@router.post("/tasks", include_in_schema=False)
def create(task: VideoTask, serving: Serving, principal: access.Submitter) -> dict[str, Any]:
    """One prompt, one video."""
    pictures = images_for(serving, principal)
    image = _image(task.image_path, pictures) if task.image_path else None
    return _submit(task, image, pictures, serving, principal)


@router.post("/tasks/video/form")
def create_by_form(
    serving: Serving,
    principal: access.Submitter,
    prompt: Annotated[str, Form()] = "",
    image_file: Annotated[UploadFile | None, File()] = None,
    last_frame_file: Annotated[UploadFile | None, File()] = None,
    audio_file: Annotated[UploadFile | None, File()] = None,
    negative_prompt: Annotated[str, Form()] = "",
    save_result_path: Annotated[str, Form(max_length=1_000)] = "",
    seed: Annotated[int | None, Form()] = None,
    target_video_length: Annotated[int | None, Form()] = None,
    num_frames: Annotated[int | None, Form()] = None,
) -> dict[str, Any]:
    """The same with the image as a file."""
    for name, file in (("last_frame_file", last_frame_file), ("audio_file", audio_file)):
        if file is not None and file.filename:
            raise HTTPException(400, f"{name}: no model here has a use for it")
    pictures = images_for(serving, principal)
    image = None
    if image_file is not None and image_file.filename:
        image = pictures.give(receiving.image(serving, principal, image_file))
    task = VideoTask(
        prompt=prompt,
        negative_prompt=negative_prompt,
        save_result_path=save_result_path or None,
        seed=seed,
        target_video_length=target_video_length,
        num_frames=num_frames,
    )
    return _submit(task, image, pictures, serving, principal)


def _submit(
    task: VideoTask,
    image: str | None,
    pictures: images.WebImages,
    serving: service.Service,
    principal: access.Principal,
) -> dict[str, Any]:
    task_id = task.task_id or str(uuid.uuid4())
    has_slash = "/" in task_id or "%2f" in task_id.lower()
    if task_id in RESERVED or has_slash or not task_id.isprintable():
        raise HTTPException(400, "task_id: printable characters without /, and no word of a path")
    path = _file_name(task.save_result_path or f"{task_id}.mp4")

    def beside(session: Session, batch_id: str) -> None:
        requests.add(
            session,
            api=API,
            owner=principal.owner,
            name=task_id,
            batch_id=batch_id,
            body={"save_result_path": path},
        )

    try:
        serving.submit_rows(
            [_row(task, image)],
            options=options(
                serving, serving.default_preset(with_image=image is not None), principal
            ),
            pictures=pictures,
            beside=beside,
        )
    except errors.InvalidInput as error:
        raise HTTPException(400, "; ".join(p.message for p in error.problems)) from None
    except requests.NameTaken as error:
        raise HTTPException(409, f"task_id {error}") from None
    return {"task_id": task_id, "task_status": "pending", "save_result_path": path}


def _row(task: VideoTask, image: str | None) -> dict[str, Any]:
    for name in NOT_RENDERED:
        if getattr(task, name):
            raise HTTPException(400, f"{name}: no model here has a use for it")
    row: dict[str, Any] = {"prompt": task.prompt, "seed": task.seed, "image": image}
    row["num_frames"] = _one(task, "target_video_length", "num_frames")
    if task.negative_prompt:
        row["negative_prompt"] = task.negative_prompt
    if shape := _one(task, "target_shape", "size"):
        if len(shape) != 2:
            raise HTTPException(400, "target_shape or size: must be [height, width]")
        row["height"], row["width"] = shape
    if task.lora_name:
        name = task.lora_name.removesuffix(".safetensors")
        row["lora"] = [{"name": name, "strength": task.lora_strength}]
    return row


def _one(task: VideoTask, old: str, new: str) -> Any:
    """What is asked for under its older or its newer name."""
    given = [value for name in (old, new) if (value := getattr(task, name)) not in (None, [])]
    if len(given) == 2 and given[0] != given[1]:
        raise HTTPException(400, f"{new}: {old} says something else")
    return given[0] if given else None


def _image(text: str, pictures: images.WebImages) -> str:
    """What the row calls the image. Their clients send base64, with or without `data:`."""
    if re.match(r"https?://", text) or text.startswith((images.UPLOAD, "s3://")):
        return text
    data = text.partition(",")[2] if text.startswith("data:") else text
    try:
        return pictures.give(base64.b64decode("".join(data.split()), validate=True))
    except (binascii.Error, ValueError):
        raise HTTPException(
            400,
            "image_path: give an https:// address or base64; files of this machine are not read",
        ) from None


def _file_name(path: str) -> str:
    """What clients call the result. Nothing is ever written there."""
    name = PurePosixPath(path.replace("\\", "/")).name
    return "".join(char if char.isprintable() else "_" for char in name)[:200] or "video.mp4"


@router.get("/tasks/")
@router.get("/tasks", include_in_schema=False)
def list_tasks(serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """The newest thousand, by their ids."""
    with serving.db.reading() as session:
        rows = requests.page(session, api=API, owner=principal.sees, limit=MAX_LISTED)
        return {row.name: _status(row, _job(session, row)) for row in reversed(rows)}


@router.get("/tasks/queue/status")
def queue_status(serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """Counts over all jobs of the owner, not only those of this API."""
    with serving.db.reading() as session:
        queued, running = queries.open_jobs(session, owner=principal.sees)
        active = _active(session, principal)
    return {
        "is_processing": running > 0,
        "current_task": active[0] if active else None,
        "pending_count": queued,
        "active_count": queued + running,
        "queue_size": QUEUE_SIZE,
        "queue_available": max(QUEUE_SIZE - queued - running, 0),
    }


@router.get("/tasks/{task_id}/status")
def task_status(task_id: str, serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """How far it is."""
    with serving.db.reading() as session:
        row = _find(session, task_id, principal)
        return _status(row, _job(session, row))


@router.head("/tasks/{task_id}/result", include_in_schema=False)
@router.get(
    "/tasks/{task_id}/result", response_class=Response, responses=answers.bytes_of("video/mp4")
)
def task_result(
    task_id: str, request: Request, serving: Serving, principal: access.Reader
) -> Response:
    """The video; understands Range."""
    with serving.db.reading() as session:
        row = _find(session, task_id, principal)
        job = _job(session, row)
        winner = queries.winning_attempt(session, job)
        deleted_at = requests.video_deleted_at(session, job)
    if winner is None:
        raise HTTPException(404, "Task not completed")
    if deleted_at is not None:
        raise HTTPException(404, videos.why_none(job.state, deleted_at=deleted_at))
    plain = re.sub(r"[^A-Za-z0-9._ -]", "_", row.body["save_result_path"])
    return videos.video_of(request, serving, winner, name=plain)


@router.delete("/tasks/all/running")
def stop_all(serving: Serving, principal: access.Submitter) -> dict[str, str]:
    """All that wait or run, of this API."""
    with serving.db.reading() as session:
        rows = _unfinished(session, principal)
    for row in rows:
        assert row.batch_id is not None
        cancelling.cancel_batch(serving.db, row.batch_id)
    return {"stop_status": "success", "reason": f"{len(rows)} tasks are being stopped."}


@router.delete("/tasks/{task_id}")
def stop(task_id: str, serving: Serving, principal: access.Submitter) -> dict[str, str]:
    """Now if it waits, at its next step if it runs."""
    nothing = {"stop_status": "do_nothing", "reason": "Task not found or already completed."}
    with serving.db.reading() as session:
        row = requests.get(
            session, api=API, owner=principal.sees, name=task_id, own=principal.owner
        )
        if row is None or row.batch_id is None:
            return nothing
    cancelled, stopping = cancelling.cancel_batch(serving.db, row.batch_id)
    if not cancelled + stopping:
        return nothing
    when = "now" if cancelled else "at its next step"
    return {"stop_status": "success", "reason": f"Task stopped {when}."}


@router.get("/service/status")
def service_status(serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """`idle` while a live worker has nothing to do."""
    with serving.db.reading() as session:
        queued, running = queries.open_jobs(session, owner=principal.sees)
        alive = sum(live.is_alive for live in queries.live_workers(session))
        active = _active(session, principal)
        totals = _totals(session, principal)
    is_busy = queued > 0 or running >= max(alive, 1)
    return {
        "service_status": "busy" if is_busy else "idle",
        "current_task": active[0] if active else None,
        "active_tasks": active,
        "pending_tasks": queued,
        "queue_size": QUEUE_SIZE,
        **totals,
    }


@router.get("/service/metadata")
def service_metadata(serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """Of the preset for requests without an image."""
    preset = serving.default_preset(with_image=False)
    with serving.db.reading() as session:
        alive = sum(live.is_alive for live in queries.live_workers(session))
    return {
        "nproc_per_node": alive,
        "model_cls": preset.name,
        "model_path": preset.look.model_path,
    }


def _find(session: Session, task_id: str, principal: access.Principal) -> ApiRequest:
    try:
        return requests.find(
            session, api=API, owner=principal.sees, name=task_id, own=principal.owner
        )
    except errors.NotFound:
        raise HTTPException(404, "Task not found") from None


def _job(session: Session, row: ApiRequest) -> Job:
    assert row.batch_id is not None
    return queries.jobs(session, row.batch_id, limit=1)[0]


def _status(row: ApiRequest, job: Job) -> dict[str, Any]:
    error, kind = job.error, job.failure_kind
    if job.state is states.JobState.CANCELLED:
        error, kind = "Task cancelled by user", None
    is_over = job.state in (states.JobState.FAILED, states.JobState.CANCELLED)
    return {
        "task_id": row.name,
        "status": STATUSES[job.state],
        "start_time": job.started_at or row.created_at,
        "end_time": job.finished_at,
        "error": error if is_over else None,
        "error_type": kind if is_over else None,
        "save_result_path": row.body["save_result_path"],
        "seed": job.seed,
    }


def _is_theirs(principal: access.Principal) -> ColumnElement[bool]:
    """A request of this API that they may see."""
    is_ours = ApiRequest.api == API
    return is_ours if principal.sees is None else is_ours & (ApiRequest.owner == principal.sees)


def _unfinished(session: Session, principal: access.Principal) -> list[ApiRequest]:
    statement = (
        select(ApiRequest)
        .join(Batch, Batch.id == ApiRequest.batch_id)
        .where(_is_theirs(principal), Batch.finished_at.is_(None))
        .order_by(ApiRequest.id)
    )
    return list(session.scalars(statement))


def _active(session: Session, principal: access.Principal) -> list[str]:
    """Ids of running tasks of this API."""
    statement = (
        select(ApiRequest.name)
        .join(Batch, Batch.id == ApiRequest.batch_id)
        .where(_is_theirs(principal), Batch.finished_at.is_(None), Batch.running > 0)
        .order_by(ApiRequest.id)
    )
    return list(session.scalars(statement))


def _totals(session: Session, principal: access.Principal) -> dict[str, int]:
    statement = (
        select(func.count(), func.sum(Batch.succeeded), func.sum(Batch.failed))
        .select_from(ApiRequest)
        .join(Batch, Batch.id == ApiRequest.batch_id)
        .where(_is_theirs(principal))
    )
    total, completed, failed = session.execute(statement).one()
    return {
        "total_tasks": int(total),
        "completed_tasks": int(completed or 0),
        "failed_tasks": int(failed or 0),
    }
