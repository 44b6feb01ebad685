"""Which workers are trusted: three different jobs in a row take one out, a test brings it back."""

from collections.abc import Callable
from datetime import timedelta

import pytest
from sqlalchemy import update

from jobs import database, health, lifecycle, queries, retries, selection, states, workers
from jobs.schema import Attempt, Refusal
from jobs.schema import Worker as WorkerRow
from tests.integration.jobs.conftest import BUDGETS, QUEUE, World

BAD, GOOD, THIRD = "gpu0@a", "gpu0@b", "gpu0@c"
SAME_HOST = "gpu1@a"
KIND = states.FailureKind
PATIENT = retries.Budgets(max_errors=50, max_crashes=50, retry_seconds=0.0)


def fail_on(world: World, job_id: int, worker: str, kind: KIND = KIND.DEVICE) -> states.JobState:
    """One attempt of this job at this worker, and how its job is left."""
    world.make_runnable()
    attempt_id = world.claimed(job_id, worker=worker)
    state = world.fail(attempt_id, kind, budgets=PATIENT, error="fell off the bus")
    assert state is not None
    return state


def out(world: World) -> dict[str, Refusal]:
    with world.db.reading() as session:
        return {held.worker: held for held in workers.refusals(session) if held.needs_test}


def takes(world: World, name: str) -> tuple[str, ...]:
    with world.db.reading() as session:
        live = {each.worker.name: each for each in queries.live_workers(session)}
    return live[name].takes


def taken_out(world: World) -> list[int]:
    """Three jobs that failed on BAD; GOOD is there too."""
    world.register(BAD)
    world.register(GOOD)
    ids = world.job_ids(world.submit(5))
    for job_id in ids[:3]:
        fail_on(world, job_id, BAD)
    return ids


@pytest.mark.parametrize("kind", sorted(retries.OF_MACHINE))
def test_three_different_jobs_in_a_row_take_a_worker_out(sqlite_world: World, kind: KIND) -> None:
    world = sqlite_world
    world.register(BAD)
    ids = world.job_ids(world.submit(3))
    for job_id in ids[:2]:
        fail_on(world, job_id, BAD, kind)
    assert out(world) == {}
    fail_on(world, ids[2], BAD, kind)
    assert out(world)[BAD].kind is kind


def test_one_that_is_out_claims_nothing_and_its_jobs_go_elsewhere_for_one_attempt_each(
    world: World,
) -> None:
    ids = taken_out(world)
    reason = out(world)[BAD].reason
    assert "3 different jobs" in reason
    assert "fell off the bus" in reason
    assert takes(world, BAD) == ()
    world.make_runnable()
    assert world.claim(ids[3], worker=BAD) is None
    for job_id in ids:
        assert world.succeed(world.claimed(job_id, worker=GOOD))
    assert [world.job(job_id).error_count for job_id in ids] == [1, 1, 1, 0, 0]
    world.check()


def test_lost_attempts_count_as_crashes_of_the_machine(world: World) -> None:
    world.register(BAD)
    for job_id in world.job_ids(world.submit(3)):
        world.expire(world.claimed(job_id, worker=BAD))
        assert len(world.end_lost()) == 1
    assert set(out(world)) == {BAD}


def test_a_job_that_goes_well_between_ends_the_row(sqlite_world: World) -> None:
    world = sqlite_world
    world.register(BAD)
    ids = world.job_ids(world.submit(4))
    for job_id in ids[:2]:
        fail_on(world, job_id, BAD)
    world.db.write(workers.accept, BAD, queue=QUEUE)
    for job_id in ids[2:]:
        fail_on(world, job_id, BAD)
    assert out(world) == {}


@pytest.mark.parametrize(
    "kind", sorted(set(states.FailureKind) - retries.OF_MACHINE - {KIND.DEADLINE})
)
def test_what_is_the_jobs_own_fault_says_nothing_against_a_worker(
    sqlite_world: World, kind: KIND
) -> None:
    sqlite_world.register(BAD)
    for job_id in sqlite_world.job_ids(sqlite_world.submit(4)):
        fail_on(sqlite_world, job_id, BAD, kind)
    assert out(sqlite_world) == {}


