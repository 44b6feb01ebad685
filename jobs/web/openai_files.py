"""OpenAI's files API: uploads, and the two result files of a batch as files of theirs."""

import functools
import json
import re
from collections.abc import Iterator
from datetime import datetime
from typing import Annotated, Any, Literal

from fastapi import APIRouter, File, Form, Query, Request, Response, UploadFile
from fastapi.responses import StreamingResponse

from jobs import database, errors, queries, states, uploads
from jobs.schema import Batch, Job, StoredFile
from jobs.web import access, answers, finding, objects, openai_videos, receiving, service
from jobs.web.batches import Serving

router = APIRouter(
    prefix="/v1/files",
    tags=["OpenAI"],
    responses=answers.OPENAI_ERRORS,
    route_class=access.ApiRoute,
)

OUTPUT, ERRORS = "output", "errors"
RESULT_TYPE = "application/jsonl"
RESULT_FILE = re.compile(r"file-([0-9a-z-]{1,20})_(output|errors)")
PURPOSES = ("batch", uploads.IMAGE, "user_data")
ROWS_AT_ONCE = 500
KEPT_SIZES = 1_000  # of result files; to know one, the whole file is made


@router.post("")
def create(
    file: Annotated[UploadFile, File()],
    purpose: Annotated[str, Form()],
    serving: Serving,
    principal: access.Submitter,
) -> dict[str, Any]:
    """A prompt file (purpose `batch`) or an image (`vision`)."""
    if purpose not in PURPOSES:
        raise errors.invalid("purpose", f"must be one of {', '.join(PURPOSES)}")
    if purpose == uploads.IMAGE:
        receiving.image(serving, principal, file)
    return _shape(receiving.keep(serving, principal, file, purpose=purpose))


@router.get("")
def list_files(
    serving: Serving,
    principal: access.Reader,
    after: Annotated[str | None, Query(max_length=100)] = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
    purpose: str | None = None,
) -> dict[str, Any]:
    """Uploaded files; result files are named by their batch."""
    with serving.db.reading() as session:
        last = None
        if after is not None:
            last = uploads.place(session, after, owner=principal.sees)
        rows = uploads.every(
            session,
            owner=principal.sees,
            purpose=purpose,
            after=last,
            limit=limit + 1,
            oldest_first=order == "asc",
        )
    found = [_shape(row) for row in rows[:limit]]
    return openai_videos.page_of(found, has_more=len(rows) > limit)


@router.get("/{file_id}")
def retrieve(file_id: str, serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """Name, size and purpose."""
    if match := RESULT_FILE.fullmatch(file_id):
        return _result_shape(serving, _batch(serving, match[1], principal), match[2])
    with serving.db.reading() as session:
        return _shape(uploads.find(session, file_id, owner=principal.sees))


@router.head("/{file_id}/content", include_in_schema=False)
@router.get(
    "/{file_id}/content",
    response_class=Response,
    responses=answers.bytes_of("application/octet-stream", RESULT_TYPE),
)
def content(file_id: str, request: Request, serving: Serving, principal: access.Reader) -> Response:
    """The bytes."""
    if match := RESULT_FILE.fullmatch(file_id):
        batch = _batch(serving, match[1], principal)
        if request.method == "HEAD":
            size = _size_bytes(serving.db, batch.id, match[2], batch.finished_at)
            return Response(headers={"Content-Length": str(size)}, media_type=RESULT_TYPE)
        pages = _pages(serving.db, batch.id, match[2])
        return StreamingResponse(pages, media_type=RESULT_TYPE)
    with serving.db.reading() as session:
        row = uploads.find(session, file_id, owner=principal.sees)
    return objects.respond(
        request,
        serving,
        row.key,
        size_bytes=row.size_bytes,
        sha256=row.sha256,
        content_type="application/octet-stream",
    )


@router.delete("/{file_id}")
def delete(file_id: str, serving: Serving, principal: access.Submitter) -> dict[str, Any]:
    """Forget an upload. The bytes of an image stay while they may be that of a job."""
    with serving.db.reading() as session:
        row = uploads.find(session, file_id, owner=principal.sees)
    # Before the row: who hears that the store is away asks again.
    if row.key == uploads.own_key(row.id):
        with serving.storing():
            serving.writing_guard.require()
            serving.store.delete(row.key)
    serving.db.write(uploads.remove, row.id)
    return {"id": file_id, "object": "file", "deleted": True}


def _shape(row: StoredFile) -> dict[str, Any]:
    return {
        "id": row.id,
        "object": "file",
        "bytes": row.size_bytes,
        "created_at": openai_videos.seconds(row.created_at),
        "filename": row.name,
        "purpose": row.purpose,
        "status": "processed",
    }


def _result_shape(serving: service.Service, batch: Batch, which: str) -> dict[str, Any]:
    return {
        "id": result_file_id(batch.id, which),
        "object": "file",
        "bytes": _size_bytes(serving.db, batch.id, which, batch.finished_at),
        "created_at": openai_videos.seconds(batch.finished_at),
        "filename": f"{batch.id}_{which}.jsonl",
        "purpose": "batch_output",
        "status": "processed",
    }


def result_file_id(batch_id: str, which: str) -> str:
    return f"file-{batch_id}_{which}"


def _batch(serving: service.Service, batch_id: str, principal: access.Principal) -> Batch:
    with serving.db.reading() as session:
        batch = finding.batch(session, batch_id, principal)
    if batch.finished_at is None:
        raise errors.NotFound(f"batch {batch_id} is not finished")
    return batch


@functools.lru_cache(maxsize=KEPT_SIZES)
def _size_bytes(
    db: database.Database, batch_id: str, which: str, finished_at: datetime | None
) -> int:
    """Counted once for each end of a batch, which `finished_at` tells apart."""
    return sum(len(page) for page in _pages(db, batch_id, which))


def _pages(db: database.Database, batch_id: str, which: str) -> Iterator[bytes]:
    """OpenAI's line per request, of a page of jobs at a time."""
    wanted = (
        (states.JobState.SUCCEEDED,)
        if which == OUTPUT
        else (states.JobState.FAILED, states.JobState.CANCELLED)
    )
    after = -1
    while True:
        with db.reading() as session:
            jobs = queries.jobs(
                session, batch_id, states_wanted=wanted, after=after, limit=ROWS_AT_ONCE
            )
            videos = openai_videos.shapes(session, jobs)
        yield b"".join(_line(job, video) for job, video in zip(jobs, videos, strict=True))
        if len(jobs) < ROWS_AT_ONCE:
            return
        after = jobs[-1].position


def _line(job: Job, video: dict[str, Any]) -> bytes:
    error = video["error"]
    line = {
        "id": f"batch_req_{job.id}",
        "custom_id": job.custom_id,
        "response": None
        if error
        else {"status_code": 200, "request_id": f"req_{job.id}", "body": video},
        "error": error,
    }
    return json.dumps(line).encode() + b"\n"
