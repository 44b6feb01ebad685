"""The bucket's layout. Keys are made of our own ids, never of a user's text.

batches/<batch>/jobs/<job>/<attempt>/video.mp4    and video.json, its sidecar
batches/<batch>/output.jsonl                      a line per finished video
batches/<batch>/errors.jsonl                      a line per job without one
batches/<batch>/manifest.json                     written last: the batch is complete
"""

import json
import tempfile
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from jobs import database, queries, states, storage
from jobs.schema import Attempt, Batch, Job

JSONL = "application/x-ndjson"
ROWS_AT_ONCE = 1_000


def video_key(batch_id: str, job_id: int, attempt_id: int) -> str:
    """The attempt is part of the key: a late upload cannot overwrite the winner's."""
    return f"{_attempt_folder(batch_id, job_id, attempt_id)}/video.mp4"


def sidecar_key(batch_id: str, job_id: int, attempt_id: int) -> str:
    return f"{_attempt_folder(batch_id, job_id, attempt_id)}/video.json"


def batch_key(batch_id: str, name: str) -> str:
    return f"batches/{batch_id}/{name}"


def write(db: database.Database, store: storage.ObjectStore, batch_id: str) -> bool:
    """Write the result files of a finished batch; False when it was reopened meanwhile."""
    with db.reading() as session:
        batch = session.get_one(Batch, batch_id)
        finished_at = batch.finished_at
        if finished_at is None:
            return False
        summary = _manifest(batch)
    with tempfile.TemporaryDirectory(prefix="rushes-results-") as folder:
        for name, is_output in (("output.jsonl", True), ("errors.jsonl", False)):
            path = Path(folder) / name
            lines = _write_lines(db, store, batch_id, path, is_output=is_output)
            key = batch_key(batch_id, name)
            stored = store.put_file(path, key, content_type=JSONL)
            summary["files"][name] = {
                "key": key,
                "lines": lines,
                "bytes": stored.size_bytes,
                "sha256": stored.sha256,
            }
    body = json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n"
    store.put_bytes(body, batch_key(batch_id, "manifest.json"), content_type="application/json")
    return db.write(_mark_written, batch_id, finished_at)


def _mark_written(session: Session, batch_id: str, finished_at: datetime) -> bool:
    """Only for the end that was written: a reopened batch ends again later."""
    of_batch = update(Batch).where(Batch.id == batch_id)
    changed = session.execute(
        of_batch.where(Batch.finished_at == finished_at)
        .values(manifest_at=database.now(session))
        .returning(Batch.id)
    )
    if changed.first() is not None:
        return True
    # It ended again while we wrote: our files may have replaced newer ones of another dispatcher.
    session.execute(of_batch.values(manifest_at=None))
    return False


def _attempt_folder(batch_id: str, job_id: int, attempt_id: int) -> str:
    return f"batches/{batch_id}/jobs/{job_id}/{attempt_id}"


def _manifest(batch: Batch) -> dict[str, Any]:
    assert batch.finished_at is not None
    return {
        "batch_id": batch.id,
        "name": batch.name,
        "preset": batch.preset,
        "state": queries.batch_state(batch),
        "created_at": batch.created_at.isoformat(),
        "finished_at": batch.finished_at.isoformat(),
        "counts": {
            "total": batch.total,
            "succeeded": batch.succeeded,
            "failed": batch.failed,
            "cancelled": batch.cancelled,
        },
        "files": {},
    }


def _write_lines(
    db: database.Database,
    store: storage.ObjectStore,
    batch_id: str,
    path: Path,
    *,
    is_output: bool,
) -> int:
    lines = 0
    with path.open("w", encoding="utf-8") as file:
        for job, attempt in _finished_jobs(db, batch_id, succeeded=is_output):
            entry = output_line(store, job, attempt) if attempt else error_line(job)
            file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            lines += 1
    return lines


def output_line(store: storage.ObjectStore, job: Job, attempt: Attempt) -> dict[str, Any]:
    """One finished video, as `output.jsonl` and `rushes show --output json` tell it."""
    assert attempt.video_key is not None
    return _job_line(job) | {
        "video": {
            "key": attempt.video_key,
            "url": store.address(attempt.video_key),
            "bytes": attempt.video_bytes,
            "sha256": attempt.video_sha256,
        },
        "seconds": attempt.seconds,
        "worker": attempt.worker,
    }


def error_line(job: Job) -> dict[str, Any]:
    """One job that has no video, and why."""
    return _job_line(job) | {
        "error": None
        if job.state is states.JobState.CANCELLED
        else {"kind": job.failure_kind, "message": job.error, "quarantined": job.quarantined}
    }


def _job_line(job: Job) -> dict[str, Any]:
    return {
        "custom_id": job.custom_id,
        "job_id": job.id,
        "position": job.position,
        "state": job.state,
        "prompt": job.prompt,
        "seed": job.seed,
        "metadata": job.meta,
    }


def _finished_jobs(
    db: database.Database, batch_id: str, *, succeeded: bool
) -> Iterator[tuple[Job, Attempt | None]]:
    wanted = (
        (states.JobState.SUCCEEDED,)
        if succeeded
        else (states.JobState.FAILED, states.JobState.CANCELLED)
    )
    after = -1
    while True:
        # A short transaction per page: a million rows must not keep one open for minutes.
        with db.reading() as session:
            page = session.execute(
                select(Job, Attempt)
                .outerjoin(Attempt, Attempt.id == Job.attempt_id)
                .where(Job.batch_id == batch_id, Job.position > after, Job.state.in_(wanted))
                .order_by(Job.position)
                .limit(ROWS_AT_ONCE)
            ).all()
        for job, attempt in page:
            yield job, attempt if succeeded else None
        if len(page) < ROWS_AT_ONCE:
            return
        after = page[-1][0].position