def test_one_bad_job_is_quarantined_after_three_workers_and_takes_none_out(
    sqlite_world: World,
) -> None:
    """Nor do several such jobs: what has failed elsewhere too is not held against a worker."""
    world = sqlite_world
    names = (BAD, GOOD, THIRD)
    for name in names:
        world.register(name)
    ids = world.job_ids(world.submit(3))
    for job_id in ids:
        ends = [fail_on(world, job_id, name, KIND.INTERNAL) for name in names]
        assert ends == [states.JobState.QUEUED, states.JobState.QUEUED, states.JobState.FAILED]
        assert world.job(job_id).quarantined
        world.db.write(workers.accept, BAD, queue=QUEUE)  # which was the first one each time
    assert out(world) == {}
    assert world.retry(world.job(ids[0]).batch_id) == 3
    again = [fail_on(world, ids[0], name, KIND.INTERNAL) for name in names]
    assert again == ends, "what was before the retry is forgotten"


def test_the_same_job_again_and_again_takes_no_worker_out(sqlite_world: World) -> None:
    world = sqlite_world
    world.register(BAD)
    job_id = world.only_job(world.submit()).id
    assert [fail_on(world, job_id, BAD) for _ in range(4)] == [states.JobState.QUEUED] * 4
    assert out(world) == {}


def test_a_job_is_left_to_others_by_the_worker_on_which_it_failed(world: World) -> None:
    world.register(BAD)
    job_id = world.only_job(world.submit()).id
    fail_on(world, job_id, BAD)
    world.make_runnable()
    world.register(GOOD)
    assert world.claim(job_id, worker=BAD) is None
    world.make_runnable()
    assert world.claim(job_id, worker=GOOD) is not None


def others_are_silent(world: World) -> None:
    world.silence(GOOD)


def others_refuse(world: World) -> None:
    kind = states.FailureKind.WEIGHTS
    world.db.write(workers.refuse, GOOD, queue=QUEUE, kind=kind, reason="gone")


def others_had_their_time(world: World) -> None:
    with world.db.transaction() as session:
        past = database.now(session) - timedelta(seconds=health.ELSEWHERE_SECONDS + 1)
        session.execute(update(Attempt).values(finished_at=past))


def it_was_asked_for_anew(world: World) -> None:
    """With fresh budgets nothing is held against anybody."""
    batch_id = world.job(1).batch_id
    world.db.write(
        lifecycle.fail, world.claimed(1, worker=GOOD), kind=KIND.INPUT, error="", budgets=PATIENT
    )
    assert world.retry(batch_id) == 1


@pytest.mark.parametrize(
    "change", [others_are_silent, others_refuse, others_had_their_time, it_was_asked_for_anew]
)
def test_a_job_comes_back_where_it_failed_when_nobody_else_takes_it(
    sqlite_world: World, change: Callable[[World], None]
) -> None:
    world = sqlite_world
    world.register(BAD)
    world.register(GOOD)
    job_id = world.only_job(world.submit()).id
    fail_on(world, job_id, BAD)
    world.make_runnable()
    assert world.claim(job_id, worker=BAD) is None
    world.make_runnable()
    change(world)
    assert world.claim(job_id, worker=BAD) is not None


@pytest.mark.parametrize(("since_failure", "wait"), [(0, 20), (60, 60), (200, 120)], ids=str)
def test_a_job_that_is_left_to_others_gives_way_to_other_work(
    world: World, since_failure: int, wait: int
) -> None:
    """Else it would be sent to the same host again and again, before all that this one can do."""
    world.register(BAD)
    world.register(GOOD)
    job_id, other = world.job_ids(world.submit(2))
    attempt_id = world.claimed(job_id, worker=BAD)
    world.fail(attempt_id, KIND.WEIGHTS)
    world.make_runnable()
    with world.db.transaction() as session:
        failed_at = database.now(session) - timedelta(seconds=since_failure)
        session.execute(update(Attempt).values(finished_at=failed_at))
    assert world.claim(job_id, worker=BAD) is None
    left = world.job(job_id)
    assert left.state is states.JobState.QUEUED
    assert left.not_before is not None
    assert 0 <= (left.not_before - failed_at).total_seconds() - since_failure - wait < 5
    with world.db.reading() as session:
        chosen = selection.choose(session, queues=[QUEUE], room=5, waiting=[])
    assert [job.id for job in chosen] == [other]


