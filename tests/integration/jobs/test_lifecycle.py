"""Every change of a job's state, on both databases."""

import datetime as real_datetime
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, timedelta
from typing import Any

import pytest
from sqlalchemy import event, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from jobs import attempt_ids, database, failures, health, lifecycle, orders, retries, schema, states
from jobs.schema import Attempt, Batch, Job
from jobs.states import AttemptState, FailureKind, JobState
from tests.integration.jobs.conftest import BUDGETS, LEASE_SECONDS, World

BEFORE_IDS = real_datetime.datetime(2026, 1, 1, tzinfo=UTC)

# One job in each state, reached by the functions themselves.


def _queued(world: World) -> int:
    return world.only_job(world.submit()).id


def _running(world: World) -> int:
    job_id = _queued(world)
    world.claimed(job_id)
    return job_id


def _succeeded(world: World) -> int:
    job_id = _queued(world)
    assert world.succeed(world.claimed(job_id))
    return job_id


def _failed(world: World) -> int:
    job_id = _queued(world)
    assert world.fail(world.claimed(job_id), FailureKind.INPUT) is JobState.FAILED
    return job_id


def _cancelled(world: World) -> int:
    job_id = _queued(world)
    assert world.cancel_job(job_id) is JobState.CANCELLED
    return job_id


IN_STATE: dict[JobState, Callable[[World], int]] = {
    JobState.QUEUED: _queued,
    JobState.RUNNING: _running,
    JobState.SUCCEEDED: _succeeded,
    JobState.FAILED: _failed,
    JobState.CANCELLED: _cancelled,
}


def _moves(world: World, job: Job) -> dict[str, Callable[[], object]]:
    """Everything that anybody may call for this job."""
    holder = job.attempt_id
    moves: dict[str, Callable[[], object]] = {
        "claim": lambda: world.claim(job.id),
        "cancel_job": lambda: world.cancel_job(job.id),
        "cancel_batch": lambda: world.cancel_batch(job.batch_id),
        "retry": lambda: world.retry(job.batch_id, JobState.FAILED, JobState.CANCELLED),
        "end_lost": world.end_lost,
    }
    if holder is not None:
        moves |= {
            "heartbeat": lambda: world.heartbeat(holder),
            "rendered": lambda: world.rendered(holder),
            "succeed": lambda: world.succeed(holder),
            "fail": lambda: world.fail(holder),
            "fail for good": lambda: world.fail(holder, FailureKind.INPUT),
            "release": lambda: world.release(holder),
            "cancel_attempt": lambda: world.cancel_job(job.id) and world.cancel_attempt(holder),
        }
    return moves


def test_the_functions_make_every_transition_of_the_table_and_no_other(world: World) -> None:
    seen: dict[JobState, set[JobState]] = {state: set() for state in JobState}
    for state, make in IN_STATE.items():
        names = _moves(world, world.job(make(world)))
        for name in names:
            job = world.job(make(world))
            assert job.state is state
            _moves(world, job)[name]()
            world.check()
            after = world.job(job.id).state
            if after is not state:
                seen[state].add(after)
    assert seen == {state: set(after) for state, after in states.TRANSITIONS.items()}


def test_a_claim_carries_all_that_a_worker_needs(world: World) -> None:
    rows = [{"prompt": "a kite", "custom_id": "k", "seed": 7, "metadata": {"shot": "1"}}]
    job = world.only_job(world.submit(rows))
    claim = world.claim(job.id, worker="gpu1@here")
    assert claim is not None
    assert (claim.custom_id, claim.number, claim.meta) == ("k", 1, {"shot": "1"})
    assert (claim.spec.prompt, claim.spec.seed) == ("a kite", 7)
    assert claim.spec.look.id == job.look_id
    assert world.attempt(claim.attempt_id).worker == "gpu1@here"


def test_a_second_claim_of_the_same_job_gets_nothing(world: World) -> None:
    job_id = _queued(world)
    assert world.claim(job_id) is not None
    assert world.claim(job_id) is None
    world.check()


def test_a_claim_of_a_job_that_is_not_there_gets_nothing(world: World) -> None:
    assert world.claim(4711) is None


def test_a_job_is_not_claimed_before_its_time(world: World) -> None:
    job_id = _queued(world)
    later = retries.Budgets(max_errors=3, max_crashes=2, retry_seconds=600.0)
    world.fail(world.claimed(job_id), budgets=later)
    assert world.claim(job_id) is None
    world.make_runnable()
    assert world.claim(job_id) is not None


# Fences.


