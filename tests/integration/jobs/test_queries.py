"""What people and programs are told, on both databases."""

import itertools
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select, text, update

from jobs import (
    database,
    errors,
    failures,
    orders,
    queries,
    retries,
    schema,
    states,
    watch,
    workers,
)
from jobs.cli import display
from jobs.schema import Attempt, Batch, Job
from jobs.states import BatchState
from tests.integration.jobs.conftest import PRESET, QUEUE, World


def named(world: World, batch_id: str) -> str:
    """A batch under an id of our choice."""
    old = world.submit()
    with world.db.transaction() as session:
        if world.db.is_sqlite:
            session.execute(text("PRAGMA defer_foreign_keys=ON"))
        batch = session.get_one(Batch, old)
        values = {c.name: getattr(batch, c.name) for c in Batch.__table__.columns}
        session.add(Batch(**{**values, "id": batch_id}))
        session.flush()
        session.execute(update(Job).where(Job.batch_id == old).values(batch_id=batch_id))
        session.delete(batch)
    return batch_id


def found(world: World, reference: str) -> str:
    with world.db.reading() as session:
        return queries.find_batch(session, reference).id


def test_a_batch_is_found_by_its_id_or_a_beginning_that_is_its_own(world: World) -> None:
    one, other = named(world, "261123-abcdefgh"), named(world, "261123-abxyzabc")
    assert found(world, one) == one
    assert found(world, "261123-abc") == one
    assert found(world, "261123-abx") == other
    assert found(world, "261123-abcdefgh") == one


def test_a_beginning_of_several_batches_lists_them(world: World) -> None:
    one, other = named(world, "261123-abcdefgh"), named(world, "261123-abxyzabc")
    with pytest.raises(errors.NotFound, match=f"too short to tell which: {one}, {other}"):
        found(world, "261123-ab")
    with pytest.raises(errors.NotFound, match="too short"):
        found(world, "2")


def test_an_id_that_begins_another_means_itself(world: World) -> None:
    one = named(world, "261123-abc")
    named(world, "261123-abcdefgh")
    assert found(world, "261123-abc") == one


@pytest.mark.parametrize(
    "reference",
    ["", "%", "_", "261123_abcdefgh", "261123%", "\\", "'", "nul\0", "half \udcff", "é", "x" * 99],
)
def test_nothing_else_is_taken_for_a_batch(world: World, reference: str) -> None:
    """Wildcards of LIKE and what no database stores included."""
    named(world, "261123-abcdefgh")
    with pytest.raises(errors.NotFound, match="no batch"):
        found(world, reference)


def test_latest_is_the_newest_batch(world: World) -> None:
    with pytest.raises(errors.NotFound, match="there is no batch yet"):
        found(world, "latest")
    world.submit()
    newest = world.submit()
    with world.db.transaction() as session:
        session.execute(
            update(Batch)
            .where(Batch.id != newest)
            .values(created_at=database.now(session) - timedelta(hours=1))
        )
    assert found(world, "latest") == newest


def test_batches_come_newest_first_in_pages_without_gaps(world: World) -> None:
    """Also when several were stored in the same millisecond."""
    ids = {world.submit() for _ in range(7)}
    with world.db.transaction() as session:
        session.execute(update(Batch).values(created_at=database.now(session)))
    seen: list[Batch] = []
    while True:
        with world.db.reading() as session:
            page = queries.batches(session, limit=3, before=seen[-1] if seen else None)
        if not page:
            break
        seen += page
    assert len(seen) == 7
    assert {batch.id for batch in seen} == ids


