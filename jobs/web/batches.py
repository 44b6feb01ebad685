"""Our own API: batches."""

import hashlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, File, Form, Header, Query, Response, UploadFile
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from jobs import (
    cancelling,
    failures,
    orders,
    presets,
    prompt_row,
    queries,
    readers,
    results,
    shapes,
    states,
    submission,
    watch,
)
from jobs.web import access, answers, bodies, finding, images, service

router = APIRouter(
    prefix="/api/batches", tags=["batches"], responses=answers.PROBLEMS, route_class=access.ApiRoute
)

LINK_SECONDS = 3600
MOST_AT_ONCE = 1_000
MAX_OWNER_IN_KEY = 49

Serving = Annotated[service.Service, Depends(service.of)]
Kinds = list[states.FailureKind]
CustomId = Annotated[str | None, Query(max_length=520)]
Limit = Annotated[int, Query(ge=1, le=MOST_AT_ONCE)]
IdempotencyKey = Annotated[
    str | None,
    Header(min_length=1, max_length=150, description="The same key and content: the same batch."),
]


class NewBatch(BaseModel):
    """Prompts and how they are rendered."""

    model_config = ConfigDict(extra="forbid")

    preset: str = Field(description="A name of GET /api/presets.")
    prompts: list[dict[str, Any]] = Field(
        min_length=1,
        max_length=service.MAX_ROWS,
        description="Each with the keys of a prompt file: prompt, custom_id, seed, image, ...",
    )
    name: str | None = None
    priority: int = Field(0, ge=-prompt_row.MAX_PRIORITY, le=prompt_row.MAX_PRIORITY)
    repeat: int = Field(1, ge=1, le=submission.MAX_REPEAT)
    skip_invalid: bool = False


def images_for(serving: service.Service, principal: access.Principal) -> images.WebImages:
    return images.WebImages(
        config=serving.config,
        base=None,
        store=serving.store,
        db=serving.db,
        owner=principal.sees,
        may_read_buckets=principal.is_admin,
        turns=serving.fetch_turns,
        checking=serving.check_turns.taken,
        checking_far=serving.far_check_turns.taken,
        storing=serving.storing,
    )


def options(
    serving: service.Service,
    preset: presets.Preset,
    principal: access.Principal,
    *,
    key: str | None = None,
    **given: Any,
) -> submission.Options:
    """An owner's idempotency keys are their own."""
    if key is not None and principal.name != access.LOCAL:
        key = _key_of(principal.owner, key)
    return submission.Options(
        preset=preset,
        owner=principal.owner,
        max_queued=serving.config.max_queued_per_owner,
        idempotency_key=key,
        **given,
    )


def _key_of(owner: str, key: str) -> str:
    """No other owner has it; at most 50 characters and the key."""
    if ":" in owner or len(owner) > MAX_OWNER_IN_KEY:
        owner = hashlib.sha256(owner.encode()).hexdigest()[:MAX_OWNER_IN_KEY]
    return f"{owner}:{key}"


