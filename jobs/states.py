"""The states of jobs and attempts, and which may follow which."""

from enum import StrEnum


class JobState(StrEnum):
    """Where a job is. *Dispatched* is a timestamp and *cancelling* a flag, not states."""

    QUEUED = "queued"
    """Waits for a worker, perhaps until `not_before`. Leaves by claim or cancel."""

    RUNNING = "running"
    """An attempt holds it. Leaves by succeed, fail or cancel; by fail when its lease ends."""

    SUCCEEDED = "succeeded"
    """Its video is in the results. Final."""

    FAILED = "failed"
    """Its budget of attempts is spent, or its kind of failure cannot heal. Leaves by retry only."""

    CANCELLED = "cancelled"
    """Somebody asked to stop it. Leaves by retry only."""


class AttemptState(StrEnum):
    """How one try at a job ended, or how far it is."""

    RUNNING = "running"
    """A worker renders it and renews its lease."""

    RENDERED = "rendered"
    """The mp4 is finished on the worker's host; its publisher uploads it and renews the lease."""

    SUCCEEDED = "succeeded"
    """Its video is the job's result."""

    FAILED = "failed"
    """It raised: `failure_kind` and `error` say what."""

    LOST = "lost"
    """Its lease ended without a word."""

    RELEASED = "released"
    """Its worker gave it back on purpose (drain). Costs nothing."""

    CANCELLED = "cancelled"
    """It stopped because its job was cancelled."""


class FailureKind(StrEnum):
    """What a worker says went wrong. What follows from it is decided in `retries`."""

    INPUT = "input"
    """The job itself cannot be rendered. Should be the same everywhere: another host is asked once,
    if there is one."""

    REFUSED = "refused"
    """The user's own safety check said no. Never retried."""

    CHECK = "check"
    """The safety check itself failed, which says nothing about the job."""

    WEIGHTS = "weights"
    """Weights are missing or broken on this worker."""

    OUT_OF_MEMORY = "out_of_memory"
    """The device has too little memory for this job."""

    DEVICE = "device"
    """The device or its driver failed; its process must not be used again."""

    ENCODING = "encoding"
    """ffmpeg failed, or what it wrote does not probe as what was asked for."""

    STORAGE = "storage"
    """The object store did not take the video in time."""

    DISK = "disk"
    """The worker's scratch folder could not be written."""

    WORKER_LOST = "worker_lost"
    """The lease ended: crashed, killed, hung or cut off."""

    DEADLINE = "deadline"
    """Not of a worker: its batch's deadline passed before the job was finished."""

    INTERNAL = "internal"
    """Anything else: a defect of ours until shown otherwise."""


class BatchState(StrEnum):
    """Derived from a batch's counts and flags; never stored."""

    QUEUED = "queued"
    RUNNING = "running"
    PAUSED = "paused"
    """No job of it starts; what runs goes on."""
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    """Every job succeeded."""
    PARTIALLY_FAILED = "partially_failed"
    """Some jobs succeeded; some failed, or were not finished by the deadline."""
    FAILED = "failed"
    """No job succeeded, and not because somebody cancelled them all."""
    CANCELLED = "cancelled"
    """Stopped on request, and no job failed."""


class Misfire(StrEnum):
    """What becomes of fire times whose batch could not be made in time, as without a dispatcher."""

    SKIP = "skip"
    """None of them is made up for."""
    RUN_ONCE = "run_once"
    """The latest one is."""
    CATCH_UP = "catch_up"
    """The latest N are, one batch each."""


class Overlap(StrEnum):
    """What becomes of a fire time while an earlier batch of the schedule is not finished."""

    QUEUE = "queue"
    """Its batch is made, and waits its turn like any other."""
    SKIP = "skip"
    """It makes no batch."""


class FiringState(StrEnum):
    """What became of a fire time."""

    MADE = "made"
    """There is a batch."""
    SKIPPED = "skipped"
    """A policy said so: `reason` says which."""
    FAILED = "failed"
    """Its prompts could not be used."""


TRANSITIONS: dict[JobState, frozenset[JobState]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED}),
    JobState.RUNNING: frozenset(
        {JobState.QUEUED, JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    ),
    JobState.SUCCEEDED: frozenset(),
    JobState.FAILED: frozenset({JobState.QUEUED}),
    JobState.CANCELLED: frozenset({JobState.QUEUED}),
}
"""Job states and what may follow them. The functions of `lifecycle` and `orders` name the moves."""

FINAL_JOB_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED})
LIVE_ATTEMPT_STATES = frozenset({AttemptState.RUNNING, AttemptState.RENDERED})