def test_a_job_is_found_by_number_custom_id_or_position(world: World) -> None:
    rows = [{"prompt": "a", "custom_id": "scene/1"}, {"prompt": "b"}, {"prompt": "c"}]
    rows += [{"prompt": "d", "custom_id": "2"}, {"prompt": "e", "custom_id": "9.41\u202fPM"}]
    batch_id = world.submit(rows)
    first, second, third, fourth, fifth = world.jobs(batch_id)

    def job(reference: str) -> int:
        with world.db.reading() as session:
            return queries.find_job(session, reference).id

    assert job(str(first.id)) == first.id
    assert job(f"{batch_id}/scene/1") == first.id
    assert job("latest/1") == second.id
    assert job(f"{batch_id[:10]}/0") == first.id
    # A custom_id that is a number wins over the position of the same number.
    assert job(f"{batch_id}/2") == fourth.id
    assert third.position == 2
    assert job(f"{batch_id}/9.41\u202fPM") == fifth.id
    for nothing in ("x", "", "0", "9" * 30, f"{batch_id}/", f"{batch_id}/9", "latest/nul\0"):
        with pytest.raises(errors.NotFound):
            job(nothing)
    for nothing in (f"{batch_id}/half \udcff", f"{batch_id}/" + "1" * 40, "nowhere/1"):
        with pytest.raises(errors.NotFound):
            job(nothing)


def _batch(**values: Any) -> Batch:
    counts = dict.fromkeys(("queued", "running", "succeeded", "failed", "cancelled"), 0) | values
    asked = counts.pop("asked", None)
    return Batch(**counts, total=sum(counts.values()), cancel_requested_at=asked)


@pytest.mark.parametrize(
    ("counts", "state"),
    [
        ({"queued": 2}, BatchState.QUEUED),
        ({"queued": 1, "running": 1}, BatchState.RUNNING),
        ({"queued": 1, "succeeded": 1}, BatchState.RUNNING),
        ({"queued": 1, "failed": 1}, BatchState.RUNNING),
        ({"running": 1, "asked": 1}, BatchState.CANCELLING),
        ({"succeeded": 2}, BatchState.SUCCEEDED),
        ({"succeeded": 1, "failed": 1}, BatchState.PARTIALLY_FAILED),
        ({"succeeded": 1, "failed": 1, "cancelled": 1}, BatchState.PARTIALLY_FAILED),
        ({"succeeded": 1, "cancelled": 1}, BatchState.CANCELLED),
        ({"cancelled": 2}, BatchState.CANCELLED),
        ({"failed": 2}, BatchState.FAILED),
        ({"failed": 1, "cancelled": 1}, BatchState.FAILED),
        ({"succeeded": 2, "asked": 1}, BatchState.SUCCEEDED),
    ],
)
def test_the_counts_of_a_batch_have_one_word(counts: dict[str, int], state: BatchState) -> None:
    assert _batch(**counts).state is state


def test_the_database_has_the_same_word(world: World) -> None:
    """For every mixture of counts, and of what was asked for."""
    counts = ("queued", "running", "succeeded", "failed", "cancelled")
    moments = ("cancel_requested_at", "expired_at", "paused_at")
    with world.db.transaction() as session:
        now = database.now(session)
        mixtures = itertools.product((0, 1), repeat=len(counts) + len(moments))
        for number, mixture in enumerate(m for m in mixtures if any(m[: len(counts)])):
            given = dict(zip(counts, mixture, strict=False))
            when = {
                name: now if yes else None for name, yes in zip(moments, mixture[5:], strict=True)
            }
            session.add(
                Batch(
                    id=f"b{number}",
                    preset="tiny",
                    priority=0,
                    fingerprint="f",
                    created_at=now,
                    total=sum(given.values()),
                    **given,
                    **when,
                )
            )
    with world.db.reading() as session:
        for state in BatchState:
            chosen = queries.batches(session, limit=1_000, states_wanted=[state])
            assert {batch.state for batch in chosen} == {state}
        every = queries.batches(session, limit=1_000, states_wanted=list(BatchState))
        assert len(every) == 8 * (2**5 - 1)


def test_jobs_of_a_custom_id_are_found_in_all_recent_batches_but_forgotten_ones(
    world: World,
) -> None:
    rows = [{"prompt": "a", "custom_id": "cat"}, {"prompt": "b", "custom_id": "dog"}]
    one, other, forgotten = (world.submit(rows) for _ in range(3))
    with world.db.transaction() as session:
        batch = session.get_one(Batch, forgotten)
        batch.forgotten_at = database.now(session)
    with world.db.reading() as session:
        found = queries.jobs_called(session, "cat", limit=5)
        assert [job.batch_id for job in found] == [other, one]
        assert queries.jobs_called(session, "cow\0", limit=5) == []
        (dog,) = queries.jobs(session, one, custom_id="dog")
        assert dog.position == 1
        assert queries.jobs(session, one, custom_id="cow\0") == []