def due(world: World) -> bool:
    with world.db.reading() as session:
        return health.is_due_for_test(session, BAD)


def make_due(world: World) -> None:
    with world.db.transaction() as session:
        session.execute(update(Refusal).values(until=database.now(session)))


def test_a_test_that_passes_brings_a_worker_back(world: World) -> None:
    taken_out(world)
    assert due(world)
    world.db.write(health.tested, BAD, failure=None)
    assert out(world) == {}
    assert takes(world, BAD) == (QUEUE,)
    with world.db.reading() as session:
        row = session.get_one(WorkerRow, BAD)
    assert (row.suspects, row.test_failure) == (None, None)
    assert row.tested_at is not None


def test_a_test_that_fails_is_tried_again_later_and_later(sqlite_world: World) -> None:
    world = sqlite_world
    taken_out(world)
    longest = workers.FIRST_REFUSAL_SECONDS
    for times in range(2, 8):
        world.db.write(health.tested, BAD, failure="NaN")
        assert not due(world)
        held = out(world)[BAD]
        assert (held.times, held.reason) == (times, "its self-test failed: NaN")
        with world.db.reading() as session:
            wait = (held.until - database.now(session)).total_seconds()
        assert longest / 2 - 5 <= wait <= longest
        assert takes(world, BAD) == ()
        make_due(world)
        assert due(world)
        assert takes(world, BAD) == ()  # the end of the wait is not the end of the refusal
        longest = min(2 * longest, retries.LONGEST_WAIT_SECONDS)


def test_one_that_passes_and_fails_three_jobs_again_waits_before_its_next_test(
    sqlite_world: World,
) -> None:
    world = sqlite_world
    taken_out(world)
    world.db.write(health.tested, BAD, failure=None)
    for job_id in world.job_ids(world.submit(3)):
        fail_on(world, job_id, BAD)
    assert BAD in out(world)
    assert not due(world)
    world.db.write(health.tested, BAD, failure=None)
    world.db.write(workers.accept, BAD, queue=QUEUE)  # a job has gone well: a new story
    for job_id in world.job_ids(world.submit(3)):
        fail_on(world, job_id, BAD)
    assert due(world)


def test_a_test_that_was_asked_for_begins_when_the_worker_is_idle(world: World) -> None:
    world.register(BAD)
    first, second = world.job_ids(world.submit(2))
    attempt_id = world.claimed(first, worker=BAD)
    world.db.write(health.ask_for_test, BAD)
    assert not due(world)
    assert world.claim(second, worker=BAD) is None
    world.rendered(attempt_id)
    world.db.write(workers.accept, BAD, queue=QUEUE)
    assert due(world), "a job that goes well is no test"
    world.db.write(health.tested, BAD, failure="NaN")
    assert not due(world)
    world.db.write(health.ask_for_test, BAD)
    assert due(world)
    assert out(world)[BAD].reason == "its self-test failed: NaN", "which is still why it is out"


def test_a_full_disk_or_another_failure_does_not_end_the_need_of_a_test(world: World) -> None:
    ids = taken_out(world)
    before = out(world)[BAD].reason
    world.db.write(
        workers.refuse, BAD, queue=workers.ALL_QUEUES, kind=KIND.DISK, reason="a full disk"
    )
    world.db.write(health.suspect, BAD, job_id=ids[4], kind=KIND.DEVICE, error="late news")
    assert out(world)[BAD].reason == before
    assert due(world)


def test_an_operator_may_readmit_without_a_test(world: World) -> None:
    taken_out(world)
    assert world.db.write(health.readmit, BAD)
    assert takes(world, BAD) == (QUEUE,)
    assert not world.db.write(health.readmit, BAD)
    world.db.write(health.tested, BAD, failure="too late to matter")
    assert takes(world, BAD) == (QUEUE,)
    refused = {"queue": workers.ALL_QUEUES, "kind": KIND.DISK, "reason": "a full disk"}
    world.db.write(workers.refuse, BAD, **refused)
    world.db.write(health.tested, BAD, failure="too late as well")
    with world.db.reading() as session:
        assert [held.reason for held in workers.refusals(session)] == ["a full disk"]


