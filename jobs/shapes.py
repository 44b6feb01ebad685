"""What `--output json` prints and the web service answers. Keys are added, never renamed."""

from datetime import datetime, timedelta
from typing import Any

from jobs import failures, orders, queries, states, storage, watch
from jobs.schema import Attempt, Batch, Firing, Job, Refusal, Schedule

LINK_SECONDS = 24 * 3600


def batch(row: Batch) -> dict[str, Any]:
    return {
        "batch_id": row.id,
        "name": row.name,
        "owner": row.owner,
        "preset": row.preset,
        "priority": row.priority + row.boost,
        "idempotency_key": row.idempotency_key,
        "state": row.state,
        "created_at": row.created_at,
        "finished_at": row.finished_at,
        "results_written_at": row.manifest_at,
        "results_expired_at": row.results_expired_at,
        "cancel_requested_at": row.cancel_requested_at,
        "paused_at": row.paused_at,
        "deadline_at": row.deadline_at,
        "expired_at": row.expired_at,
        "counts": {
            "total": row.total,
            "queued": row.queued,
            "running": row.running,
            "succeeded": row.succeeded,
            "failed": row.failed,
            "cancelled": row.cancelled,
        },
    }


def progress(found: queries.Progress) -> dict[str, Any]:
    return batch(found.batch) | {
        "rate_per_minute": _rounded(found.rate_per_minute),
        "seconds_left": _rounded(found.seconds_left),
    }


def snapshot(found: watch.Snapshot) -> dict[str, Any]:
    return progress(found.progress) | {
        "now": found.now,
        "running": [running_job(row, held, now=found.now) for row, held in found.running],
        "queues_without_workers": list(found.idle_queues),
        "refused_by": [{"worker": held.worker} | refusal(held) for held in found.refusals],
    }


def running_job(job: Job, attempt: Attempt, *, now: datetime) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "position": job.position,
        "custom_id": job.custom_id,
        "attempt": attempt.number,
        "worker": attempt.worker,
        "stage": attempt.stage,
        "step": attempt.step,
        "steps": attempt.steps,
        "note": attempt.note,
        "started_at": attempt.started_at,
        "seconds": _rounded((now - attempt.started_at) / timedelta(seconds=1)),
    }


def failure(group: failures.Group) -> dict[str, Any]:
    return {
        "kind": group.kind,
        "quarantined": group.quarantined,
        "count": group.jobs,
        "may_go_well": group.may_go_well,
        "worker_count": len(group.workers),
        "workers": [{"worker": worker, "count": number} for worker, number in group.mostly_on],
        "example": {
            "job_id": group.example.id,
            "custom_id": group.example.custom_id,
            "message": group.example.error,
        },
    }


def retried(found: orders.Retried) -> dict[str, Any]:
    return {
        "retried": found.jobs,
        "doubtful": dict(found.doubtful),
        "batch_is_paused": found.is_paused,
    }


def failed_job(job: Job, *, worker: str | None) -> dict[str, Any]:
    return {
        "job_id": job.id,
        "position": job.position,
        "custom_id": job.custom_id,
        "finished_at": job.finished_at,
        "worker": worker,
        "error": error(job),
    }


def job_line(row: Job, *, worker: str | None) -> dict[str, Any]:
    """A job in a list."""
    return {
        "job_id": row.id,
        "position": row.position,
        "custom_id": row.custom_id,
        "state": row.state,
        "is_paused": row.is_paused,
        "prompt": row.prompt,
        "seed": row.seed,
        "metadata": row.meta,
        "not_before": waits_until(row),
        "started_at": row.started_at,
        "finished_at": row.finished_at,
        "worker": worker,
        "error": error(row),
    }


def job(
    row: Job,
    *,
    of: Batch,
    look: dict[str, Any],
    attempts: list[dict[str, Any]],
    video: dict[str, Any] | None,
    video_deleted_at: datetime | None,
) -> dict[str, Any]:
    return {
        "job_id": row.id,
        "batch_id": row.batch_id,
        "preset": of.preset,
        "position": row.position,
        "custom_id": row.custom_id,
        "state": row.state,
        "is_paused": row.is_paused,
        "cancel_requested": row.cancel_requested,
        "prompt": row.prompt,
        "negative_prompt": row.negative_prompt,
        "image_key": row.image_key,
        "seed": row.seed,
        "metadata": row.meta,
        "priority": of.boost - row.rank,
        "queue": row.queue,
        "look_id": row.look_id,
        "look": look,
        "not_before": waits_until(row),
        "dispatched_at": row.dispatched_at,
        "started_at": row.started_at,
        "finished_at": row.finished_at,
        "errors": row.error_count,
        "crashes": row.crash_count,
        "worker": next(
            (held["worker"] for held in attempts if held["attempt_id"] == row.attempt_id), None
        ),
        "error": error(row),
        "video": video,
        "video_deleted_at": video_deleted_at,
        "attempts": attempts,
    }


