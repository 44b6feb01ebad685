"""OpenAI's batches API over prompt files in its JSONL format."""

import json
import secrets
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, BinaryIO

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from jobs import cancelling, errors, prompt_row, readers, requests, uploads
from jobs.schema import ApiRequest, Batch, StoredFile
from jobs.web import access, answers, openai_files, openai_videos, service
from jobs.web.batches import Serving, images_for, options
from jobs.web.openai_videos import REFERENCE

router = APIRouter(
    prefix="/v1/batches",
    tags=["OpenAI"],
    responses=answers.OPENAI_ERRORS,
    route_class=access.ApiRoute,
)

API = "batches"
MAX_ERRORS = 1_000
WINDOWS = {"24h": timedelta(hours=24)}
"""What is not finished by then is not rendered, as OpenAI has it."""


class NewBatch(BaseModel):
    input_file_id: str = Field(max_length=100)
    endpoint: str = Field(max_length=100)
    completion_window: str = Field("24h", max_length=20)
    metadata: dict[str, str] | None = None


@router.post("")
def create(new: NewBatch, serving: Serving, principal: access.Submitter) -> dict[str, Any]:
    """A batch of an uploaded file. One with bad lines is `failed`; `errors` names them."""
    if new.endpoint != readers.VIDEOS_URL:
        raise errors.invalid("endpoint", f"must be {readers.VIDEOS_URL}")
    if new.completion_window not in WINDOWS:
        raise errors.invalid("completion_window", f"must be {' or '.join(WINDOWS)}")
    try:
        prompt_row.check_metadata(new.metadata or {})
    except prompt_row.Invalid as wrong:
        raise errors.invalid("metadata", str(wrong)) from None
    with serving.db.reading() as session:
        file = uploads.find(session, new.input_file_id, owner=principal.sees)
    try:
        return _submitted(new, file, serving, principal)
    except errors.InvalidInput as refused:
        return _refused(new, refused, serving, principal)


