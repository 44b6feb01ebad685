"""Fair shares, pause, priority, deadlines and quotas, as dispatch and claim keep them."""

import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from jobs import (
    bulk,
    cancelling,
    database,
    errors,
    lifecycle,
    order,
    orders,
    prompt_row,
    queries,
    selection,
    states,
    submission,
)
from jobs.schema import Batch, Job
from jobs.states import BatchState, JobState
from tests.integration.jobs.conftest import PRESET, QUEUE, World, prompt_file


def sent(world: World, room: int = 1, **quota: Any) -> list[Job]:
    """What a dispatcher chooses now, marked as sent."""
    with world.db.reading() as session:
        chosen = selection.choose(session, queues=[QUEUE], room=room, waiting=set(), **quota)
    taken = world.db.write(selection.take, chosen)
    world.db.write(selection.mark_served, sorted({job.batch_id for job in taken}))
    return [world.job(job.id) for job in taken]


def batches_of(jobs: Sequence[Job]) -> list[str]:
    return [job.batch_id for job in jobs]


def test_a_small_batch_is_not_held_up_by_a_huge_one(world: World) -> None:
    huge = world.submit(200, owner="ann")
    small = world.submit(3, owner="bob")
    assert Counter(batches_of(sent(world, room=6))) == {huge: 3, small: 3}


def test_turns_go_on_from_call_to_call(world: World) -> None:
    one, two = world.submit(9, owner="ann"), world.submit(9, owner="bob")
    turns = [batches_of(sent(world)) for _ in range(6)]
    assert turns == [[one], [two]] * 3


def test_an_owner_gains_nothing_by_many_batches(world: World) -> None:
    for _ in range(12):
        world.submit(1, owner="ann")
    world.submit(12, owner="bob")
    owners: list[str] = []
    for _ in range(10):
        owners += [world.batch(batch_id).owner for batch_id in batches_of(sent(world))]
    assert Counter(owners) == {"ann": 5, "bob": 5}


def test_batches_of_one_owner_take_turns(world: World) -> None:
    ids = [world.submit(5, owner="ann") for _ in range(3)]
    turns = [batches_of(sent(world))[0] for _ in range(6)]
    assert turns == [*ids, *ids]


def test_the_next_batch_comes_into_it_when_the_first_ones_wait_for_a_retry(world: World) -> None:
    """However many of their jobs wait."""
    waiting = [world.submit(1, owner="ann") for _ in range(60)]
    ready = world.submit(1, owner="ann")
    with world.db.transaction() as session:
        later = database.now(session) + timedelta(hours=1)
        session.execute(update(Job).where(Job.batch_id.in_(waiting)).values(not_before=later))
    assert batches_of(sent(world)) == [ready]


def test_a_higher_priority_deep_in_another_batch_goes_first(world: World) -> None:
    world.submit(50, owner="ann")
    rows = [{"prompt": "x"}] * 40 + [{"prompt": "y", "priority": 3}]
    mixed = world.submit(rows, owner="bob")
    assert [job.prompt for job in sent(world)] == ["y"]
    assert world.jobs(mixed)[40].dispatched_at is not None


def test_a_batch_is_moved_with_all_its_jobs_at_once(world: World) -> None:
    first = world.submit(3)
    rows = [{"prompt": "plain"}, {"prompt": "own", "priority": 2}]
    second = world.submit(rows, priority=1)
    assert world.db.write(orders.prioritize_batch, second, 5)
    assert [job.prompt for job in sent(world, room=2)] == ["own", "plain"]
    assert world.db.write(orders.prioritize_batch, second, -5)
    assert batches_of(sent(world, room=3)) == [first] * 3
    with world.db.reading() as session:
        assert queries.highest_priority(session) == 0


def test_a_job_is_moved_by_itself(world: World) -> None:
    batch_id = world.submit(4)
    world.db.write(orders.prioritize_batch, batch_id, 7)
    last = world.job_ids(batch_id)[3]
    assert world.db.write(orders.prioritize_job, last, 8)
    with world.db.reading() as session:
        assert queries.highest_priority(session) == 8
    assert [job.id for job in sent(world)] == [last]
    world.claimed(last)
    assert not world.db.write(orders.prioritize_job, last, 9)


# Pause.


def test_a_paused_batch_is_not_sent_and_a_message_on_its_way_is_refused(world: World) -> None:
    batch_id = world.submit(3)
    first, second, _ = world.job_ids(batch_id)
    attempt_id = world.claimed(first)
    assert world.db.write(orders.pause_batch, batch_id)
    assert not world.db.write(orders.pause_batch, batch_id)
    assert sent(world) == []
    assert world.claim(second) is None
    assert world.job(second).state is JobState.QUEUED
    assert world.batch(batch_id).state is BatchState.PAUSED
    assert world.succeed(attempt_id)
    assert world.db.write(orders.resume_batch, batch_id)
    assert not world.db.write(orders.resume_batch, batch_id)
    assert world.claim(second) is not None
    world.check()


