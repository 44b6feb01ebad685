"""Any order of calls, against a model of a few lines: what the rows say is what the model says."""

from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import delete, select

from jobs import health, lifecycle, moves, orders, results, retries
from jobs.lifecycle import Verdict
from jobs.schema import Attempt, Batch, Job, Owner, Refusal, Worker
from jobs.states import FailureKind, JobState
from tests.integration.jobs.conftest import BUDGETS, World

MOST_JOBS = 3  # few, so that the calls meet on the same ones
HEALING = [FailureKind.INTERNAL, FailureKind.STORAGE, FailureKind.DEVICE]


@dataclass
class ModelJob:
    """What a job must be, by the words of the design alone."""

    batch_id: str
    state: JobState = JobState.QUEUED
    holder: int | None = None
    cancel_requested: bool = False
    errors: int = 0
    crashes: int = 0
    failed_on: set[str] = field(default_factory=set)
    """Workers, as on a broken machine, since its budgets were fresh."""
    unfit_on: set[str] = field(default_factory=set)
    """Those that said that it cannot be rendered at all."""
    repeats: int = 0
    """How often they said so again."""

    def requeue(self) -> None:
        self.state, self.holder, self.cancel_requested = JobState.QUEUED, None, False

    def retry(self) -> None:
        self.requeue()
        self.errors = self.crashes = self.repeats = 0
        self.failed_on.clear()
        self.unfit_on.clear()


@dataclass
class ModelAttempt:
    job: int
    worker: str
    number: int
    rendered: bool = False
    succeeded: bool = False


@dataclass
class Model:
    jobs: dict[int, ModelJob] = field(default_factory=dict)
    attempts: dict[int, ModelAttempt] = field(default_factory=dict)
    paused: set[str] = field(default_factory=set)
    suspected_by: dict[str, set[int]] = field(default_factory=dict)
    """Registered worker -> jobs that failed on it and on no other, as on a broken machine."""

    def is_out(self, worker: str) -> bool:
        return len(self.suspected_by.get(worker, ())) >= health.MAX_SUSPECTS

    def others(self, job: ModelJob) -> list[str]:
        """Workers that may yet show whether it is to blame."""
        failed = job.failed_on | job.unfit_on
        return [name for name in self.suspected_by if name not in failed and not self.is_out(name)]

    def may_claim(self, job_id: int, *, worker: str) -> bool:
        job = self.jobs[job_id]
        is_for_others = worker in job.failed_on | job.unfit_on and bool(self.others(job))
        if job.batch_id in self.paused or self.is_out(worker) or is_for_others:
            return False
        return job.state is JobState.QUEUED

    def claim(self, job_id: int, attempt_id: int, *, worker: str) -> None:
        number = 1 + sum(attempt.job == job_id for attempt in self.attempts.values())
        self.attempts[attempt_id] = ModelAttempt(job_id, worker, number)
        self.jobs[job_id].state, self.jobs[job_id].holder = JobState.RUNNING, attempt_id

    def held_by(self, attempt_id: int) -> ModelJob | None:
        job = self.jobs[self.attempts[attempt_id].job]
        return job if job.holder == attempt_id and job.state is JobState.RUNNING else None

    def verdict(self, attempt_id: int) -> Verdict:
        job = self.held_by(attempt_id)
        if job is None:
            return Verdict.SUPERSEDED
        return Verdict.CANCELLED if job.cancel_requested else Verdict.GO_ON

    def fail(self, attempt_id: int, *, kind: FailureKind) -> JobState | None:
        job = self.held_by(attempt_id)
        if job is None:
            return None
        attempt = self.attempts[attempt_id]
        is_crash = kind is FailureKind.WORKER_LOST
        job.crashes += is_crash
        job.errors += not is_crash
        if kind in retries.OF_MACHINE:
            job.failed_on.add(attempt.worker)
            if job.failed_on == {attempt.worker} and attempt.worker in self.suspected_by:
                self.suspected_by[attempt.worker].add(attempt.job)
        is_to_blame = len(job.failed_on) >= retries.MAX_MACHINES
        if kind is FailureKind.INPUT:
            job.repeats += attempt.worker in job.unfit_on
            job.unfit_on.add(attempt.worker)
            is_to_blame |= len(job.unfit_on) > 1 or not self.others(job)
        if is_crash:
            spent = job.crashes >= BUDGETS.max_crashes
        else:
            spent = job.errors - job.repeats >= BUDGETS.max_errors
            spent |= job.errors >= retries.MAX_ROUNDS * BUDGETS.max_errors
        if job.cancel_requested:
            job.state = JobState.CANCELLED
        elif spent or is_to_blame:
            job.state = JobState.FAILED
        else:
            job.requeue()
        return job.state

    def release(self, attempt_id: int) -> bool:
        job = self.held_by(attempt_id)
        if job is None:
            return False
        if job.cancel_requested:
            job.state = JobState.CANCELLED
        else:
            job.requeue()
        return True

    def is_spared(self, attempt_id: int) -> bool:
        """Its worker was only finishing it: the newest attempt pays for that one's silence.

        Or not even that: it waits for its upload.
        """
        attempt = self.attempts[attempt_id]
        was_followed = any(
            later > attempt_id and other.worker == attempt.worker
            for later, other in self.attempts.items()
        )
        was_left = was_followed or attempt.rendered
        return was_left and attempt.number <= lifecycle.SPARED_TRIES