@router.post("", status_code=201, response_model=answers.Submitted, responses=answers.REPEATED)
def submit(
    new: bodies.FewKeys[NewBatch],
    serving: Serving,
    principal: access.Submitter,
    response: Response,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Store prompts as a batch: all of them or nothing. 200 when the key was used before."""
    given = new.model_dump(exclude={"preset", "prompts"})
    preset = serving.preset(new.preset)
    is_quick = len(new.prompts) <= service.FEW_ROWS
    with nullcontext() if is_quick else serving.file_turns.taken(principal.owner):
        made = serving.submit_rows(
            new.prompts,
            options=options(serving, preset, principal, key=idempotency_key, **given),
            pictures=images_for(serving, principal),
        )
    return _submitted(made, response)


@router.post("/file", status_code=201, response_model=answers.Submitted, responses=answers.REPEATED)
def submit_file(
    file: Annotated[UploadFile, File(description="JSON Lines, CSV, or a prompt per line.")],
    preset: Annotated[str, Form()],
    serving: Serving,
    principal: access.Submitter,
    response: Response,
    name: Annotated[str | None, Form()] = None,
    priority: Annotated[int, Form(ge=-prompt_row.MAX_PRIORITY, le=prompt_row.MAX_PRIORITY)] = 0,
    repeat: Annotated[int, Form(ge=1, le=submission.MAX_REPEAT)] = 1,
    skip_invalid: Annotated[bool, Form()] = False,
    format: Annotated[readers.Format | None, Form()] = None,
    idempotency_key: IdempotencyKey = None,
) -> dict[str, Any]:
    """Store a prompt file as a batch, as `rushes submit` does."""
    source = file.filename or "prompts"
    found = format or readers.detect_format(source, file.file.read(readers.HEAD_BYTES))
    wanted = options(
        serving,
        serving.preset(preset),
        principal,
        key=idempotency_key,
        name=name,
        priority=priority,
        repeat=repeat,
        skip_invalid=skip_invalid,
    )
    with serving.file_turns.taken(principal.owner):
        made = serving.submit(
            file.file,
            source=source,
            format=found,
            options=wanted,
            pictures=images_for(serving, principal),
        )
    return _submitted(made, response)


def _submitted(made: submission.Submission, response: Response) -> dict[str, Any]:
    response.headers["Location"] = f"/api/batches/{made.batch_id}"
    if not made.is_new:
        response.status_code = 200
    return {
        "batch_id": made.batch_id,
        "is_new": made.is_new,
        "jobs": made.jobs,
        "notes": list(made.plan.notes),
        "skipped": [{"line": p.line, "message": p.message} for p in made.plan.skipped],
    }


@router.get("", response_model=answers.Batches)
def list_batches(
    serving: Serving,
    principal: access.Reader,
    state: Annotated[list[states.BatchState], Query()] = [],  # noqa: B006  # FastAPI copies it
    owner: Annotated[str | None, Query(max_length=200)] = None,
    limit: Limit = 50,
    cursor: Annotated[str | None, Query(max_length=50)] = None,
) -> dict[str, Any]:
    """Newest first. `next_cursor` leads to older ones; null at the end."""
    with serving.db.reading() as session:
        rows = finding.batches(
            session,
            principal,
            limit=limit + 1,
            cursor=cursor,
            owner=owner,
            states_wanted=state,
        )
    more = len(rows) > limit
    return {
        "batches": [shapes.batch(row) for row in rows[:limit]],
        "next_cursor": rows[limit - 1].id if more else None,
    }


@router.get("/{batch_id}", response_model=answers.Progress)
def show(batch_id: str, serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """Counts, pace, what runs and how far, what failed and why."""
    with serving.db.snapshot() as session:
        found = serving.failures.of(session, finding.batch(session, batch_id, principal))
    return shapes.snapshot(watch.look(serving.db, batch_id)) | {"failures": found}


@router.get("/{batch_id}/jobs", response_model=answers.Jobs)
def list_jobs(
    batch_id: str,
    serving: Serving,
    principal: access.Reader,
    state: Annotated[list[states.JobState], Query()] = [],  # noqa: B006  # FastAPI copies it
    kind: Annotated[Kinds, Query()] = [],  # noqa: B006
    quarantined: bool | None = None,
    custom_id: CustomId = None,
    limit: Limit = 100,
    cursor: Annotated[int, Query(ge=-1, lt=2**31)] = -1,
) -> dict[str, Any]:
    """In the order of the file; of a kind: those whose last failure is of it."""
    which = failures.Which(kinds=kind, quarantined=quarantined)
    with serving.db.reading() as session:
        finding.batch(session, batch_id, principal)
        rows = queries.jobs(
            session,
            batch_id,
            states_wanted=state,
            custom_id=custom_id,
            which=which,
            after=cursor,
            limit=limit + 1,
        )
        workers = queries.workers_of(session, rows)
    more = len(rows) > limit
    return {
        "jobs": [shapes.job_line(row, worker=workers.get(row.id)) for row in rows[:limit]],
        "next_cursor": str(rows[limit - 1].position) if more else None,
    }


@router.post("/{batch_id}/cancel", response_model=answers.Cancelled)
def cancel(batch_id: str, serving: Serving, principal: access.Submitter) -> dict[str, int]:
    """What waits is cancelled now, what runs stops at its next step."""
    with serving.db.reading() as session:
        finding.batch(session, batch_id, principal)
    cancelled, stopping = cancelling.cancel_batch(serving.db, batch_id)
    return {"cancelled": cancelled, "stopping": stopping}


@router.post("/{batch_id}/pause", response_model=answers.Changed)
def pause(batch_id: str, serving: Serving, principal: access.Submitter) -> dict[str, Any]:
    """Start none of its jobs; what runs goes on."""
    return _changed(batch_id, serving, principal, orders.pause_batch)


@router.post("/{batch_id}/resume", response_model=answers.Changed)
def resume(batch_id: str, serving: Serving, principal: access.Submitter) -> dict[str, Any]:
    """Go on after a pause."""
    return _changed(batch_id, serving, principal, orders.resume_batch)


class Priority(BaseModel):
    model_config = ConfigDict(extra="forbid")

    priority: int = Field(ge=-prompt_row.MAX_PRIORITY, le=prompt_row.MAX_PRIORITY)


@router.post("/{batch_id}/priority", response_model=answers.Changed)
def prioritize(
    batch_id: str, wanted: Priority, serving: Serving, principal: access.Submitter
) -> dict[str, Any]:
    """Sooner or later than others, from now on."""

    def change(session: Session, batch_id: str) -> bool:
        return orders.prioritize_batch(session, batch_id, wanted.priority)

    answer = _changed(batch_id, serving, principal, change)
    if answer["changed"]:
        serving.send_anew()
    return answer


def _changed(
    batch_id: str,
    serving: service.Service,
    principal: access.Principal,
    change: Callable[[Session, str], bool],
) -> dict[str, Any]:
    with serving.db.reading() as session:
        finding.batch(session, batch_id, principal)
    changed = serving.db.write(change, batch_id)
    serving.wake(changed)
    with serving.db.reading() as session:
        state = finding.batch(session, batch_id, principal).state
    return {"name": batch_id, "state": state, "changed": changed}


class Retry(BaseModel):
    """Which of its jobs."""

    model_config = ConfigDict(extra="forbid")

    states: list[Literal["failed", "cancelled"]] = Field(["failed"], min_length=1, max_length=2)
    kinds: Kinds = Field([], description="Only those that failed so.")
    quarantined: bool | None = Field(None, description="Only those that are, or that are not.")


@router.post("/{batch_id}/retry", response_model=answers.Retried)
def retry(
    batch_id: str, serving: Serving, principal: access.Submitter, wanted: Retry | None = None
) -> dict[str, Any]:
    """Failed (or cancelled) jobs are queued again, with the same seed and look."""
    wanted = wanted or Retry()
    chosen = sorted({states.JobState(state) for state in wanted.states})
    which = failures.Which(kinds=wanted.kinds, quarantined=wanted.quarantined)
    with serving.db.reading() as session:
        finding.batch(session, batch_id, principal)
    retried = serving.db.write(orders.retry_jobs, batch_id, from_states=chosen, which=which)
    serving.wake(retried.jobs)
    return shapes.retried(retried)


@router.get("/{batch_id}/results", response_model=answers.Results)
def result_links(batch_id: str, serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """Links to the result files that work for an hour without a token; null until written."""
    with serving.db.reading() as session:
        found = finding.batch(session, batch_id, principal)
    names = {"output": results.OUTPUT, "errors": results.ERRORS, "manifest": results.MANIFEST}
    if found.manifest_at is None or found.results_expired_at is not None:
        return dict.fromkeys(names)
    return {
        what: serving.store.presign(
            results.batch_key(batch_id, name), seconds=LINK_SECONDS, file_name=name
        )
        for what, name in names.items()
    }