def test_no_claim_takes_effect_after_a_pause_did(world: World) -> None:
    """Claims and the pause at the same moment: what runs afterwards ran when it was paused."""
    batch_id = world.submit(40)
    ids, start = world.job_ids(batch_id), threading.Barrier(5)

    def claims(part: Sequence[int]) -> None:
        start.wait()
        for job_id in part:
            world.claim(job_id)

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(claims, ids[number::4]) for number in range(4)]
        start.wait()
        world.db.write(orders.pause_batch, batch_id)
        running_then = world.batch(batch_id).running
        for one in working:
            one.result()
    assert world.batch(batch_id).running == running_then
    world.check()


def test_what_is_claimed_in_the_middle_of_a_pause_is_refused(postgres_world: World) -> None:
    world = postgres_world
    batch_id = world.submit(1)
    job_id = world.only_job(batch_id).id
    with ThreadPoolExecutor(1) as pool:
        with world.db.transaction() as session:
            assert orders.pause_batch(session, batch_id)
            claim = pool.submit(world.claim, job_id)
            with pytest.raises(TimeoutError):
                claim.result(0.5)
        assert claim.result(20) is None
    assert world.job(job_id).state is JobState.QUEUED
    world.check()


# Cancel and deadline.


def test_a_batch_that_is_to_be_cancelled_starts_nothing_more(world: World) -> None:
    batch_id = world.submit(2)
    first, second = world.job_ids(batch_id)
    attempt_id = world.claimed(first)
    world.db.write(orders.request_cancel, batch_id)
    assert world.claim(second) is None
    assert sent(world) == []
    assert world.cancel_batch(batch_id) == (1, 1)
    assert world.cancel_attempt(attempt_id)
    world.check()


def test_a_large_batch_is_cancelled_in_steps_and_the_dispatcher_goes_on_with_it(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orders, "STOPPED_AT_ONCE", 4)
    batch_id = world.submit(10)
    assert world.cancel_batch(batch_id) == (4, 0)
    world.check()
    assert world.batch(batch_id).state is BatchState.CANCELLING
    with world.db.reading() as session:
        assert queries.batches_to_stop(session) == ([batch_id], [])
    assert world.cancel_batch(batch_id) == (4, 0)
    assert world.cancel_batch(batch_id) == (2, 0)
    with world.db.reading() as session:
        assert queries.batches_to_stop(session) == ([], [])
    assert world.batch(batch_id).state is BatchState.CANCELLED
    world.check()