class Machine(RuleBasedStateMachine):
    """Attempts are never forgotten: most calls come from ones that lost their job long ago."""

    world: World

    def __init__(self) -> None:
        super().__init__()
        self.model = Model()
        with self.world.db.transaction() as session:
            for table in (Attempt, Job, Batch, Owner, Refusal, Worker):
                session.execute(delete(table))

    @precondition(lambda self: len(self.model.jobs) < MOST_JOBS)
    @rule(number=st.integers(1, 2))
    def submit(self, number: int) -> None:
        batch_id = self.world.submit(number)
        for job_id in self.world.job_ids(batch_id):
            self.model.jobs[job_id] = ModelJob(batch_id)

    @precondition(lambda self: self.model.jobs)
    @rule(data=st.data(), worker=st.sampled_from(["gpu0@a", "gpu1@b"]))
    def claim(self, data: st.DataObject, worker: str) -> None:
        self.claim_one(self._job(data), worker=worker)

    def claim_one(self, job_id: int, *, worker: str) -> None:
        claim = self.world.claim(job_id, worker=worker)
        self.world.make_runnable()  # it may have been left to others for a while
        assert (claim is not None) == self.model.may_claim(job_id, worker=worker)
        if claim is not None:
            assert all(claim.attempt_id > earlier for earlier in self.model.attempts)
            self.model.claim(job_id, claim.attempt_id, worker=worker)

    @precondition(lambda self: self.model.attempts)
    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        attempt_id = self._attempt(data)
        assert self.world.heartbeat(attempt_id) is self.model.verdict(attempt_id)

    @precondition(lambda self: self.model.attempts)
    @rule(data=st.data())
    def rendered(self, data: st.DataObject) -> None:
        attempt_id = self._attempt(data)
        verdict = self.model.verdict(attempt_id)
        self.model.attempts[attempt_id].rendered |= verdict is Verdict.GO_ON
        assert self.world.rendered(attempt_id) is verdict

    @precondition(lambda self: self.model.attempts)
    @rule(data=st.data())
    def succeed(self, data: st.DataObject) -> None:
        attempt_id = self._attempt(data)
        attempt, job = self.model.attempts[attempt_id], self.model.held_by(attempt_id)
        if job is not None:
            job.state, attempt.succeeded = JobState.SUCCEEDED, True
        assert self.world.succeed(attempt_id) is attempt.succeeded

    @precondition(lambda self: self.model.attempts)
    @rule(data=st.data(), kind=st.sampled_from([*HEALING, FailureKind.INPUT]))
    def fail(self, data: st.DataObject, kind: FailureKind) -> None:
        attempt_id = self._attempt(data)
        expected = self.model.fail(attempt_id, kind=kind)
        assert self.world.fail(attempt_id, kind) is expected

    @precondition(lambda self: self.model.attempts)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        attempt_id = self._attempt(data)
        assert self.world.release(attempt_id) is self.model.release(attempt_id)

    @precondition(lambda self: self.model.attempts)
    @rule(data=st.data())
    def cancel_attempt(self, data: st.DataObject) -> None:
        attempt_id = self._attempt(data)
        job = self.model.held_by(attempt_id)
        if job is not None and job.cancel_requested:
            job.state = JobState.CANCELLED
        elif job is not None:  # it was asked for again meanwhile
            self.model.release(attempt_id)
        assert self.world.cancel_attempt(attempt_id) is (job is not None)

    @precondition(lambda self: self.model.jobs)
    @rule(data=st.data())
    def cancel_job(self, data: st.DataObject) -> None:
        job_id = self._job(data)
        self._cancel(self.model.jobs[job_id])
        assert self.world.cancel_job(job_id) is self.model.jobs[job_id].state

    @precondition(lambda self: self.model.jobs)
    @rule(data=st.data())
    def cancel_batch(self, data: st.DataObject) -> None:
        batch_id = self.model.jobs[self._job(data)].batch_id
        jobs = [job for job in self.model.jobs.values() if job.batch_id == batch_id]
        waiting = sum(job.state is JobState.QUEUED for job in jobs)
        asked = sum(job.state is JobState.RUNNING and not job.cancel_requested for job in jobs)
        for job in jobs:
            self._cancel(job)
        assert self.world.cancel_batch(batch_id) == (waiting, asked)

    @precondition(lambda self: self.model.jobs)
    @rule(
        data=st.data(),
        which=st.sets(st.sampled_from([JobState.FAILED, JobState.CANCELLED]), min_size=1),
    )
    def retry(self, data: st.DataObject, which: set[JobState]) -> None:
        batch_id = self.model.jobs[self._job(data)].batch_id
        again = [
            job
            for job in self.model.jobs.values()
            if job.batch_id == batch_id and job.state in which
        ]
        for job in again:
            job.retry()
        stopping = [
            job
            for job in self.model.jobs.values()
            if job.batch_id == batch_id and job.state is JobState.RUNNING and job.cancel_requested
        ]
        if JobState.CANCELLED in which:
            for job in stopping:
                job.cancel_requested = False
            again += stopping
        assert self.world.retry(batch_id, *which) == len(again)

    @precondition(lambda self: self.model.attempts)
    @rule(data=st.data(), together=st.integers(1, 3))
    def leases_end(self, data: st.DataObject, together: int) -> None:
        silent = {self._attempt(data) for _ in range(together)}
        held = {attempt_id for attempt_id in silent if self.model.held_by(attempt_id)}
        spared = {attempt_id for attempt_id in held if self.model.is_spared(attempt_id)}
        for attempt_id in silent:
            self.world.expire(attempt_id)
        for attempt_id in spared:
            self.model.release(attempt_id)
        for attempt_id in held - spared:
            self.model.fail(attempt_id, kind=FailureKind.WORKER_LOST)
        assert set(self.world.end_lost()) == held - spared

    @rule()
    def nothing_is_lost_before_its_lease_ends(self) -> None:
        assert self.world.end_lost() == []

    @invariant()
    def rows_are_as_the_model_says(self) -> None:
        with self.world.db.reading() as session:
            rows = session.execute(
                select(
                    Job.id,
                    Job.state,
                    Job.attempt_id,
                    Job.cancel_requested,
                    Job.error_count,
                    Job.crash_count,
                )
            ).all()
        assert {row[0]: tuple(row[1:]) for row in rows} == {
            job_id: (job.state, job.holder, job.cancel_requested, job.errors, job.crashes)
            for job_id, job in self.model.jobs.items()
        }

    @invariant()
    def counts_and_holders_are_in_order(self) -> None:
        self.world.check()

    @invariant()
    def a_manifest_is_of_a_finished_batch(self) -> None:
        """I8"""
        with self.world.db.reading() as session:
            early = select(Batch.id).where(
                Batch.manifest_at.is_not(None), Batch.finished_at.is_(None)
            )
            assert session.scalars(early).all() == []

    def _cancel(self, job: ModelJob) -> None:
        if job.state is JobState.QUEUED:
            job.state = JobState.CANCELLED
        elif job.state is JobState.RUNNING:
            job.cancel_requested = True

    def _job(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model.jobs)))

    def _attempt(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model.attempts)))


