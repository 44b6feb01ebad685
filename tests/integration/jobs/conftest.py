"""A migrated database with batches in it, and what a test asks of it."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from jobs import (
    database,
    lifecycle,
    migrate,
    orders,
    presets,
    queries,
    queues,
    retries,
    states,
    submission,
    workers,
)
from jobs.schema import Attempt, Batch, Job, Worker
from tests.registrations import registration

PRESET = presets.load(str(Path(__file__).resolve().parents[3] / "configs" / "tiny.json"))
QUEUE = queues.of_model(PRESET.look.model_path)
VIDEO = lifecycle.StoredVideo(key="batches/b/jobs/j/a/video.mp4", size_bytes=3, sha256="0" * 64)
BUDGETS = retries.Budgets(max_errors=3, max_crashes=2, retry_seconds=0.0)
LEASE_SECONDS = 60.0


@dataclass(frozen=True)
class World:
    """The lifecycle as workers, dispatchers and people use it, each call in its transaction."""

    db: database.Database

    def submit(
        self,
        rows: int | Sequence[dict[str, Any]] = 1,
        *,
        preset: presets.Preset = PRESET,
        **options: Any,
    ) -> str:
        if isinstance(rows, int):
            rows = [{"prompt": f"prompt {number}"} for number in range(rows)]
        return submission.submit(self.db, prompt_file(rows, preset=preset, **options)).batch_id

    def claim(self, job_id: int, *, worker: str = "gpu0@here") -> lifecycle.Claim | None:
        return self.db.write(lifecycle.claim, job_id, worker=worker, lease_seconds=LEASE_SECONDS)

    def claimed(self, job_id: int, *, worker: str = "gpu0@here") -> int:
        claim = self.claim(job_id, worker=worker)
        assert claim is not None
        return claim.attempt_id

    def heartbeat(self, attempt_id: int, **values: Any) -> lifecycle.Verdict:
        return self.db.write(lifecycle.heartbeat, attempt_id, lease_seconds=LEASE_SECONDS, **values)

    def rendered(self, attempt_id: int) -> lifecycle.Verdict:
        return self.db.write(
            lifecycle.rendered,
            attempt_id,
            seconds={"denoise": 1.5},
            peak_memory_bytes=7,
            lease_seconds=LEASE_SECONDS,
        )

    def succeed(self, attempt_id: int) -> bool:
        return self.db.write(lifecycle.succeed, attempt_id, video=VIDEO)

    def fail(
        self,
        attempt_id: int,
        kind: states.FailureKind = states.FailureKind.INTERNAL,
        *,
        budgets: retries.Budgets = BUDGETS,
        error: str = "it broke",
    ) -> states.JobState | None:
        return self.db.write(lifecycle.fail, attempt_id, kind=kind, error=error, budgets=budgets)

    def release(self, attempt_id: int) -> bool:
        return self.db.write(lifecycle.release, attempt_id, reason="drain")

    def cancel_attempt(self, attempt_id: int) -> bool:
        return self.db.write(lifecycle.cancel_attempt, attempt_id)

    def cancel_batch(self, batch_id: str) -> tuple[int, int]:
        self.db.write(orders.request_cancel, batch_id)
        return self.db.write(orders.go_on_cancelling, batch_id)

    def cancel_job(self, job_id: int) -> states.JobState:
        return self.db.write(orders.cancel_job, job_id)

    def retry(self, batch_id: str, *from_states: states.JobState) -> int:
        retried = self.db.write(
            orders.retry_jobs,
            batch_id,
            from_states=from_states or (states.JobState.FAILED,),
        )
        return retried.jobs

    def end_lost(self, *, worker: str | None = None) -> list[int]:
        return self.db.write(lifecycle.end_lost_attempts, budgets=BUDGETS, worker=worker)

    def expire(self, attempt_id: int) -> None:
        """As if the lease had been over for a second."""
        with self.db.transaction() as session:
            past = database.now(session) - timedelta(seconds=1)
            session.execute(
                update(Attempt).where(Attempt.id == attempt_id).values(lease_until=past)
            )

    def make_runnable(self) -> None:
        """As if every wait for a retry were over."""
        with self.db.transaction() as session:
            session.execute(update(Job).values(not_before=None))

    def register(
        self, name: str = "gpu0@here", *, queue: str = QUEUE, also: Sequence[str] = ()
    ) -> None:
        self.db.write(workers.register, registration(name, queues=(queue, *also)))

    def silence(self, name: str) -> None:
        """As if this worker's launcher had been gone for a minute."""
        with self.db.transaction() as session:
            past = database.now(session) - timedelta(seconds=60)
            session.execute(update(Worker).where(Worker.name == name).values(heartbeat_at=past))

    def job(self, job_id: int) -> Job:
        with self.db.reading() as session:
            return session.get_one(Job, job_id)

    def attempt(self, attempt_id: int) -> Attempt:
        with self.db.reading() as session:
            return session.get_one(Attempt, attempt_id)

    def batch(self, batch_id: str) -> Batch:
        with self.db.reading() as session:
            return session.get_one(Batch, batch_id)

    def jobs(self, batch_id: str) -> list[Job]:
        with self.db.reading() as session:
            return list(queries.jobs(session, batch_id, limit=10_000))

    def job_ids(self, batch_id: str) -> list[int]:
        return [job.id for job in self.jobs(batch_id)]

    def only_job(self, batch_id: str) -> Job:
        (job,) = self.jobs(batch_id)
        return job

    def check(self) -> None:
        """What holds after every change, whatever it was."""
        with self.db.reading() as session:
            counted = session.execute(
                select(Job.batch_id, Job.state, func.count()).group_by(Job.batch_id, Job.state)
            ).all()
            counts = {(batch_id, state): number for batch_id, state, number in counted}
            for batch in session.scalars(select(Batch)).all():
                told = {state: getattr(batch, state.value) for state in states.JobState}
                assert told == {s: counts.get((batch.id, s), 0) for s in states.JobState}
                assert sum(told.values()) == batch.total
                is_open = bool(batch.queued + batch.running)
                assert (batch.finished_at is None) == is_open
            live = session.scalars(
                select(Attempt).where(Attempt.state.in_(states.LIVE_ATTEMPT_STATES))
            ).all()
            running = session.scalars(select(Job).where(Job.state == states.JobState.RUNNING)).all()
            # Each running job is held by its one live attempt, and no other attempt lives.
            assert {(job.id, job.attempt_id) for job in running} == {
                (attempt.job_id, attempt.id) for attempt in live
            }
            won = session.execute(
                select(Attempt.job_id, Attempt.id).where(
                    Attempt.state == states.AttemptState.SUCCEEDED
                )
            ).all()
            succeeded = session.execute(
                select(Job.id, Job.attempt_id).where(Job.state == states.JobState.SUCCEEDED)
            ).all()
            assert sorted(map(tuple, won)) == sorted(map(tuple, succeeded))


def prompt_file(
    rows: Sequence[dict[str, Any]] | bytes, *, preset: presets.Preset = PRESET, **options: Any
) -> submission.PromptFile:
    if not isinstance(rows, bytes):
        rows = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return submission.PromptFile(
        stream=io.BytesIO(rows),
        source="prompts.jsonl",
        format="jsonl",
        options=submission.Options(preset=preset, **options),
    )


@pytest.fixture
def make_world() -> Iterator[Callable[[str], World]]:
    opened: list[database.Database] = []

    def make(url: str) -> World:
        db = database.Database(url)
        opened.append(db)
        migrate.upgrade(db)
        return World(db)

    yield make
    for db in opened:
        db.close()


@pytest.fixture
def world(database_url: str, make_world: Callable[[str], World]) -> World:
    """Once with SQLite, once with PostgreSQL."""
    return make_world(database_url)


@pytest.fixture
def sqlite_world(sqlite_database_url: str, make_world: Callable[[str], World]) -> World:
    return make_world(sqlite_database_url)


@pytest.fixture
def postgres_world(postgres_database_url: str, make_world: Callable[[str], World]) -> World:
    return make_world(postgres_database_url)
