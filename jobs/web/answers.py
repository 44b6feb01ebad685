"""What our own API answers, for its OpenAPI document. `jobs.shapes` makes it; keys may be added."""

from datetime import datetime
from typing import Any

from pydantic import BaseModel, ConfigDict


class Answer(BaseModel):
    model_config = ConfigDict(extra="allow")


class Problem(Answer):
    """RFC 9457."""

    type: str
    title: str
    status: int
    detail: str


class Counts(Answer):
    total: int
    queued: int
    running: int
    succeeded: int
    failed: int
    cancelled: int


class Batch(Answer):
    batch_id: str
    name: str | None
    preset: str
    priority: int
    state: str
    created_at: datetime
    finished_at: datetime | None
    counts: Counts


class Submitted(Answer):
    batch_id: str
    is_new: bool
    jobs: int
    notes: list[str]
    skipped: list[dict[str, Any]]


class Batches(Answer):
    batches: list[Batch]
    next_cursor: str | None


class Failure(Answer):
    """Failed jobs that ended in the same way."""

    kind: str | None
    quarantined: bool
    count: int
    may_go_well: bool
    worker_count: int
    workers: list[dict[str, Any]]
    example: dict[str, Any]


class Progress(Batch):
    rate_per_minute: float | None
    seconds_left: float | None
    running: list[dict[str, Any]]
    failures: list[Failure]
    queues_without_workers: list[str]
    refused_by: list[dict[str, Any]]


class JobLine(Answer):
    job_id: int
    position: int
    custom_id: str | None
    state: str
    is_paused: bool
    prompt: str
    seed: int
    not_before: datetime | None
    worker: str | None
    error: dict[str, Any] | None


class Jobs(Answer):
    jobs: list[JobLine]
    next_cursor: str | None


class Job(JobLine):
    batch_id: str
    preset: str
    look: dict[str, Any]
    video: dict[str, Any] | None
    video_deleted_at: datetime | None
    attempts: list[dict[str, Any]]


class Cancelled(Answer):
    cancelled: int
    stopping: int


class Retried(Answer):
    retried: int
    doubtful: dict[str, int]
    batch_is_paused: bool


class Results(Answer):
    output: str | None
    errors: str | None
    manifest: str | None


class Upload(Answer):
    upload_id: str
    image: str | None
    bytes: int
    sha256: str


class Schedule(Answer):
    name: str
    state: str
    cron: str
    zone: str
    preset: str
    misfire: str
    overlap: str
    next_fire_at: datetime | None


class Schedules(Answer):
    schedules: list[Schedule]


class Firings(Answer):
    firings: list[dict[str, Any]]


class Fired(Answer):
    batch_id: str


class Changed(Answer):
    name: str
    state: str
    changed: bool


class ChangedJob(Answer):
    job_id: int
    state: str
    is_paused: bool
    changed: bool


class Workers(Answer):
    workers: list[dict[str, Any]]


class Load(Answer):
    queued: int
    queued_paused: int
    running: int
    idle_since: datetime | None
    span_seconds: int
    is_cut: bool
    cut_at: datetime | None
    spans: list[dict[str, Any]]
    history: list[dict[str, Any]]


class Presets(Answer):
    presets: list[dict[str, Any]]


class OpenAIError(Answer):
    """OpenAI's error object."""

    error: dict[str, Any]


class Detail(Answer):
    """How LightX2V's server tells an error."""

    detail: str


_MEANINGS = {
    400: "The request cannot be read.",
    401: "No valid token.",
    403: "The token may not do this.",
    404: "There is no such thing.",
    409: "The name or the key is taken, by other content.",
    410: "The data of the batch were deleted as old.",
    413: "Larger than RUSHES_WEB_MAX_BYTES, or more values than may be parsed.",
    422: "Something in it is wrong. Nothing was stored.",
    429: "The rate limit; Retry-After says when.",
    502: "The store refuses what it is asked.",
    503: "The database or the store does not answer; Retry-After says when.",
}


Responses = dict[int | str, dict[str, Any]]


def _documented(model: type[Answer]) -> Responses:
    return {status: {"model": model, "description": text} for status, text in _MEANINGS.items()}


_PROBLEM = {"application/problem+json": {"schema": Problem.model_json_schema()}}
PROBLEMS: Responses = {
    status: {"content": _PROBLEM, "description": text} for status, text in _MEANINGS.items()
}
OPENAI_ERRORS = _documented(OpenAIError)
# What is 422 elsewhere is 400 there. A range of statuses keeps FastAPI from naming 422 itself.
OPENAI_ERRORS["4XX"] = OPENAI_ERRORS.pop(422)
LIGHTX2V_ERRORS = _documented(Detail)
REPEATED: Responses = {
    200: {
        "model": Submitted,
        "description": "The Idempotency-Key was used before, with the same content.",
    }
}


def bytes_of(*media_types: str) -> Responses:
    """Of a file that may be asked for in part."""
    content: dict[str, Any] = {media_type: {} for media_type in media_types}
    return {
        200: {"content": content},
        206: {"content": content, "description": "The range that was asked for."},
        304: {"description": "It is what If-None-Match says."},
        416: {"description": "There is no such range."},
    }
