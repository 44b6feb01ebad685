"""The bucket's layout. Keys are made of our own ids, never of a user's text.

batches/<batch>/jobs/<job>/<attempt>/video.mp4    and video.json, its sidecar
batches/<batch>/output.jsonl                      a line per finished video
batches/<batch>/errors.jsonl                      a line per job without one
batches/<batch>/manifest.json                     written last: the batch is complete

Beside them lie input images and uploads, below inputs/: see `uploads`; and below farms/ what tells
the store from others: see `store_mark`.
"""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Row, select, update
from sqlalchemy.orm import Session

from jobs import database, outbox, states, storage
from jobs.schema import Attempt, Batch, Job

OUTPUT, ERRORS = "output.jsonl", "errors.jsonl"
JSONL = "application/x-ndjson"
MANIFEST = "manifest.json"
ROWS_AT_ONCE = 1_000
COLUMNS = (
    Job.id,
    Job.position,
    Job.custom_id,
    Job.state,
    Job.prompt,
    Job.seed,
    Job.meta,
    Job.failure_kind,
    Job.error,
    Job.quarantined,
    Job.finished_at,
    Attempt.video_key,
    Attempt.video_bytes,
    Attempt.video_sha256,
    Attempt.seconds,
    Attempt.worker,
)
"""What the lines tell. Columns, not objects: a million of them are read three times as fast."""


def video_key(batch_id: str, job_id: int, attempt_id: int) -> str:
    """The attempt is part of the key: a late upload cannot overwrite the winner's."""
    return f"{_attempt_folder(batch_id, job_id, attempt_id)}/video.mp4"


def sidecar_key(batch_id: str, job_id: int, attempt_id: int) -> str:
    return f"{_attempt_folder(batch_id, job_id, attempt_id)}/video.json"


def batch_folder(batch_id: str) -> str:
    """Below which everything of a batch lies."""
    return f"batches/{batch_id}"


def batch_key(batch_id: str, name: str) -> str:
    return f"{batch_folder(batch_id)}/{name}"


def write(
    db: database.Database,
    store: storage.ObjectStore,
    batch_id: str,
    *,
    may_put: Callable[[], bool] = lambda: True,
) -> bool:
    """Write the result files of a finished batch; False when it was reopened meanwhile.

    `may_put` is asked before each file, and when it says no the rest is left to somebody else.
    """
    with db.reading() as session:
        batch = session.get_one(Batch, batch_id)
        finished_at = batch.finished_at
        if finished_at is None:
            return False
        summary, total = _manifest(batch), batch.total
    with tempfile.TemporaryDirectory(prefix="rushes-results-") as folder:
        lines = _write_lines(db, store, batch_id, total, Path(folder))
        for name in (OUTPUT, ERRORS):
            key = batch_key(batch_id, name)
            if not may_put():
                return False
            stored = store.put_file(Path(folder) / name, key, content_type=JSONL)
            summary["files"][name] = {
                "key": key,
                "lines": lines[name],
                "bytes": stored.size_bytes,
                "sha256": stored.sha256,
            }
    if not may_put():
        return False
    body = json.dumps(summary, indent=2, ensure_ascii=False).encode() + b"\n"
    store.put_bytes(body, batch_key(batch_id, MANIFEST), content_type="application/json")
    return db.write(_mark_written, batch_id, finished_at)


def _mark_written(session: Session, batch_id: str, finished_at: datetime) -> bool:
    """Only for the end that was written: a reopened batch ends again later."""
    of_batch = update(Batch).where(Batch.id == batch_id)
    changed = session.execute(
        of_batch.where(Batch.finished_at == finished_at)
        .values(manifest_at=database.now(session), results_lease_until=None)
        .returning(Batch.id)
    )
    if changed.first() is not None:
        manifest = batch_key(batch_id, MANIFEST)
        outbox.batch_ended(session, outbox.RESULTS_WRITTEN, batch_id, manifest_key=manifest)
        return True
    # It ended again while we wrote: our files may have replaced newer ones of another dispatcher.
    session.execute(of_batch.values(manifest_at=None, results_lease_until=None))
    return False


def _attempt_folder(batch_id: str, job_id: int, attempt_id: int) -> str:
    return f"{batch_folder(batch_id)}/jobs/{job_id}/{attempt_id}"


def _manifest(batch: Batch) -> dict[str, Any]:
    assert batch.finished_at is not None
    return {
        "batch_id": batch.id,
        "name": batch.name,
        "owner": batch.owner,
        "preset": batch.preset,
        "state": batch.state,
        "created_at": batch.created_at.isoformat(),
        "finished_at": batch.finished_at.isoformat(),
        "expired_at": None if batch.expired_at is None else batch.expired_at.isoformat(),
        "counts": {
            "total": batch.total,
            "succeeded": batch.succeeded,
            "failed": batch.failed,
            "cancelled": batch.cancelled,
        },
        "files": {},
    }


def _write_lines(
    db: database.Database, store: storage.ObjectStore, batch_id: str, total: int, folder: Path
) -> Counter[str]:
    """Each finished job into one of the two files; lines per file."""
    lines = Counter[str]()
    with (
        (folder / OUTPUT).open("w", encoding="utf-8") as output,
        (folder / ERRORS).open("w", encoding="utf-8") as errors,
    ):
        for row in _rows(db, batch_id, total):
            if row.state is states.JobState.SUCCEEDED:
                output.write(_json_line(_output_line(store, row)))
                lines[OUTPUT] += 1
            elif row.state in states.FINAL_JOB_STATES:
                errors.write(_json_line(_error_line(row)))
                lines[ERRORS] += 1
    return lines


_encode = json.JSONEncoder(ensure_ascii=False).encode


def _json_line(entry: dict[str, Any]) -> str:
    return _encode(entry) + "\n"


def _output_line(store: storage.ObjectStore, row: Row[Any]) -> dict[str, Any]:
    """One finished video."""
    assert row.video_key is not None
    return _job_line(row) | {
        "video": {
            "key": row.video_key,
            "url": store.address(row.video_key),
            "bytes": row.video_bytes,
            "sha256": row.video_sha256,
        },
        "seconds": row.seconds,
        "worker": row.worker,
    }


def _error_line(row: Row[Any]) -> dict[str, Any]:
    """One job that has no video, and why."""
    was_stopped = row.state is states.JobState.CANCELLED and row.failure_kind is None
    return _job_line(row) | {
        "error": None
        if was_stopped
        else {"kind": row.failure_kind, "message": row.error, "quarantined": row.quarantined},
        "worker": row.worker,
        "finished_at": None if row.finished_at is None else row.finished_at.isoformat(),
    }


def _job_line(row: Row[Any]) -> dict[str, Any]:
    return {
        "custom_id": row.custom_id,
        "job_id": row.id,
        "position": row.position,
        "state": row.state,
        "prompt": row.prompt,
        "seed": row.seed,
        "metadata": row.meta,
    }


def _rows(db: database.Database, batch_id: str, total: int) -> Iterator[Row[Any]]:
    for first in range(0, total, ROWS_AT_ONCE):
        # A short transaction per page: a million rows must not keep one open for minutes. With
        # both ends given, no plan of the database can read more than the page.
        with db.reading() as session:
            yield from session.execute(
                select(*COLUMNS)
                .outerjoin(Attempt, Attempt.id == Job.attempt_id)
                .where(Job.batch_id == batch_id)
                .where(Job.position >= first, Job.position < first + ROWS_AT_ONCE)
                .order_by(Job.position)
            ).all()