def waits_until(row: Job) -> datetime | None:
    """Before which no attempt of it begins; None: it is paused by itself, or does not wait."""
    waits = row.state is states.JobState.QUEUED and not row.is_paused
    return row.not_before if waits else None


def error(row: Job) -> dict[str, Any] | None:
    """The last thing that went wrong, also while the job waits for its next attempt."""
    if row.failure_kind is None and row.error is None:
        return None
    return {"kind": row.failure_kind, "message": row.error, "quarantined": row.quarantined}


def attempt(row: Attempt) -> dict[str, Any]:
    return {
        "attempt_id": row.id,
        "job_id": row.job_id,
        "number": row.number,
        "state": row.state,
        "worker": row.worker,
        "started_at": row.started_at,
        "heartbeat_at": row.heartbeat_at,
        "lease_until": row.lease_until,
        "finished_at": row.finished_at,
        "stage": row.stage,
        "step": row.step,
        "steps": row.steps,
        "note": row.note,
        "seconds": row.seconds,
        "peak_memory_bytes": row.peak_memory_bytes,
        "memory": row.memory,
        "failure_kind": row.failure_kind,
        "error": row.error,
        "error_detail": row.error_detail,
        "video_key": row.video_key,
        "video_bytes": row.video_bytes,
        "video_sha256": row.video_sha256,
    }


def video(store: storage.ObjectStore, winner: Attempt | None) -> dict[str, Any] | None:
    """Where a finished video lies; `link` can be opened without keys, for a day."""
    if winner is None or winner.video_key is None:
        return None
    try:
        link = store.presign(winner.video_key, seconds=LINK_SECONDS)
    except storage.StorageError:
        link = None
    return {
        "key": winner.video_key,
        "url": store.address(winner.video_key),
        "link": link,
        "bytes": winner.video_bytes,
        "sha256": winner.video_sha256,
    }


def worker(live: queries.LiveWorker) -> dict[str, Any]:
    row, held = live.worker, live.attempt
    return {
        "name": row.name,
        "host": row.host,
        "device": row.device,
        "memory_bytes": row.memory_bytes,
        "memory_used_bytes": row.device_used_bytes,
        "host_memory_used_bytes": row.host_used_bytes,
        "queues": row.queues,
        "takes": list(live.takes),
        "refuses": [refusal(each) for each in live.refusals],
        "resident": row.resident or [],
        "renders": row.renders,
        "loads": row.loads,
        "lora_switches": row.lora_switches,
        "version": row.version,
        "pid": row.pid,
        "is_alive": live.is_alive,
        "started_at": row.started_at,
        "heartbeat_at": row.heartbeat_at,
        "restarts": row.restarts,
        "suspects": row.suspects or [],
        "test": None
        if row.tested_at is None
        else {"at": row.tested_at, "failure": row.test_failure},
        "rendering": None
        if held is None
        else {
            "job_id": held.job_id,
            "attempt": held.number,
            "stage": held.stage,
            "step": held.step,
            "steps": held.steps,
            "started_at": held.started_at,
        },
    }


def refusal(held: Refusal) -> dict[str, Any]:
    return {
        "queue": held.queue or None,
        "kind": held.kind,
        "reason": held.reason,
        "needs_test": held.needs_test,
        "times": held.times,
        "since": held.since,
        "until": held.until,
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 2)


def schedule(row: Schedule, *, coming: list[datetime] | None) -> dict[str, Any]:
    shape = {
        "name": row.name,
        "owner": row.owner,
        "state": "active" if row.paused_at is None else "paused",
        "cron": row.cron,
        "zone": row.zone,
        "preset": row.preset,
        "prompts_url": row.prompts_url,
        "format": row.format,
        "lists": row.lists,
        **row.options,
        "misfire": misfire(row),
        "overlap": row.overlap,
        "created_at": row.created_at,
        "paused_at": row.paused_at,
        "next_fire_at": row.next_fire_at,
        "batches_made": row.counter,
    }
    return shape if coming is None else shape | {"coming": coming}


def misfire(row: Schedule) -> str:
    """As `--misfire` takes it."""
    is_counted = row.misfire is states.Misfire.CATCH_UP
    return f"{row.misfire}:{row.catch_up}" if is_counted else row.misfire.value


def firing(row: Firing, made: Batch | None) -> dict[str, Any]:
    return {
        "fire_at": row.fire_at,
        "state": row.state,
        "is_manual": row.is_manual,
        "created_at": row.created_at,
        "reason": row.reason,
        "batch": None if made is None else batch(made),
    }