RENDER_SECONDS = 15


def _finish(world: World, batch_id: str, seconds_ago: list[float]) -> None:
    for job_id, ago in zip(world.job_ids(batch_id), seconds_ago, strict=False):
        world.succeed(world.claimed(job_id))
        with world.db.transaction() as session:
            moment = database.now(session) - timedelta(seconds=ago)
            began = moment - timedelta(seconds=RENDER_SECONDS)
            session.execute(
                update(Job).where(Job.id == job_id).values(started_at=began, finished_at=moment)
            )


def test_rate_and_time_left_follow_the_latest_results(world: World) -> None:
    batch_id = world.submit(8)
    with world.db.reading() as session:
        assert queries.progress(session, batch_id).rate_per_minute is None
    _finish(world, batch_id, [60, 40, 20, 0])
    with world.db.reading() as session:
        progress = queries.progress(session, batch_id)
    assert progress.rate_per_minute == pytest.approx(3.0, rel=0.1)
    assert progress.seconds_left == pytest.approx(80.0, rel=0.1)
    assert progress.state is BatchState.RUNNING


def test_first_results_of_workers_that_began_together_promise_no_more_than_these_can(
    world: World,
) -> None:
    batch_id = world.submit(8)
    _finish(world, batch_id, [0.007, 0])
    with world.db.reading() as session:
        rate = queries.progress(session, batch_id).rate_per_minute
    assert rate == pytest.approx(2 / RENDER_SECONDS * 60, rel=0.05)


def _farm(
    world: World, *, workers: int, began_over: float, into_seconds: float, failing: float = 0
) -> str:
    """A batch as these workers leave it in their third round, each job of a minute."""
    batch_id = world.submit(workers * 4)
    ids = iter(world.job_ids(batch_id))
    with world.db.transaction() as session:
        now = database.now(session)
        rows = []
        for number in range(workers):
            ago = 120 + into_seconds - began_over * number / workers
            while ago > 0:
                began, ended = now - timedelta(seconds=ago), now - timedelta(seconds=ago - 60)
                state = states.JobState.SUCCEEDED if ended <= now else states.JobState.RUNNING
                if ended <= now and int(len(rows) * failing) != int((len(rows) + 1) * failing):
                    state = states.JobState.FAILED
                rows.append({"id": next(ids), "state": state, "started_at": began})
                rows[-1]["finished_at"] = ended if ended <= now else None
                ago -= 60
        session.execute(update(Job), rows)
        found = Counter(row["state"].value for row in rows)
        counts = {**found, "queued": workers * 4 - len(rows)}
        session.execute(update(Batch).where(Batch.id == batch_id).values(counts))
    return batch_id


@pytest.mark.parametrize("workers", [64, 150])
@pytest.mark.parametrize(
    ("began_over", "into_seconds"),
    [(60, 30), (0.1, 1), (0.1, 55)],
    ids=["one after the other", "in step, just begun", "in step, nearly done"],
)
def test_the_rate_is_that_of_all_workers_however_many(
    world: World, workers: int, began_over: float, into_seconds: float
) -> None:
    batch_id = _farm(world, workers=workers, began_over=began_over, into_seconds=into_seconds)
    with world.db.reading() as session:
        rate = queries.progress(session, batch_id).rate_per_minute
    assert rate == pytest.approx(workers, rel=0.1)


def test_the_rate_is_that_of_all_workers_when_few_of_them_run_now(world: World) -> None:
    """Between two rounds of a farm in step, and when the batch is over."""
    batch_id = _farm(world, workers=64, began_over=1, into_seconds=0.5)
    with world.db.transaction() as session:
        session.execute(update(Batch).values(running=0, finished_at=database.now(session)))
    with world.db.reading() as session:
        rate = queries.progress(session, batch_id).rate_per_minute
    assert rate == pytest.approx(64, rel=0.1)