def _submitted(
    new: NewBatch, file: StoredFile, serving: service.Service, principal: access.Principal
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rushes-batch-") as folder:
        path = Path(folder, "input.jsonl")
        with serving.storing():
            serving.store.download(file.key, path)
        with path.open("rb") as source, tempfile.TemporaryFile() as rows:
            models, with_image = _convert(source, rows)
            if len(models) > 1:
                raise errors.invalid(file.name, f"all lines need one model, got {sorted(models)}")
            model = next(iter(models), None)
            try:
                preset = openai_videos.preset_of(serving, model, with_image=with_image)
            except errors.NotFound as unknown:
                raise errors.invalid(file.name, str(unknown)) from unknown
            answer: dict[str, Any] = {}

            def beside(session: Session, batch_id: str) -> None:
                # Before the commit: after it, a database that goes away would make this a failure.
                answer.update(_added(session, new, principal, batch_id))

            serving.submit(
                rows,
                source=file.name,
                format="jsonl",
                options=options(
                    serving, preset, principal, deadline=WINDOWS[new.completion_window]
                ),
                pictures=images_for(serving, principal),
                beside=beside,
            )
    return answer


def _convert(source: BinaryIO, target: BinaryIO) -> tuple[set[str], bool]:
    """Input references become images, line by line; the models, and whether there are images.

    What is no request of theirs is left as it is: the reader of prompt files says what is wrong.
    """
    models: set[str] = set()
    with_image = False
    while line := source.readline(readers.MAX_LINE_BYTES + 2):
        try:
            envelope = readers.json_value(line.decode("utf-8-sig"))
            body = envelope["body"]
            model = body.get("model")
            if REFERENCE in body:
                given = {key: body.pop(key) for key in (REFERENCE, "image") if key in body}
                body |= openai_videos.as_row(given)
                line = json.dumps(envelope).encode() + b"\n"
        except (
            errors.InvalidInput,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
        ):
            target.write(line)
            continue
        with_image = with_image or "image" in body
        if isinstance(model, str):
            models.add(model)
        target.write(line)
    target.seek(0)
    return models, with_image


def _refused(
    new: NewBatch,
    refused: errors.InvalidInput,
    serving: service.Service,
    principal: access.Principal,
) -> dict[str, Any]:
    data = [
        {"code": "invalid_line", "line": problem.line, "message": problem.message, "param": None}
        for problem in refused.problems[:MAX_ERRORS]
    ]
    with serving.db.transaction() as session:
        return _added(session, new, principal, None, errors=data)


def _added(
    session: Session,
    new: NewBatch,
    principal: access.Principal,
    batch_id: str | None,
    **more: Any,
) -> dict[str, Any]:
    row = requests.add(
        session,
        api=API,
        owner=principal.owner,
        name=f"batch_{secrets.token_hex(12)}",
        batch_id=batch_id,
        body=new.model_dump() | more,
    )
    return _shape(session, row)


@router.get("")
def list_batches(
    serving: Serving,
    principal: access.Reader,
    after: Annotated[str | None, Query(max_length=200)] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> dict[str, Any]:
    """Newest first; those that were made by `POST /v1/batches`."""
    with serving.db.reading() as session:
        rows = requests.page(session, api=API, owner=principal.sees, after=after, limit=limit + 1)
        found = [_shape(session, row) for row in rows[:limit]]
    return openai_videos.page_of(found, has_more=len(rows) > limit)


@router.get("/{batch_name}")
def retrieve(batch_name: str, serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """How far it is."""
    return _found(batch_name, serving, principal)


@router.post("/{batch_name}/cancel")
def cancel(batch_name: str, serving: Serving, principal: access.Submitter) -> dict[str, Any]:
    """What waits is cancelled now, what runs stops at its next step."""
    with serving.db.reading() as session:
        row = requests.find(session, api=API, owner=principal.sees, name=batch_name)
    if row.batch_id is not None:
        cancelling.cancel_batch(serving.db, row.batch_id)
    return _found(batch_name, serving, principal)


def _found(name: str, serving: service.Service, principal: access.Principal) -> dict[str, Any]:
    with serving.db.reading() as session:
        row = requests.find(session, api=API, owner=principal.sees, name=name)
        return _shape(session, row)


def _shape(session: Session, row: ApiRequest) -> dict[str, Any]:
    """OpenAI's batch object."""
    batch = None if row.batch_id is None else session.get_one(Batch, row.batch_id)
    asked = {key: row.body.get(key) for key in NewBatch.model_fields}
    common = {
        "id": row.name,
        "object": "batch",
        **asked,
        "created_at": openai_videos.seconds(row.created_at),
        "errors": None,
        "output_file_id": None,
        "error_file_id": None,
    }
    if batch is None:
        return common | {
            "status": "failed",
            "failed_at": openai_videos.seconds(row.created_at),
            "errors": {"object": "list", "data": row.body.get("errors", [])},
            "request_counts": {"total": 0, "completed": 0, "failed": 0},
        }
    return common | _stored_shape(batch)


def _status(batch: Batch) -> str:
    """OpenAI's word. Jobs that were cancelled one by one leave their batch `completed`.

    OpenAI calls a batch so also when every request of it failed; here that is `failed`.
    """
    if batch.finished_at is None:
        if batch.cancel_requested_at is not None:
            return "cancelling"
        return "in_progress" if batch.expired_at is None else "finalizing"
    if batch.cancelled and batch.cancel_requested_at is not None:
        return "cancelled"
    if batch.cancelled and batch.expired_at is not None:
        return "expired"
    return "failed" if batch.failed == batch.total else "completed"


def _stored_shape(batch: Batch) -> dict[str, Any]:
    status = _status(batch)
    ended = openai_videos.seconds(batch.finished_at)
    without_video = batch.failed + batch.cancelled
    return {
        "status": status,
        "in_progress_at": openai_videos.seconds(batch.created_at),
        "completed_at": ended if status == "completed" else None,
        "failed_at": ended if status == "failed" else None,
        "cancelled_at": ended if status == "cancelled" else None,
        "cancelling_at": openai_videos.seconds(batch.cancel_requested_at),
        "expires_at": openai_videos.seconds(batch.deadline_at),
        "finalizing_at": openai_videos.seconds(batch.expired_at),
        "expired_at": ended if status == "expired" else None,
        "output_file_id": openai_files.result_file_id(batch.id, openai_files.OUTPUT)
        if ended and batch.succeeded
        else None,
        "error_file_id": openai_files.result_file_id(batch.id, openai_files.ERRORS)
        if ended and without_video
        else None,
        "request_counts": {
            "total": batch.total,
            "completed": batch.succeeded,
            "failed": without_video,
        },
    }