def test_who_cancels_hears_of_all_that_stops_even_if_the_dispatcher_is_faster(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = world.submit(3)
    attempt_id = world.claimed(world.job_ids(batch_id)[0])
    write = world.db.write

    def write_as_a_dispatcher_looks(change: Any, *given: Any) -> Any:
        found = write(change, *given)
        if change is orders.request_cancel:
            assert write(orders.go_on_cancelling, batch_id) == (2, 1)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(world.db, "write", write_as_a_dispatcher_looks)
        assert cancelling.cancel_batch(world.db, batch_id) == (2, 1)
    assert cancelling.cancel_batch(world.db, batch_id) == (0, 0)
    assert world.cancel_attempt(attempt_id)
    assert world.batch(batch_id).state is BatchState.CANCELLED


def pass_deadline(world: World, batch_id: str) -> None:
    with world.db.transaction() as session:
        past = database.now(session) - timedelta(seconds=1)
        session.execute(update(Batch).where(Batch.id == batch_id).values(deadline_at=past))


def test_a_deadline_keeps_what_is_finished_and_gives_the_rest_up_with_a_reason(
    world: World,
) -> None:
    batch_id = world.submit(4, deadline=timedelta(hours=1))
    done, running, late, _ = world.job_ids(batch_id)
    world.succeed(world.claimed(done))
    attempt_id = world.claimed(running)
    with world.db.reading() as session:
        assert queries.batches_to_stop(session) == ([], [])
    assert world.db.write(orders.expire_batch, batch_id) == (0, 0)
    pass_deadline(world, batch_id)
    assert world.claim(late) is None
    with world.db.reading() as session:
        assert queries.batches_to_stop(session) == ([], [batch_id])
    assert world.db.write(orders.expire_batch, batch_id) == (2, 1)
    assert world.heartbeat(attempt_id) is lifecycle.Verdict.CANCELLED
    assert world.cancel_attempt(attempt_id)
    assert world.batch(batch_id).state is BatchState.PARTIALLY_FAILED
    for job in world.jobs(batch_id)[1:]:
        assert (job.state, job.failure_kind) == (JobState.CANCELLED, states.FailureKind.DEADLINE)
        assert job.error is not None
        assert job.error.startswith("not finished by its deadline, 20")
    with world.db.reading() as session:
        assert queries.batches_to_stop(session) == ([], [])
    world.check()


def test_a_large_batch_past_its_deadline_is_ended_in_steps_by_the_dispatcher(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what the first step leaves would wait for ever: none of it may start."""
    monkeypatch.setattr(orders, "STOPPED_AT_ONCE", 4)
    batch_id = world.submit(10)
    pass_deadline(world, batch_id)
    for left in (6, 2, 0):
        with world.db.reading() as session:
            assert queries.batches_to_stop(session) == ([], [batch_id])
        world.db.write(orders.expire_batch, batch_id)
        assert world.batch(batch_id).queued == left
    assert world.batch(batch_id).state is BatchState.FAILED
    world.check()


def test_what_somebody_cancelled_before_has_missed_no_deadline(world: World) -> None:
    batch_id = world.submit(2)
    attempt_id = world.claimed(world.job_ids(batch_id)[0])
    world.db.write(orders.request_cancel, batch_id)
    pass_deadline(world, batch_id)
    with world.db.reading() as session:
        assert queries.batches_to_stop(session) == ([batch_id], [])
    world.cancel_batch(batch_id)
    with world.db.reading() as session:
        assert queries.batches_to_stop(session) == ([], [])
    assert world.cancel_attempt(attempt_id)
    assert world.batch(batch_id).state is BatchState.CANCELLED


def test_a_batch_without_any_video_at_its_deadline_has_failed(world: World) -> None:
    batch_id = world.submit(2)
    pass_deadline(world, batch_id)
    world.db.write(orders.expire_batch, batch_id)
    assert world.batch(batch_id).state is BatchState.FAILED


def test_a_commit_that_wins_the_race_against_the_deadline_stays(world: World) -> None:
    batch_id = world.submit(1)
    attempt_id = world.claimed(world.only_job(batch_id).id)
    pass_deadline(world, batch_id)
    assert world.db.write(orders.expire_batch, batch_id) == (0, 1)
    assert world.succeed(attempt_id)
    assert world.only_job(batch_id).error is None
    assert world.batch(batch_id).state is BatchState.SUCCEEDED


def test_a_retry_after_the_deadline_has_no_deadline(world: World) -> None:
    batch_id = world.submit(1)
    pass_deadline(world, batch_id)
    world.db.write(orders.expire_batch, batch_id)
    assert world.retry(batch_id, JobState.CANCELLED) == 1
    with world.db.reading() as session:
        assert queries.batches_to_stop(session) == ([], [])
    assert world.succeed(world.claimed(world.only_job(batch_id).id))


# Quotas.


def test_an_owner_runs_no_more_than_the_quota(world: World) -> None:
    ann = [world.submit(3, owner="ann"), world.submit(3, owner="ann")]
    bob = world.submit(3, owner="bob")
    chosen = sent(world, room=9, max_running_per_owner=2)
    owners = Counter("bob" if job.batch_id == bob else "ann" for job in chosen)
    assert owners == {"ann": 2, "bob": 2}
    for job in chosen:
        world.claimed(job.id)
    assert sent(world, room=9, max_running_per_owner=2) == []

    def claim(job_id: int) -> lifecycle.Claim | None:
        return world.db.write(
            lifecycle.claim, job_id, worker="w", lease_seconds=60, max_running_per_owner=2
        )

    left = [job.id for batch_id in ann for job in world.jobs(batch_id) if job.attempt_id is None]
    assert claim(left[0]) is None
    assert world.job(left[0]).state is JobState.QUEUED
    running = next(job for job in chosen if job.batch_id != bob)
    with world.db.reading() as session:
        attempt_id = session.scalar(select(Job.attempt_id).where(Job.id == running.id))
    assert attempt_id is not None
    world.succeed(attempt_id)
    assert claim(left[0]) is not None
    world.check()


def test_who_is_at_the_quota_keeps_nobody_from_their_turn(sqlite_world: World) -> None:
    """However many jobs of theirs wait, and however urgent they are."""
    world = sqlite_world
    world.submit(2 * order.LOOK_AHEAD, owner="ann", priority=9)
    ben = world.submit(1, owner="ben")
    (first,) = sent(world, max_running_per_owner=1)
    world.claimed(first.id)
    assert batches_of(sent(world, max_running_per_owner=1)) == [ben]


def test_a_message_that_came_twice_takes_no_second_place_of_the_quota(world: World) -> None:
    """One of a job that has not begun does take one."""
    first, second, *_ = world.job_ids(world.submit(4, owner="ann"))
    world.claimed(first)
    found = []
    with world.db.reading() as session:
        for waiting in ({first}, {first, second}):
            quota = {"waiting": waiting, "max_running_per_owner": 2}
            found.append(selection.choose(session, queues=[QUEUE], room=9, **quota))
    assert [len(chosen) for chosen in found] == [1, 0]


def test_claims_at_once_in_several_batches_keep_the_quota(world: World) -> None:
    ids = [job_id for _ in range(6) for job_id in world.job_ids(world.submit(2, owner="ann"))]
    start = threading.Barrier(6)

    def claims(part: Sequence[int]) -> int:
        start.wait()
        return sum(
            world.db.write(
                lifecycle.claim, job_id, worker="w", lease_seconds=60, max_running_per_owner=3
            )
            is not None
            for job_id in part
        )

    with ThreadPoolExecutor(6) as pool:
        claimed = sum(pool.map(claims, [ids[number::6] for number in range(6)]))
    assert claimed == 3
    world.check()


def test_a_job_starts_while_its_owner_stores_a_large_batch(
    postgres_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both look at the owner's quota, under the same lock."""
    world = postgres_world
    job_id = world.only_job(world.submit(1, owner="ann")).id
    store = bulk.store
    claims: list[lifecycle.Claim | None] = []

    def claim() -> lifecycle.Claim | None:
        quota = {"lease_seconds": 60, "max_running_per_owner": 3}
        return world.db.write(lifecycle.claim, job_id, worker="w", **quota)

    def store_slowly(*given: Any) -> int:
        stored = store(*given)
        claims.append(pool.submit(claim).result(20))
        return stored

    monkeypatch.setattr(bulk, "store", store_slowly)
    with ThreadPoolExecutor(1) as pool:
        world.submit(3, owner="ann", max_queued=10)
    assert [claim is not None for claim in claims] == [True]


def test_a_submit_beyond_the_quota_is_refused_with_the_numbers(world: World) -> None:
    world.submit(3, owner="ann", max_queued=5)
    with pytest.raises(errors.QuotaExceeded, match="ann has 3 jobs queued and this would add 3"):
        world.submit(3, owner="ann", max_queued=5)
    world.submit(3, owner="bob", max_queued=5)
    batch_id = world.submit(2, owner="ann", max_queued=5, idempotency_key="k")
    assert world.submit(2, owner="ann", max_queued=5, idempotency_key="k") == batch_id
    file = prompt_file([{"prompt": "x"}], preset=PRESET, owner="ann", max_queued=5)
    file.stream = None  # type: ignore[assignment]  # it is not even read
    with pytest.raises(errors.QuotaExceeded, match="ann has 5 jobs queued"):
        submission.submit(world.db, file)


def test_a_submit_beyond_the_quota_stores_nothing_before_it_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody else waits for jobs that are undone in the end."""

    def store(*_: object) -> int:
        raise AssertionError("stored")

    monkeypatch.setattr(bulk, "store", store)
    with pytest.raises(errors.QuotaExceeded, match="this would add 3,000"):
        world.submit(3, owner="ann", max_queued=2_999, repeat=1_000)


def test_a_file_is_read_no_further_than_the_quota(world: World) -> None:
    rows = b'{"prompt": "x"}\n' * 2 + b"bad\n"
    file = prompt_file(rows, preset=PRESET, owner="ann", max_queued=5, repeat=3)
    with pytest.raises(errors.QuotaExceeded, match="this would add 6 or more"):
        submission.submit(world.db, file)


def test_what_begins_while_a_file_is_read_makes_room(world: World) -> None:
    world.submit(2, owner="ann")
    file = prompt_file([{"prompt": "x"}] * 3, preset=PRESET, owner="ann", max_queued=4)

    def begun(row: prompt_row.PromptRow) -> prompt_row.PromptRow:
        with world.db.transaction() as session:
            session.execute(update(Batch).values(queued=0))
        return row

    file.fill = begun
    assert submission.submit(world.db, file).jobs == 3


def test_submits_at_once_are_counted_together(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each had room when its file was read."""
    store = bulk.store

    def queued_meanwhile(session: Session, *given: Any) -> int:
        stored = store(session, *given)
        session.execute(update(Batch).values(queued=Batch.queued + 3))
        return stored

    monkeypatch.setattr(bulk, "store", queued_meanwhile)
    with pytest.raises(errors.QuotaExceeded, match="ann has 3 jobs queued and this would add 3"):
        world.submit(3, owner="ann", max_queued=5)
    with world.db.reading() as session:
        assert session.scalars(select(Batch)).all() == []