@pytest.mark.parametrize("failing", [0.2, 0.5, 0.8])
def test_failed_jobs_are_no_pace_but_nobody_waits_for_them_either(
    world: World, failing: float
) -> None:
    batch_id = _farm(world, workers=40, began_over=60, into_seconds=55, failing=failing)
    with world.db.reading() as session:
        progress = queries.progress(session, batch_id)
    assert progress.rate_per_minute == pytest.approx(40 * (1 - failing), rel=0.2)
    open_jobs = progress.batch.queued + progress.batch.running
    assert progress.seconds_left == pytest.approx(open_jobs / 40 * 60, rel=0.1)


def test_failures_before_the_latest_results_promise_nothing(world: World) -> None:
    batch_id = world.submit(12)
    for job_id in world.job_ids(batch_id)[8:]:
        world.fail(world.claimed(job_id), states.FailureKind.INPUT)
    with world.db.transaction() as session:
        moment = database.now(session) - timedelta(seconds=90)
        session.execute(
            update(Job)
            .where(Job.state == states.JobState.FAILED)
            .values(started_at=moment, finished_at=moment)
        )
    _finish(world, batch_id, [60, 40, 20, 0])
    with world.db.reading() as session:
        assert queries.progress(session, batch_id).seconds_left == pytest.approx(80.0, rel=0.1)


def test_an_hour_of_failures_is_no_hour_in_which_the_farm_was_stopped(world: World) -> None:
    batch_id = world.submit(20)
    for job_id in world.job_ids(batch_id)[14:]:
        world.fail(world.claimed(job_id), states.FailureKind.INPUT)
    with world.db.transaction() as session:
        now = database.now(session)
        failed = session.scalars(select(Job).where(Job.state == states.JobState.FAILED))
        for number, job in enumerate(failed):
            job.started_at = now - timedelta(seconds=3600 - number * 600)
            job.finished_at = job.started_at + timedelta(seconds=600)
    _finish(world, batch_id, [3620, 3600, 0])
    with world.db.reading() as session:
        progress = queries.progress(session, batch_id)
    assert progress.rate_per_minute == pytest.approx(2 / 3620 * 60, rel=0.05)
    # Eleven jobs, of which eight ended within that time.
    assert progress.seconds_left == pytest.approx(11 / 8 * 3620, rel=0.05)