def _superseded(world: World) -> tuple[int, int, int]:
    """A job that was lost by one attempt and taken up by another."""
    job_id = _queued(world)
    old = world.claimed(job_id, worker="gpu0@slow")
    world.expire(old)
    assert world.end_lost() == [old]
    return job_id, old, world.claimed(job_id, worker="gpu0@here")


LATE_CALLS: dict[str, tuple[Callable[[World, int], object], object]] = {
    "heartbeat": (World.heartbeat, lifecycle.Verdict.SUPERSEDED),
    "rendered": (World.rendered, lifecycle.Verdict.SUPERSEDED),
    "succeed": (World.succeed, False),
    "fail": (World.fail, None),
    "fail for good": (lambda w, a: w.fail(a, FailureKind.INPUT), None),
    "release": (World.release, False),
    "cancel_attempt": (World.cancel_attempt, False),
}


@pytest.mark.parametrize("name", LATE_CALLS)
def test_a_superseded_attempt_changes_nothing(world: World, name: str) -> None:
    job_id, old, new = _superseded(world)
    before = _snapshot(world)
    call, answer = LATE_CALLS[name]
    assert call(world, old) == answer
    assert _snapshot(world) == before
    assert world.job(job_id).attempt_id == new
    assert world.succeed(new)
    assert call(world, old) == answer
    world.check()


@pytest.mark.parametrize("name", LATE_CALLS)
def test_an_attempt_that_lost_its_job_changes_nothing_while_the_job_waits(
    world: World, name: str
) -> None:
    job_id = _queued(world)
    old = world.claimed(job_id)
    assert world.release(old)
    before = _snapshot(world)
    call, answer = LATE_CALLS[name]
    assert call(world, old) == answer
    assert _snapshot(world) == before


TWICE: dict[str, Callable[[World, int], object]] = {
    **{name: call for name, (call, _) in LATE_CALLS.items() if name != "heartbeat"},
    "claim": lambda w, a: w.claim(w.attempt(a).job_id),
    "cancel_job": lambda w, a: w.cancel_job(w.attempt(a).job_id),
    "cancel_batch": lambda w, a: w.cancel_batch(w.job(w.attempt(a).job_id).batch_id),
    "retry": lambda w, a: w.retry(w.job(w.attempt(a).job_id).batch_id),
    "end_lost": lambda w, a: w.end_lost(worker="gpu0@here"),
    "release_worker": lambda w, a: w.db.write(
        lifecycle.release_worker, "gpu0@here", reason="drain"
    ),
}


@pytest.mark.parametrize("name", TWICE)
def test_a_call_that_comes_twice_changes_nothing_the_second_time(world: World, name: str) -> None:
    attempt_id = world.claimed(_queued(world))
    TWICE[name](world, attempt_id)
    # Renewing a lease is the one thing that a repetition may do.
    before = _snapshot(world, but=("lease_until", "heartbeat_at"))
    TWICE[name](world, attempt_id)
    assert _snapshot(world, but=("lease_until", "heartbeat_at")) == before
    world.check()


def test_a_repeated_success_is_still_a_success(world: World) -> None:
    attempt_id = world.claimed(_queued(world))
    assert world.succeed(attempt_id)
    assert world.succeed(attempt_id)


def test_an_attempt_is_numbered_and_its_id_is_never_used_again(world: World) -> None:
    job_id = _queued(world)
    first = world.claimed(job_id)
    world.release(first)
    with world.db.transaction() as session:
        session.delete(session.get_one(Attempt, first))
    second = world.claimed(job_id)
    assert second > first


# Budgets.


def test_ids_of_attempts_are_no_count_and_fit_into_a_number_of_json(world: World) -> None:
    """A database that is restored from a backup counts anew, and would give them again."""
    earliest = (BEFORE_IDS - attempt_ids.SINCE) // timedelta(milliseconds=1)
    attempt_id = world.claimed(_queued(world))
    assert earliest << attempt_ids.BITS < attempt_id < 1 << 53