def test_any_words_of_a_failure_can_be_stored(world: World) -> None:
    """Else a worker that fails in such words would be taken out of nothing."""
    told = "/mnt/\0/\udcff"
    world.register(BAD)
    refused = {"queue": QUEUE, "kind": KIND.WEIGHTS, "reason": told}
    assert world.db.write(workers.refuse, BAD, **refused)
    for job_id in (1, 2, 3):
        world.db.write(health.suspect, BAD, job_id=job_id, kind=KIND.DEVICE, error=told)
    assert "/mnt/" in out(world)[BAD].reason
    world.db.write(health.tested, BAD, failure=told)
    assert "/mnt/" in out(world)[BAD].reason


@pytest.mark.parametrize("kind", [KIND.ENCODING, KIND.OUT_OF_MEMORY])
def test_what_another_machine_may_well_do_is_tried_there(sqlite_world: World, kind: KIND) -> None:
    """And is held against nobody."""
    world = sqlite_world
    world.register(BAD)
    (job_id, *others) = world.job_ids(world.submit(4))
    for each in (job_id, *others):
        fail_on(world, each, BAD, kind)
    assert out(world) == {}
    world.make_runnable()
    world.register(GOOD)
    assert world.claim(job_id, worker=BAD) is None
    world.make_runnable()
    assert world.claim(job_id, worker=GOOD) is not None


@pytest.mark.parametrize("kind", sorted(retries.OF_HOST))
def test_what_lies_at_the_files_of_a_host_is_tried_on_another_host(
    world: World, kind: KIND
) -> None:
    """All of its workers would fail alike, and a whole batch of jobs with them."""
    world.register(BAD)
    world.register(SAME_HOST)
    world.register(GOOD)
    jobs = world.job_ids(world.submit(3))
    assert {fail_on(world, job_id, BAD, kind) for job_id in jobs} == {states.JobState.QUEUED}
    assert out(world) == {}
    world.make_runnable()
    assert world.claim(jobs[0], worker=BAD) is None
    world.make_runnable()
    assert world.claim(jobs[0], worker=SAME_HOST) is None
    world.make_runnable()
    for job_id in jobs:
        assert world.succeed(world.claimed(job_id, worker=GOOD))


@pytest.mark.parametrize("kind", sorted(retries.OF_HOST))
def test_a_host_that_fails_a_job_whenever_it_may_ends_it_not_while_another_is_busy(
    sqlite_world: World, kind: KIND
) -> None:
    world = sqlite_world
    world.register(BAD)
    world.register(GOOD)
    job_id = world.only_job(world.submit()).id
    for _ in range(5):
        world.make_runnable()
        attempt_id = world.claimed(job_id, worker=BAD)
        assert world.fail(attempt_id, kind) is states.JobState.QUEUED
        world.make_runnable()
        assert world.claim(job_id, worker=BAD) is None
        others_had_their_time(world)
    world.make_runnable()
    world.silence(GOOD)
    assert world.fail(world.claimed(job_id, worker=BAD), kind) is states.JobState.FAILED


@pytest.mark.parametrize("kind", sorted(retries.OF_HOST))
def test_a_job_that_another_host_could_take_and_never_does_ends_after_an_hour_and_a_half(
    sqlite_world: World, kind: KIND
) -> None:
    """That host may have lost Redis, or be busy for hours."""
    world = sqlite_world
    world.register(BAD)
    world.register(GOOD)
    job_id = world.only_job(world.submit()).id
    ends = []
    for _ in range(retries.MAX_ROUNDS * BUDGETS.max_errors):
        world.make_runnable()
        ends.append(world.fail(world.claimed(job_id, worker=BAD), kind))
        others_had_their_time(world)
    assert ends == [states.JobState.QUEUED] * 8 + [states.JobState.FAILED]