@pytest.mark.parametrize("most", [8, 20])
def test_of_very_many_failures_and_results_the_latest_tell(
    world: World, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(queries, "MOST_RESULTS", most)
    batch_id = _farm(world, workers=12, began_over=60, into_seconds=55, failing=0.5)
    with world.db.reading() as session:
        progress = queries.progress(session, batch_id)
    open_jobs = progress.batch.queued + progress.batch.running
    assert progress.seconds_left == pytest.approx(open_jobs / 12 * 60, rel=0.25)


def _pace_of(*free_in: float) -> queries._Pace:
    """Eight workers whose jobs take ten minutes."""
    speed = len(free_in) / 600
    return queries._Pace(
        videos_per_second=speed,
        jobs_per_second=speed,
        job_seconds=600,
        free_in=list(free_in),
    )


def test_time_left_goes_down_through_the_last_rounds() -> None:
    """Also of workers that begin and end together, and those that are one after another."""
    for elapsed in range(0, 601, 100):
        together = _pace_of(*[600.0 - elapsed] * 8)
        assert together.seconds_for(8) == pytest.approx(1200 - elapsed)
        assert together.seconds_for(0) == pytest.approx(600 - elapsed)
    apart = _pace_of(*[75.0 * number for number in range(1, 9)])
    told = [apart.seconds_for(queued) for queued in (16, 9, 8, 1, 0)]
    assert told == pytest.approx([1800, 1275, 1200, 675, 600])


def test_time_left_is_no_less_than_the_last_job_needs(world: World) -> None:
    batch_id = _farm(world, workers=60, began_over=1, into_seconds=10)
    with world.db.transaction() as session:
        running = session.scalars(select(Job).where(Job.state == states.JobState.RUNNING)).all()
        session.execute(
            update(Job)
            .where(Job.id.in_([job.id for job in running[3:]]))
            .values(state=states.JobState.CANCELLED)
        )
        session.execute(update(Batch).values(running=3, queued=0))
    with world.db.reading() as session:
        assert queries.progress(session, batch_id).seconds_left == pytest.approx(50, abs=5)
    with world.db.transaction() as session:
        session.execute(update(Batch).values(queued=1))
    with world.db.reading() as session:
        assert queries.progress(session, batch_id).seconds_left == pytest.approx(60, abs=5)


def test_a_batch_whose_jobs_take_longer_slows_down(world: World) -> None:
    batch_id = world.submit(4)
    _finish(world, batch_id, [660, 600])
    world.claimed(world.job_ids(batch_id)[2])
    with world.db.transaction() as session:
        began = database.now(session) - timedelta(seconds=599)
        running = update(Job).where(Job.state == states.JobState.RUNNING)
        session.execute(running.values(started_at=began))
    with world.db.reading() as session:
        rate = queries.progress(session, batch_id).rate_per_minute
    assert rate == pytest.approx(1 / 11, rel=0.1)


def test_hours_in_which_the_farm_was_stopped_do_not_slow_a_batch_down(world: World) -> None:
    """Neither between its results, nor since the last of them."""
    hour = 3600.0
    batch_id = world.submit(8)
    ago = [9 * hour + 20, 9 * hour, hour + 20, hour]
    _finish(world, batch_id, ago)
    with world.db.reading() as session:
        progress = queries.progress(session, batch_id)
    # Three jobs in 20 s, the 15 s of work before the third, and 20 s.
    assert progress.rate_per_minute == pytest.approx(3 / 55 * 60, rel=0.05)


def test_short_pauses_of_a_batch_that_shares_the_farm_count(world: World) -> None:
    batch_id = world.submit(8)
    _finish(world, batch_id, [600, 400, 200, 0])
    with world.db.reading() as session:
        progress = queries.progress(session, batch_id)
    assert progress.rate_per_minute == pytest.approx(0.3, rel=0.05)


def test_a_finished_batch_has_a_rate_and_nothing_left(world: World) -> None:
    batch_id = world.submit(2)
    _finish(world, batch_id, [120, 90])
    with world.db.reading() as session:
        progress = queries.progress(session, batch_id)
    assert progress.rate_per_minute == pytest.approx(2.0, rel=0.1)
    assert progress.seconds_left is None


def test_there_is_no_time_left_while_a_batch_is_at_rest(world: World) -> None:
    batch_id = world.submit(8)
    _finish(world, batch_id, [800, 700, 600, 400])
    with world.db.reading() as session:
        assert queries.progress(session, batch_id).seconds_left is None
    world.claimed(world.job_ids(batch_id)[4])
    with world.db.reading() as session:
        assert queries.progress(session, batch_id).seconds_left is not None


def test_there_is_no_time_left_while_nobody_takes_what_waits(world: World) -> None:
    batch_id = world.submit(8)
    _finish(world, batch_id, [60, 40, 20, 0])
    assert watch.look(world.db, batch_id).progress.seconds_left is None
    world.register()
    assert watch.look(world.db, batch_id).progress.seconds_left is not None


def test_what_could_start_is_neither_paused_nor_without_workers(world: World) -> None:
    def could_start() -> bool:
        with world.db.reading() as session:
            return queries.could_start(session)

    batch_id = world.submit()
    job_id = world.job_ids(batch_id)[0]
    assert not could_start()
    world.register()
    assert could_start()
    for pause, resume, what in (
        (orders.pause_job, orders.resume_job, job_id),
        (orders.pause_batch, orders.resume_batch, batch_id),
    ):
        world.db.write(pause, what)
        assert not could_start()
        world.db.write(resume, what)
        assert could_start()
    world.claimed(job_id)
    assert not could_start()


def test_results_at_one_moment_make_no_rate(world: World) -> None:
    batch_id = world.submit(2)
    _finish(world, batch_id, [0, 0])
    with world.db.transaction() as session:
        session.execute(update(Job).values(finished_at=database.now(session)))
    with world.db.reading() as session:
        assert queries.progress(session, batch_id).rate_per_minute is None


def test_a_worker_lives_while_its_launcher_reports(world: World) -> None:
    for name in ("gpu0@a", "gpu1@a", "gpu0@b"):
        world.register(name)
    world.silence("gpu1@a")
    world.db.write(workers.stopped, ["gpu0@b"], launcher="test")
    attempt_id = world.claimed(world.only_job(world.submit()).id, worker="gpu0@a")
    with world.db.reading() as session:
        live = queries.live_workers(session)
        by_queue = queries.live_workers_by_queue(session)
    assert [(one.worker.name, one.is_alive) for one in live] == [
        ("gpu0@a", True),
        ("gpu1@a", False),
    ]
    assert live[0].attempt is not None
    assert live[0].attempt.id == attempt_id
    assert by_queue == {QUEUE: 1}


def test_a_worker_that_comes_back_keeps_its_row(world: World) -> None:
    world.register("gpu0@a")
    with world.db.reading() as session:
        first = queries.live_workers(session)[0].worker.started_at
    world.register("gpu0@a")
    with world.db.reading() as session:
        assert queries.live_workers(session)[0].worker.started_at == first
    world.db.write(workers.stopped, ["gpu0@a"], launcher="test")
    with world.db.reading() as session:
        assert queries.live_workers(session) == []
    world.register("gpu0@a")
    with world.db.reading() as session:
        (back,) = queries.live_workers(session)
    assert back.worker.started_at >= first
    assert back.worker.stopped_at is None


def test_queues_that_nobody_takes_from_are_told(world: World) -> None:
    batch_id = world.submit()
    with world.db.reading() as session:
        assert queries.queues_without_workers(session, batch_id) == [QUEUE]
    world.register()
    with world.db.reading() as session:
        assert queries.queues_without_workers(session, batch_id) == []


def test_the_queues_of_a_batch_are_those_of_its_queued_jobs(world: World) -> None:
    batch_id = world.submit(6)
    world.submit(2)
    with world.db.transaction() as session:
        for job in session.scalars(select(Job).where(Job.batch_id == batch_id)):
            job.queue = f"q{job.position % 3}"
    with world.db.reading() as session:
        assert queries.queues_waited_in(session, batch_id) == ["q0", "q1", "q2"]
    for job in world.jobs(batch_id)[1::3]:
        world.claimed(job.id)
    with world.db.reading() as session:
        assert queries.queues_waited_in(session, batch_id) == ["q0", "q2"]


def test_jobs_and_attempts_are_listed_in_their_order(world: World) -> None:
    batch_id = world.submit(5)
    ids = world.job_ids(batch_id)
    world.release(world.claimed(ids[2]))
    last = world.claimed(ids[2])
    with world.db.reading() as session:
        page = queries.jobs(session, batch_id, after=1, limit=2)
        assert [job.position for job in page] == [2, 3]
        running = queries.jobs(session, batch_id, states_wanted=[states.JobState.RUNNING])
        assert [job.id for job in running] == [ids[2]]
        assert [a.number for a in queries.attempts(session, ids[2])] == [1, 2]
        assert [(j.id, a.id) for j, a in queries.running(session, batch_id)] == [(ids[2], last)]
        assert queries.winning_attempt(session, running[0]) is None
        assert queries.look(session, running[0])["fps"] == PRESET.look.fps
    world.succeed(last)
    with world.db.reading() as session:
        winner = queries.winning_attempt(session, world.job(ids[2]))
    assert winner is not None
    assert winner.id == last


def test_attempts_of_a_batch_are_found_by_times_and_by_counts_of_before(world: World) -> None:
    batch_id = world.submit(3)
    ids = world.job_ids(batch_id)
    released = world.claimed(ids[2])
    world.release(released)
    first, second = world.claimed(ids[0]), world.claimed(ids[1])
    wrong = [states.AttemptState.FAILED]
    world.fail(second)
    with world.db.reading() as session:
        batch = queries.find_batch(session, batch_id)

        def told(**which: Any) -> list[int]:
            return [attempt.id for _, attempt in queries.attempts_of_batch(session, batch, **which)]

        assert told() == [released, first, second]
        assert told(after=first) == told(that_are=wrong) == [second]
    with world.db.transaction() as session:
        session.execute(update(Attempt).where(Attempt.id == released).values(id=7))
    with world.db.reading() as session:
        assert told() == [7, first, second]
        assert told(after=7) == [first, second]


def test_sqlite_finds_live_attempts_by_their_index(sqlite_world: World) -> None:
    """Else each look of a dispatcher reads all attempts that there ever were."""
    asked = select(Attempt.id).where(schema.IS_LIVE)
    with sqlite_world.db.reading() as session:
        plan = session.execute(text(f"EXPLAIN QUERY PLAN {asked.compile(session.get_bind())}"))
        assert ["ix_attempts_live" in row.detail for row in plan] == [True]


def refuse(world: World, name: str, queue: str, reason: str = "the models folder is gone") -> float:
    kind = states.FailureKind.WEIGHTS
    return world.db.write(workers.refuse, name, queue=queue, kind=kind, reason=reason)


def takes(world: World) -> dict[str, tuple[str, ...]]:
    with world.db.reading() as session:
        return {live.worker.name: live.takes for live in queries.live_workers(session)}


def test_what_a_worker_refuses_it_does_not_take_until_a_job_goes_well(world: World) -> None:
    world.register("gpu0@a", also=["other"])
    world.register("gpu0@b", also=["other"])
    refuse(world, "gpu0@a", QUEUE)
    assert takes(world) == {"gpu0@a": ("other",), "gpu0@b": (QUEUE, "other")}
    refuse(world, "gpu0@a", workers.ALL_QUEUES)
    assert takes(world) == {"gpu0@a": (), "gpu0@b": (QUEUE, "other")}
    world.db.write(workers.accept, "gpu0@a", queue=QUEUE)
    assert takes(world)["gpu0@a"] == (QUEUE, "other")


def test_a_refusal_ends_by_itself_and_is_longer_the_next_time(world: World) -> None:
    world.register("gpu0@a")
    longest = workers.FIRST_REFUSAL_SECONDS
    for times in range(1, 8):
        seconds = refuse(world, "gpu0@a", QUEUE)
        assert longest / 2 <= seconds <= longest
        with world.db.transaction() as session:
            (held,) = workers.refusals(session)
            assert held.times == times
            held.until = database.now(session)
        assert takes(world) == {"gpu0@a": (QUEUE,)}
        longest = min(2 * longest, retries.LONGEST_WAIT_SECONDS)


def test_a_worker_claims_nothing_that_it_refuses_and_others_do(world: World) -> None:
    job = world.only_job(world.submit())
    refuse(world, "gpu0@a", QUEUE)
    assert world.claim(job.id, worker="gpu0@a") is None
    assert world.job(job.id).state is states.JobState.QUEUED
    assert world.claim(job.id, worker="gpu0@b") is not None


def test_why_jobs_wait_is_told_when_every_worker_refuses_them(world: World) -> None:
    batch_id = world.submit()
    world.register("gpu0@a")
    refuse(world, "gpu0@a", QUEUE, reason="bad\0 folder")
    refuse(world, "gpu9@gone", QUEUE)
    snapshot = watch.look(world.db, batch_id)
    assert snapshot.idle_queues == [QUEUE]
    assert [held.worker for held in snapshot.refusals] == ["gpu0@a"]
    hint = display.hint_of_idle(snapshot.idle_queues, snapshot.refusals)
    assert "gpu0@a until" in hint
    assert "bad\\0 folder" in hint
    world.register("gpu0@b")
    assert watch.look(world.db, batch_id).refusals == ()


def test_jobs_of_several_states_come_page_by_page_in_the_order_of_the_file(world: World) -> None:
    batch_id = world.submit(9)
    ids = world.job_ids(batch_id)
    for number in (0, 4, 8):
        world.fail(world.claimed(ids[number]), states.FailureKind.INPUT)
    for number in (1, 5):
        world.cancel_job(ids[number])
    world.claimed(ids[2])
    seen: list[int] = []
    wanted = (states.JobState.FAILED, states.JobState.CANCELLED, states.JobState.FAILED)
    with world.db.reading() as session:
        while page := queries.jobs(
            session,
            batch_id,
            states_wanted=wanted,
            after=seen[-1] if seen else -1,
            limit=2,
        ):
            seen += [job.position for job in page]
        mixed = queries.jobs(session, batch_id, states_wanted=tuple(states.JobState))
    assert seen == [0, 1, 4, 5, 8]
    assert [job.position for job in mixed] == list(range(9))


def bad_night(world: World) -> str:
    """Jobs 0 to 4 fail by their device, mostly on one worker; 5 is refused, 6 kills its workers."""
    batch_id = world.submit(9)
    ids = world.job_ids(batch_id)
    once = retries.Budgets(max_errors=1, max_crashes=1, retry_seconds=0.0)
    for number in range(5):
        worker = "gpu1@b" if number == 2 else "gpu0@a"
        attempt_id = world.claimed(ids[number], worker=worker)
        world.fail(attempt_id, states.FailureKind.DEVICE, budgets=once, error=f"Xid {number}")
    world.fail(world.claimed(ids[5], worker="gpu1@b"), states.FailureKind.REFUSED, error="no")
    world.fail(world.claimed(ids[6]), states.FailureKind.WORKER_LOST, budgets=once, error="silent")
    world.fail(world.claimed(ids[7]), states.FailureKind.ENCODING)  # it is tried again
    return batch_id


def groups(world: World, batch_id: str) -> list[failures.Group]:
    with world.db.snapshot() as session:
        return failures.groups(session, queries.find_batch(session, batch_id))


def test_what_failed_is_grouped_by_kind_with_the_workers_that_made_most_of_it(world: World) -> None:
    assert groups(world, world.submit(1)) == []
    batch_id = bad_night(world)
    bad_night(world)  # of another batch
    device, refused, lost = groups(world, batch_id)
    assert (device.kind, device.quarantined, device.jobs) == ("device", False, 5)
    assert device.mostly_on == [("gpu0@a", 4), ("gpu1@b", 1)]
    assert (device.example.position, device.example.error) == (0, "Xid 0")
    assert (refused.kind, refused.jobs, refused.mostly_on) == ("refused", 1, ())
    assert (lost.kind, lost.quarantined, lost.jobs) == ("worker_lost", True, 1)
    assert [group.may_go_well for group in (device, refused, lost)] == [True, False, False]


def test_of_failures_all_over_the_farm_no_worker_is_named(world: World) -> None:
    batch_id = world.submit(8)
    once = retries.Budgets(max_errors=1, max_crashes=1, retry_seconds=0.0)
    for number, job_id in enumerate(world.job_ids(batch_id)):
        attempt_id = world.claimed(job_id, worker=f"gpu{number}@a")
        world.fail(attempt_id, states.FailureKind.ENCODING, budgets=once)
    (group,) = groups(world, batch_id)
    assert (len(group.workers), group.mostly_on) == (8, ())


def test_jobs_are_listed_by_how_they_failed_and_with_their_workers(world: World) -> None:
    batch_id = bad_night(world)
    failed = [states.JobState.FAILED]

    def places(**which: Any) -> list[int]:
        with world.db.reading() as session:
            found = queries.jobs(session, batch_id, which=failures.Which(**which))
            among = queries.jobs(
                session, batch_id, states_wanted=failed, which=failures.Which(**which)
            )
        assert {job.position for job in among} == {job.position for job in found} & set(range(7))
        return [job.position for job in found]

    kind = states.FailureKind
    assert places() == list(range(9))
    assert places(kinds=[kind.DEVICE, kind.REFUSED]) == [0, 1, 2, 3, 4, 5]
    assert places(kinds=[kind.ENCODING]) == [7]
    assert places(quarantined=True) == [6]
    assert places(kinds=[kind.WORKER_LOST], quarantined=False) == []
    with world.db.reading() as session:
        every = queries.jobs(session, batch_id)
        workers_by_job = queries.workers_of(session, every)
    assert [workers_by_job.get(job.id) for job in every] == [
        "gpu0@a",
        "gpu0@a",
        "gpu1@b",
        "gpu0@a",
        "gpu0@a",
        "gpu1@b",
        "gpu0@here",
        None,
        None,
    ]