def test_ids_of_attempts_grow_also_when_a_clock_goes_back(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is the newest of a worker is told by them."""
    ids = [world.claimed(_queued(world))]
    monkeypatch.setattr(attempt_ids, "new", lambda _now: 7)
    ids += [world.claimed(_queued(world)) for _ in range(5)]
    assert ids == sorted(set(ids))


def test_an_id_that_two_claims_draw_at_once_is_one_claim_that_is_missed(
    postgres_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of it is left, and its message is sent again."""
    world = postgres_world
    monkeypatch.setattr(attempt_ids, "new", lambda _now: 7)
    first, second = _queued(world), _queued(world)
    with ThreadPoolExecutor(1) as pool:
        with world.db.transaction() as session:
            held = {"worker": "gpu0@here", "lease_seconds": LEASE_SECONDS}
            assert lifecycle.claim(session, first, **held) is not None
            other = pool.submit(world.claim, second, worker="gpu1@here")
            time.sleep(0.2)
        with pytest.raises(IntegrityError):
            other.result(30)
    assert world.job(second).state is JobState.QUEUED
    world.check()
    assert world.claimed(second, worker="gpu1@here") > 7
    world.check()


def test_errors_are_retried_until_their_budget_is_spent(world: World) -> None:
    job_id = _queued(world)
    ends = []
    for number in range(3):
        attempt_id = world.claimed(job_id)
        ends.append(world.fail(attempt_id, FailureKind.ENCODING, error=f"try {number}"))
        assert world.attempt(attempt_id).state is AttemptState.FAILED
    assert ends == [JobState.QUEUED, JobState.QUEUED, JobState.FAILED]
    job = world.job(job_id)
    assert (job.error_count, job.crash_count, job.quarantined) == (3, 0, False)
    assert (job.failure_kind, job.error) == (FailureKind.ENCODING, "try 2")
    world.check()


def test_each_error_waits_longer_on_the_databases_clock(world: World) -> None:
    job_id = _queued(world)
    budgets = retries.Budgets(max_errors=9, max_crashes=2, retry_seconds=10.0)
    waits = []
    for _ in range(3):
        attempt_id = world.claimed(job_id)
        world.fail(attempt_id, budgets=budgets)
        job, attempt = world.job(job_id), world.attempt(attempt_id)
        assert job.not_before is not None
        assert attempt.finished_at is not None
        waits.append((job.not_before - attempt.finished_at).total_seconds())
        world.make_runnable()
    for wait, longest in zip(waits, (10, 20, 40), strict=True):
        assert longest / 2 - 1 < wait <= longest


def test_a_second_crash_quarantines_the_job(world: World) -> None:
    job_id = _queued(world)
    for expected in (JobState.QUEUED, JobState.FAILED):
        attempt_id = world.claimed(job_id)
        world.expire(attempt_id)
        assert world.end_lost() == [attempt_id]
        assert world.job(job_id).state is expected
        assert world.attempt(attempt_id).state is AttemptState.LOST
    job = world.job(job_id)
    assert (job.quarantined, job.crash_count, job.error_count) == (True, 2, 0)
    assert job.failure_kind is FailureKind.WORKER_LOST
    assert "gpu0@here" in (job.error or "")


def test_drains_cost_nothing(world: World) -> None:
    job_id = _queued(world)
    for _ in range(10):
        assert world.release(world.claimed(job_id))
    job = world.job(job_id)
    assert (job.state, job.error_count, job.crash_count) == (JobState.QUEUED, 0, 0)
    assert job.not_before is None


def test_a_failure_that_cannot_heal_is_not_retried(world: World) -> None:
    job_id = _queued(world)
    assert world.fail(world.claimed(job_id), FailureKind.INPUT) is JobState.FAILED
    assert world.job(job_id).quarantined is False


def test_a_later_success_leaves_no_error_behind(world: World) -> None:
    job_id = _queued(world)
    world.fail(world.claimed(job_id))
    world.succeed(world.claimed(job_id))
    job = world.job(job_id)
    assert (job.error, job.failure_kind) == (None, None)


def test_a_retry_gives_fresh_budgets_and_opens_the_batch(world: World) -> None:
    batch_id = world.submit(2)
    first, second = world.job_ids(batch_id)
    for _ in range(2):
        world.expire(world.claimed(first))
        world.end_lost()
    world.succeed(world.claimed(second))
    with world.db.transaction() as session:
        session.execute(update(Batch).values(manifest_at=database.now(session)))
    assert world.batch(batch_id).finished_at is not None
    assert world.retry(batch_id) == 1
    batch, job = world.batch(batch_id), world.job(first)
    assert (batch.finished_at, batch.manifest_at) == (None, None)
    assert (job.state, job.crash_count, job.quarantined) == (JobState.QUEUED, 0, False)
    world.check()
    assert world.succeed(world.claimed(first))
    assert world.batch(batch_id).finished_at is not None


def test_a_retry_may_name_its_jobs(world: World) -> None:
    batch_id = world.submit(3)
    ids = world.job_ids(batch_id)
    for job_id in ids:
        world.fail(world.claimed(job_id), FailureKind.INPUT)
    assert world.db.write(orders.retry_jobs, batch_id, job_ids=[ids[1]]).jobs == 1
    assert [job.state for job in world.jobs(batch_id)] == [
        JobState.FAILED,
        JobState.QUEUED,
        JobState.FAILED,
    ]
    world.check()


def test_a_retry_tells_how_many_will_probably_fail_as_before(world: World) -> None:
    batch_id = world.submit(5)
    ids = world.job_ids(batch_id)
    once = retries.Budgets(max_errors=1, max_crashes=1, retry_seconds=0.0)
    kinds = (
        FailureKind.INPUT,
        FailureKind.INPUT,
        FailureKind.REFUSED,
        FailureKind.WORKER_LOST,
        FailureKind.DEVICE,
    )
    for job_id, kind in zip(ids, kinds, strict=True):
        world.fail(world.claimed(job_id), kind, budgets=once)
    retried = world.db.write(orders.retry_jobs, batch_id)
    assert retried.jobs == 5
    assert retried.doubtful == {"quarantined": 1, "input": 2, "refused": 1}
    assert not retried.is_paused
    assert all(job.state is JobState.QUEUED for job in world.jobs(batch_id))
    world.check()


def test_a_retry_may_name_kinds_and_leave_out_what_is_quarantined(world: World) -> None:
    batch_id = world.submit(5)
    ids = world.job_ids(batch_id)
    once = retries.Budgets(max_errors=1, max_crashes=1, retry_seconds=0.0)
    world.fail(world.claimed(ids[0]), FailureKind.INPUT)
    world.fail(world.claimed(ids[1]), FailureKind.DEVICE, budgets=once)
    world.fail(world.claimed(ids[2]), FailureKind.WORKER_LOST, budgets=once)
    world.cancel_job(ids[3])

    def retry(*kinds: FailureKind, quarantined: bool | None = None) -> list[int]:
        which = failures.Which(kinds=kinds, quarantined=quarantined)
        both = (JobState.FAILED, JobState.CANCELLED)
        before = {job.id for job in world.jobs(batch_id) if job.state is JobState.QUEUED}
        retried = world.db.write(orders.retry_jobs, batch_id, from_states=both, which=which)
        queued = [job.id for job in world.jobs(batch_id) if job.state is JobState.QUEUED]
        new = [ids.index(job_id) for job_id in queued if job_id not in before]
        assert retried.jobs == len(new)
        world.check()
        return new

    assert retry(FailureKind.STORAGE) == []
    assert retry(FailureKind.WORKER_LOST, quarantined=False) == []
    assert retry(FailureKind.WORKER_LOST, FailureKind.DEVICE, quarantined=False) == [1]
    assert retry(quarantined=True) == [2]
    assert retry(quarantined=False) == [0, 3]


def test_a_retry_of_a_paused_batch_says_that_it_is(world: World) -> None:
    batch_id = world.submit(2)
    world.fail(world.claimed(world.job_ids(batch_id)[0]), FailureKind.INPUT)
    world.db.write(orders.pause_batch, batch_id)
    assert world.db.write(orders.retry_jobs, batch_id).is_paused
    assert world.batch(batch_id).state == "paused"


# Cancel.


def test_cancel_wins_over_every_requeue(world: World) -> None:
    for end in (
        lambda a: world.fail(a),
        lambda a: world.release(a),
        lambda a: (world.expire(a), world.end_lost()),
    ):
        job_id = _queued(world)
        attempt_id = world.claimed(job_id)
        assert world.cancel_job(job_id) is JobState.RUNNING
        assert world.heartbeat(attempt_id) is lifecycle.Verdict.CANCELLED
        end(attempt_id)
        assert world.job(job_id).state is JobState.CANCELLED
        assert not world.job(job_id).quarantined, "it was not given up"
        world.check()


def test_a_video_that_is_stored_before_the_cancel_is_heard_counts(world: World) -> None:
    job_id = _queued(world)
    attempt_id = world.claimed(job_id)
    world.cancel_job(job_id)
    assert world.succeed(attempt_id)
    assert world.job(job_id).state is JobState.SUCCEEDED
    world.check()


def test_a_cancelled_render_hears_it_when_it_hands_over(world: World) -> None:
    job_id = _queued(world)
    attempt_id = world.claimed(job_id)
    world.cancel_job(job_id)
    assert world.rendered(attempt_id) is lifecycle.Verdict.CANCELLED
    assert world.attempt(attempt_id).state is AttemptState.RUNNING


def test_cancelling_a_batch_stops_what_waits_and_asks_what_runs(world: World) -> None:
    batch_id = world.submit(4)
    done, runs, *_ = world.job_ids(batch_id)
    world.succeed(world.claimed(done))
    attempt_id = world.claimed(runs)
    assert world.cancel_batch(batch_id) == (2, 1)
    assert world.cancel_batch(batch_id) == (0, 0)
    assert world.batch(batch_id).cancel_requested_at is not None
    assert world.batch(batch_id).finished_at is None
    assert world.cancel_attempt(attempt_id)
    assert world.batch(batch_id).finished_at is not None
    world.check()


def test_a_retry_after_a_cancel_is_not_cancelled_again(world: World) -> None:
    batch_id = world.submit(2)
    first, _ = world.job_ids(batch_id)
    attempt_id = world.claimed(first)
    world.cancel_batch(batch_id)
    world.cancel_attempt(attempt_id)
    assert world.retry(batch_id, JobState.CANCELLED) == 2
    assert world.batch(batch_id).cancel_requested_at is None
    assert world.heartbeat(world.claimed(first)) is lifecycle.Verdict.GO_ON
    world.check()


def test_a_retry_lets_go_on_what_was_to_stop(world: World) -> None:
    batch_id = world.submit(3)
    first, second, third = world.job_ids(batch_id)
    hears_in_time, is_too_late = world.claimed(first), world.claimed(second)
    assert world.cancel_batch(batch_id) == (1, 2)
    assert world.heartbeat(is_too_late) is lifecycle.Verdict.CANCELLED
    assert world.retry(batch_id, JobState.FAILED) == 0
    assert world.retry(batch_id, JobState.CANCELLED) == 3
    assert world.batch(batch_id).cancel_requested_at is None
    assert world.heartbeat(hears_in_time) is lifecycle.Verdict.GO_ON
    assert world.cancel_attempt(is_too_late)
    assert world.job(second).state is JobState.QUEUED
    assert world.attempt(is_too_late).state is AttemptState.RELEASED
    assert world.job(third).state is JobState.QUEUED
    world.check()


def test_a_retry_finds_a_job_that_stops_in_that_moment(postgres_world: World) -> None:
    """Its worker has locked it, and waits for nobody."""
    world = postgres_world
    batch_id = world.submit(2)
    attempt_id = world.claimed(world.job_ids(batch_id)[0])
    world.cancel_batch(batch_id)
    with ThreadPoolExecutor(1) as pool, world.db.transaction() as session:
        assert lifecycle.cancel_attempt(session, attempt_id)
        retried = pool.submit(world.retry, batch_id, JobState.CANCELLED)
        with pytest.raises(TimeoutError):
            retried.result(0.5)
        session.commit()
        assert retried.result(20) == 2
    assert [job.state for job in world.jobs(batch_id)] == [JobState.QUEUED] * 2
    world.check()


def test_a_look_at_what_is_cancelled_that_comes_late_cancels_nothing(world: World) -> None:
    """The dispatcher reads which batches it has to go on with, and takes its time."""
    batch_id = world.submit(2)
    world.cancel_batch(batch_id)
    assert world.retry(batch_id, JobState.CANCELLED) == 2
    assert world.db.write(orders.go_on_cancelling, batch_id) == (0, 0)
    assert world.batch(batch_id).queued == 2
    world.db.write(orders.request_cancel, batch_id)
    assert world.db.write(orders.go_on_cancelling, batch_id) == (2, 0)


def test_a_retry_forgets_why_the_job_ended(world: World) -> None:
    batch_id = world.submit(1)
    job_id = world.only_job(batch_id).id
    world.fail(world.claimed(job_id), FailureKind.INPUT)
    assert world.only_job(batch_id).error == "it broke"
    world.retry(batch_id)
    world.cancel_batch(batch_id)
    job = world.only_job(batch_id)
    assert (job.state, job.failure_kind, job.error) == (JobState.CANCELLED, None, None)


def test_a_host_that_stays_away_with_finished_videos_is_charged_with_no_crash(
    world: World,
) -> None:
    """It was drained while the object store was away, and is not started again."""
    world.register("gpu0@gone")
    job_ids = world.job_ids(world.submit(health.MAX_SUSPECTS))
    for attempt_id in [world.claimed(job_id, worker="gpu0@gone") for job_id in job_ids]:
        world.rendered(attempt_id)
        world.expire(attempt_id)
    assert world.end_lost() == []
    for job_id in job_ids:
        job = world.job(job_id)
        assert (job.state, job.crash_count) == (JobState.QUEUED, 0)
    assert world.claim(job_ids[0], worker="gpu0@gone") is not None, "nothing speaks against it"


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_a_retry_in_the_middle_of_a_look_at_what_is_cancelled_is_not_undone(
    postgres_world: World, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = postgres_world
    batch_id = world.submit(3)
    running = world.claimed(world.job_ids(batch_id)[0])  # so that the batch is not over
    world.cancel_batch(batch_id)
    look = orders.go_on_cancelling
    if how == "deadline":
        look = orders.expire_batch
        with world.db.transaction() as session:
            past = database.now(session) - timedelta(seconds=1)
            session.execute(update(Batch).where(Batch.id == batch_id).values(deadline_at=past))
    real = orders._stop_jobs

    def overtaken(session: Session, *rest: Any) -> tuple[int, int]:
        assert world.retry(batch_id, JobState.CANCELLED) == 3
        return real(session, *rest)

    monkeypatch.setattr(orders, "_stop_jobs", overtaken)
    assert world.db.write(look, batch_id) == (0, 0)
    batch = world.batch(batch_id)
    assert (batch.queued, batch.cancelled, batch.cancel_requested_at) == (2, 0, None)
    assert batch.expired_at is None
    assert world.heartbeat(running) is lifecycle.Verdict.GO_ON


def test_a_job_that_is_given_back_while_its_batch_is_cancelled_is_found(
    postgres_world: World,
) -> None:
    """It was running when those that wait were looked for."""
    world = postgres_world
    batch_id = world.submit(1)
    (job_id,) = world.job_ids(batch_id)
    claim = world.claim(job_id)
    given_back: list[bool] = []

    def give_back(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if not given_back and statement.startswith("SELECT") and "jobs" in statement:
            given_back.append(False)
            given_back[0] = world.release(claim.attempt_id)

    event.listen(world.db.engine, "after_cursor_execute", give_back)
    try:
        world.cancel_batch(batch_id)
    finally:
        event.remove(world.db.engine, "after_cursor_execute", give_back)
    assert given_back == [True]
    assert world.jobs(batch_id)[0].state is JobState.CANCELLED


def test_no_job_escapes_a_cancel_while_workers_claim_and_requeue(postgres_world: World) -> None:
    """SQLite has one writer at a time; here each statement sees what others did before it."""
    world = postgres_world
    for _ in range(8):
        batch_id = world.submit(12)
        start = threading.Barrier(5)

        def work(seed: int, ids: list[int], start: threading.Barrier = start) -> None:
            chance = random.Random(seed)
            start.wait()
            for _ in range(20):
                claim = world.claim(chance.choice(ids))
                if claim is not None and chance.random() < 0.8:
                    world.release(claim.attempt_id)

        def cancel(batch_id: str = batch_id, start: threading.Barrier = start) -> None:
            start.wait()
            world.cancel_batch(batch_id)

        with ThreadPoolExecutor(5) as pool:
            ids = world.job_ids(batch_id)
            done = [pool.submit(work, seed, ids) for seed in range(4)]
            done.append(pool.submit(cancel))
            for future in done:
                future.result()
        left = [job for job in world.jobs(batch_id) if job.state is not JobState.CANCELLED]
        assert all(job.cancel_requested for job in left)
        world.check()


# Leases.


def test_a_heartbeat_keeps_the_lease_and_tells_how_far_it_is(world: World) -> None:
    attempt_id = world.claimed(_queued(world))
    world.expire(attempt_id)
    assert world.heartbeat(attempt_id, stage="denoise", step=2, steps=4) is lifecycle.Verdict.GO_ON
    attempt = world.attempt(attempt_id)
    assert (attempt.stage, attempt.step, attempt.steps) == ("denoise", 2, 4)
    assert world.end_lost() == []


def test_a_rendered_video_keeps_its_lease_without_progress(world: World) -> None:
    attempt_id = world.claimed(_queued(world))
    assert world.rendered(attempt_id) is lifecycle.Verdict.GO_ON
    attempt = world.attempt(attempt_id)
    assert attempt.state is AttemptState.RENDERED
    assert (attempt.seconds, attempt.peak_memory_bytes) == ({"denoise": 1.5}, 7)
    world.expire(attempt_id)
    assert world.rendered(attempt_id) is lifecycle.Verdict.GO_ON
    assert world.end_lost() == []
    world.check()


def test_a_dead_worker_loses_what_it_renders_and_keeps_what_lies_finished(world: World) -> None:
    batch_id = world.submit(3)
    renders, finished, other = world.job_ids(batch_id)
    world.rendered(world.claimed(finished))
    world.claimed(renders)
    world.claimed(other, worker="gpu1@here")
    (lost,) = world.end_lost(worker="gpu0@here")
    assert world.attempt(lost).job_id == renders
    assert world.job(renders).state is JobState.QUEUED
    assert world.job(finished).state is JobState.RUNNING
    assert world.job(other).state is JobState.RUNNING
    world.check()


def test_a_draining_worker_gives_everything_back(world: World) -> None:
    batch_id = world.submit(2)
    mine, other = world.job_ids(batch_id)
    attempt_id = world.claimed(mine)
    world.claimed(other, worker="gpu1@here")
    assert world.db.write(lifecycle.release_worker, "gpu0@here", reason="drain") == [attempt_id]
    assert world.attempt(attempt_id).note == "drain"
    world.check()


def test_a_dead_worker_is_charged_for_what_was_on_its_device_alone(world: World) -> None:
    """The job before it was only being finished, and cannot have ended the process."""
    first, second = world.job_ids(world.submit([{"prompt": "a"}, {"prompt": "b"}]))
    finishing, rendering = world.claimed(first), world.claimed(second)
    assert world.end_lost(worker="gpu0@here") == [rendering]
    states_then = (world.attempt(finishing).state, world.attempt(rendering).state)
    assert states_then == (AttemptState.RELEASED, AttemptState.LOST)
    assert (world.job(first).state, world.job(first).crash_count) == (JobState.QUEUED, 0)
    assert world.job(second).crash_count == 1
    world.check()


def test_a_silent_host_is_charged_for_the_newest_of_each_worker_alone(world: World) -> None:
    """Nobody says that it died: leases end, one a little before the other."""
    first, second = world.job_ids(world.submit(2))
    finishing, rendering = world.claimed(first), world.claimed(second)
    world.expire(rendering)
    assert world.end_lost() == [rendering]
    world.expire(finishing)
    assert world.end_lost() == []
    assert world.attempt(finishing).state is AttemptState.RELEASED
    assert (world.job(first).crash_count, world.job(second).crash_count) == (0, 1)
    world.check()


def test_a_job_in_whose_tail_workers_die_again_and_again_is_charged(world: World) -> None:
    """Else one that ends its workers there would do so for ever."""
    first, *others = world.job_ids(world.submit([{"prompt": str(i)} for i in range(4)]))
    for other in others:
        finishing = world.claimed(first)
        world.claimed(other)
        world.end_lost(worker="gpu0@here")
    assert world.attempt(finishing).state is AttemptState.LOST
    assert world.job(first).crash_count == 1


def test_a_worker_keeps_what_it_says_it_works_on(world: World) -> None:
    first, second = world.job_ids(world.submit([{"prompt": "a"}, {"prompt": "b"}]))
    kept, unknown = world.claimed(first), world.claimed(second)
    released = world.db.write(
        lifecycle.release_worker, "gpu0@here", reason="unheard of", keep=[kept]
    )
    assert released == [unknown]
    assert world.attempt(kept).state is AttemptState.RUNNING


def test_a_worker_with_a_wrong_clock_changes_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leases, waits and ends are measured by the database alone."""

    class AnyDatetime(type):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, real_datetime.datetime)

    class Wrong(real_datetime.datetime, metaclass=AnyDatetime):
        @classmethod
        def now(cls, tz: real_datetime.tzinfo | None = None) -> "Wrong":
            return cls(1999, 1, 1, tzinfo=tz)

        @classmethod
        def utcnow(cls) -> "Wrong":
            return cls(1999, 1, 1)

    first, second = world.job_ids(world.submit(2))
    with monkeypatch.context() as wrong:
        for module in (lifecycle, database, schema):
            wrong.setattr(module, "datetime", Wrong)
        wrong.setattr(time, "time", lambda: 0.0)
        attempt_id = world.claimed(first)
        world.heartbeat(attempt_id)
        world.fail(world.claimed(second))
    with world.db.reading() as session:
        now = database.now(session)
    attempt = world.attempt(attempt_id)
    for moment, expected in (
        (attempt.started_at, now),
        (attempt.heartbeat_at, now),
        (attempt.lease_until, now + timedelta(seconds=60)),
        (world.job(second).not_before, now),
    ):
        assert moment is not None
        assert abs((moment - expected).total_seconds()) < 30
    assert world.end_lost() == []


def test_an_attempt_that_holds_no_job_is_closed(world: World) -> None:
    """Cannot happen by our functions; a row that somebody changed by hand does not stay open."""
    job_id = _queued(world)
    attempt_id = world.claimed(job_id)
    with world.db.transaction() as session:
        session.execute(
            update(Job).where(Job.id == job_id).values(state=JobState.QUEUED, attempt_id=None)
        )
        session.execute(update(Batch).values(queued=1, running=0))
    world.expire(attempt_id)
    assert world.end_lost() == []
    assert world.attempt(attempt_id).state is AttemptState.LOST
    world.check()


def test_more_lost_attempts_than_one_transaction_takes_are_ended_in_the_next(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "LOST_AT_ONCE", 2)
    for number, job_id in enumerate(world.job_ids(world.submit(5))):
        world.expire(world.claimed(job_id, worker=f"gpu{number}@here"))
    assert [len(world.end_lost()) for _ in range(4)] == [2, 2, 1, 0]
    world.check()


def test_errors_are_stored_in_bounds(world: World) -> None:
    attempt_id = world.claimed(_queued(world))
    world.db.write(
        lifecycle.fail,
        attempt_id,
        kind=FailureKind.INTERNAL,
        error="e" * 10**6,
        detail="d" * 10**6 + "the end",
        budgets=BUDGETS,
    )
    attempt = world.attempt(attempt_id)
    assert len(attempt.error or "") == lifecycle.MAX_ERROR_CHARS
    assert len(attempt.error_detail or "") == lifecycle.MAX_DETAIL_CHARS
    assert (attempt.error_detail or "").endswith("the end")


def test_any_text_of_an_exception_can_be_stored(world: World) -> None:
    """A message with NUL or half a character must not cost the job its failure."""
    told = "before\0after \udcff"
    job_id = _queued(world)
    released = world.claimed(job_id)
    assert world.heartbeat(released, note=told) is lifecycle.Verdict.GO_ON
    assert world.db.write(
        lifecycle.rendered,
        released,
        seconds={},
        peak_memory_bytes=None,
        lease_seconds=LEASE_SECONDS,
        memory=told,
        note=told,
    )
    assert world.db.write(lifecycle.release, released, reason=told)
    failed = world.claimed(job_id)
    state = world.db.write(
        lifecycle.fail,
        failed,
        kind=FailureKind.INTERNAL,
        error=told,
        detail=told,
        budgets=BUDGETS,
    )
    assert state is JobState.QUEUED
    texts = (world.attempt(released).note, world.attempt(released).memory)
    texts += (world.attempt(failed).error, world.attempt(failed).error_detail)
    assert all((text or "").startswith("before") for text in texts)


def test_a_batch_ends_exactly_with_its_last_open_job(world: World) -> None:
    batch_id = world.submit(4)
    one, two, three, four = world.job_ids(batch_id)
    world.succeed(world.claimed(one))
    world.fail(world.claimed(two), FailureKind.INPUT)
    world.cancel_job(three)
    assert world.batch(batch_id).finished_at is None
    attempt_id = world.claimed(four)
    assert world.batch(batch_id).finished_at is None
    world.succeed(attempt_id)
    end = world.batch(batch_id).finished_at
    assert end is not None
    assert end >= (world.job(four).finished_at or end)
    world.retry(batch_id)
    assert world.batch(batch_id).finished_at is None


# At once.


@pytest.mark.parametrize("round_", range(3))
def test_of_many_claims_at_once_exactly_one_wins(world: World, round_: int) -> None:
    job_ids = world.job_ids(world.submit(5))
    start = threading.Barrier(8)

    def claim_all(worker: str) -> list[int]:
        start.wait()
        return [job_id for job_id in job_ids if world.claim(job_id, worker=worker)]

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim_all, [f"gpu{number}@here" for number in range(8)]))
    assert sorted(job_id for ids in won for job_id in ids) == job_ids
    world.check()


def test_two_publishers_of_one_video_both_hear_that_it_counts(world: World) -> None:
    for job_id in world.job_ids(world.submit(10)):
        attempt_id = world.claimed(job_id)
        start = threading.Barrier(2)

        def succeed(attempt_id: int = attempt_id, start: threading.Barrier = start) -> bool:
            start.wait()
            return world.succeed(attempt_id)

        with ThreadPoolExecutor(2) as pool:
            assert [f.result() for f in [pool.submit(succeed) for _ in range(2)]] == [True, True]
    world.check()


def _snapshot(world: World, *, but: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    with world.db.reading() as session:
        for table in (Batch, Job, Attempt):
            columns = [c for c in table.__table__.columns if c.name not in but]
            found = session.execute(select(*columns).order_by(table.id)).mappings()
            rows.extend(dict(row) for row in found)
    return rows