class BatchMachine(Machine):
    """The same with pauses, and with the result files of each end of a batch.

    Apart, because with more rules the calls of one kind meet less often.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ends_seen: dict[str, datetime] = {}
        """Batch -> its end when a writer of result files began with it."""

    @precondition(lambda self: self.model.jobs)
    @rule(data=st.data(), pauses=st.booleans())
    def pause_or_resume(self, data: st.DataObject, pauses: bool) -> None:
        batch_id = self.model.jobs[self._job(data)].batch_id
        is_over = self.world.batch(batch_id).finished_at is not None
        was_paused = batch_id in self.model.paused
        if pauses:
            changes = not is_over and not was_paused
            self.model.paused |= {batch_id} if changes else set()
            assert self.world.db.write(orders.pause_batch, batch_id) is changes
        else:
            self.model.paused -= {batch_id}
            assert self.world.db.write(orders.resume_batch, batch_id) is was_paused

    @rule()
    def a_writer_of_results_begins(self) -> None:
        with self.world.db.reading() as session:
            ended = select(Batch.id, Batch.finished_at).where(Batch.finished_at.is_not(None))
            self.ends_seen = {batch_id: when for batch_id, when in session.execute(ended) if when}

    @rule()
    def a_writer_of_results_ends(self) -> None:
        """Perhaps long after; the batch may have been open since, and have ended again."""
        for batch_id, seen in self.ends_seen.items():
            is_last = self.world.batch(batch_id).finished_at == seen
            assert self.world.db.write(results._mark_written, batch_id, seen) is is_last


class FewCalls(Machine):
    """Those alone that a missing fence needs to do harm: it is found within seconds."""

    retry = cancel_job = cancel_batch = cancel_attempt = fail = None  # type: ignore[assignment]


def run_machine(kind: type[Machine], *, examples: int, steps: int, **values: Any) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]  # hypothesis leaves it untyped
        kind,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            **values,
        ),
    )


def _run(world: World, machine: type[Machine] = Machine, **values: Any) -> None:
    class OnWorld(machine):  # type: ignore[valid-type, misc]  # a machine like any other
        pass

    OnWorld.world = world
    run_machine(OnWorld, **values)


def test_no_order_of_calls_leads_astray_on_sqlite(sqlite_world: World) -> None:
    _run(sqlite_world, examples=30, steps=40)


def test_no_order_of_calls_leads_astray_on_postgresql(postgres_world: World) -> None:
    _run(postgres_world, examples=8, steps=30)


def test_no_order_of_calls_with_pauses_and_results_leads_astray(world: World) -> None:
    _run(world, BatchMachine, examples=15, steps=35)


@pytest.mark.parametrize("hole", ["fence", "move"])
def test_the_machine_finds_a_missing_fence(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch, hole: str
) -> None:
    """Else its silence above would mean nothing."""
    if hole == "fence":
        monkeypatch.setattr(lifecycle, "_fence", lambda _: [Job.state == JobState.RUNNING])
    else:
        move = moves.move
        monkeypatch.setattr(
            moves, "move", lambda *args, holder=None, **values: move(*args, **values)
        )
    with pytest.raises(AssertionError):
        _run(
            sqlite_world,
            FewCalls,
            examples=300,
            steps=40,
            phases=[Phase.generate],
            report_multiple_bugs=False,
            derandomize=True,
            print_blob=False,
        )