@pytest.mark.parametrize("first", [BAD, GOOD])
def test_two_hosts_that_fail_a_job_each_in_its_way_do_not_hand_it_back_and_forth(
    sqlite_world: World, first: str
) -> None:
    world = sqlite_world
    kinds = {BAD: KIND.INPUT, GOOD: KIND.WEIGHTS}
    second = ({BAD, GOOD} - {first}).pop()
    for name in (BAD, GOOD, SAME_HOST, "gpu1@b"):
        world.register(name)
    job_id = world.only_job(world.submit()).id
    ends = []
    for name in (first, second, BAD):
        world.make_runnable()
        ends.append(world.fail(world.claimed(job_id, worker=name), kinds[name]))
        if ends[-1] is states.JobState.FAILED:
            break
    assert ends[-1] is states.JobState.FAILED


@pytest.mark.parametrize("kind", sorted(set(KIND) - retries.OF_JOB - retries.CRASHES))
def test_what_one_host_says_again_spends_nothing_of_what_is_left_for_other_failures(
    sqlite_world: World, kind: KIND
) -> None:
    world = sqlite_world
    for name in (BAD, GOOD, THIRD):
        world.register(name)
    job_id = world.only_job(world.submit()).id
    for _ in range(4):
        world.make_runnable()
        world.fail(world.claimed(job_id, worker=BAD), KIND.WEIGHTS)
        others_had_their_time(world)
    world.make_runnable()
    assert world.fail(world.claimed(job_id, worker=GOOD), kind) is states.JobState.QUEUED
    assert world.job(job_id).error_count == 5
    world.make_runnable()
    assert world.fail(world.claimed(job_id, worker=THIRD), kind) is states.JobState.FAILED


def test_a_job_that_cannot_be_rendered_ends_when_a_second_host_says_so(
    sqlite_world: World,
) -> None:
    world = sqlite_world
    for name in (BAD, GOOD, THIRD):
        world.register(name)
    first, second = world.job_ids(world.submit(2))
    assert fail_on(world, first, BAD, KIND.INPUT) is states.JobState.QUEUED
    assert fail_on(world, first, GOOD, KIND.INPUT) is states.JobState.FAILED
    assert fail_on(world, second, GOOD, KIND.DEVICE) is states.JobState.QUEUED
    assert fail_on(world, second, BAD, KIND.INPUT) is states.JobState.QUEUED
    assert fail_on(world, second, THIRD, KIND.INPUT) is states.JobState.FAILED


@pytest.mark.parametrize(
    "change",
    [others_are_silent, others_refuse, lambda world: world.db.write(health.ask_for_test, GOOD)],
)
def test_a_job_that_cannot_be_rendered_ends_at_once_where_nobody_else_is_there(
    sqlite_world: World, change: Callable[[World], None]
) -> None:
    world = sqlite_world
    world.register(BAD)
    world.register(SAME_HOST)
    world.register(GOOD)
    change(world)
    job_id = world.only_job(world.submit()).id
    assert fail_on(world, job_id, BAD, KIND.INPUT) is states.JobState.FAILED


def test_messages_that_arrive_while_a_worker_refuses_make_it_no_longer(
    sqlite_world: World,
) -> None:
    world = sqlite_world
    world.register(BAD)
    told = {"queue": workers.ALL_QUEUES, "kind": KIND.DISK, "reason": "full"}
    first = world.db.write(workers.refuse, BAD, **told)
    for _ in range(20):
        assert world.db.write(workers.refuse, BAD, **told) <= first
    with world.db.transaction() as session:
        (held,) = workers.refusals(session)
        assert held.times == 1
        session.execute(update(Refusal).values(until=held.since))
    world.db.write(workers.refuse, BAD, **told)
    with world.db.reading() as session:
        assert [held.times for held in workers.refusals(session)] == [2]


def test_a_job_that_goes_well_says_nothing_of_other_queues(sqlite_world: World) -> None:
    """Else a worker without one model would be sent its jobs after each video of another."""
    world = sqlite_world
    world.register(BAD, also=["rushes.render.other"])
    for queue in ("rushes.render.other", workers.ALL_QUEUES):
        world.db.write(workers.refuse, BAD, queue=queue, kind=KIND.WEIGHTS, reason="gone")
    world.db.write(workers.accept, BAD, queue=QUEUE)
    assert takes(world, BAD) == (QUEUE,)
