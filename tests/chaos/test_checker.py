"""The checker itself: silent about a batch that went well, and loud about each kind of harm."""

import json
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from jobs import database, folder_store, lifecycle, migrate, results, states
from jobs.schema import Attempt, Job
from tests.chaos import checker, farm, record, run, scripts
from tests.chaos.nemesis import Pause, Strike
from tests.chaos.workload import Promise
from tests.integration.jobs.conftest import World

PLAN = farm.Plan()


class Night:
    """A batch of two jobs that went well, one of them at the second attempt."""

    def __init__(self, db: database.Database, folder: Path) -> None:
        self.db = db
        self.store = folder_store.FolderStore(folder)
        self.world = World(db)
        self.batch_id = self.world.submit(2, idempotency_key="night")
        self.first, self.second = self.world.job_ids(self.batch_id)
        self.commit(self.claim(self.first))
        self.failed = self.claim(self.second)
        assert self.world.fail(self.failed) is states.JobState.QUEUED
        self.commit(self.claim(self.second))
        assert results.write(db, self.store, self.batch_id)
        self.promises = {"night": Promise(batch_id=self.batch_id, jobs=2, poison={})}
        self.pauses: list[Pause] = []

    def claim(self, job_id: int) -> int:
        claim = self.db.write(
            lifecycle.claim, job_id, worker="sim0@host0", lease_seconds=PLAN.lease_seconds
        )
        assert claim is not None
        return claim.attempt_id

    def commit(self, attempt_id: int) -> None:
        attempt = self.world.attempt(attempt_id)
        ids = (self.batch_id, attempt.job_id, attempt_id)
        stored = self.store.put_bytes(b"a video", results.video_key(*ids), content_type="video/mp4")
        sidecar = json.dumps({"job_id": attempt.job_id, "attempt_id": attempt_id}).encode()
        self.store.put_bytes(sidecar, results.sidecar_key(*ids), content_type="application/json")
        video = lifecycle.StoredVideo(
            key=stored.key, size_bytes=stored.size_bytes, sha256=stored.sha256
        )
        assert self.db.write(lifecycle.succeed, attempt_id, video=video)

    def change(self, statement: str, row_id: Any) -> None:
        with self.db.transaction() as session:
            session.execute(text(f"{statement} WHERE id = :id"), {"id": row_id})

    @property
    def winner(self) -> Attempt:
        attempt_id = self.world.job(self.first).attempt_id
        assert attempt_id is not None
        return self.world.attempt(attempt_id)

    @property
    def video_key(self) -> str:
        return results.video_key(self.batch_id, self.first, self.winner.id)

    def wrong(self) -> dict[str, list[str]]:
        seen = checker.read(
            self.db, self.store, plan=PLAN, promises=self.promises, pauses=self.pauses
        )
        found = {check.__name__: list(check(seen)) for check in checker.CHECKS}
        return {name: lines for name, lines in found.items() if lines}


@pytest.fixture
def night(sqlite_database_url: str, tmp_path: Path) -> Iterator[Night]:
    db = database.Database(sqlite_database_url)
    migrate.upgrade(db)
    record.install(db)
    yield Night(db, tmp_path / "store")
    db.close()


def test_a_good_night_leaves_nothing_to_say(night: Night) -> None:
    assert night.wrong() == {}
    assert checker.snapshot_is_in_order(night.db) == []


def promise_more(night: Night) -> None:
    night.promises["other"] = Promise(batch_id="gone", jobs=1, poison={})


def lose_a_job(night: Night) -> None:
    night.change("UPDATE jobs SET state = 'failed'", night.first)


def lose_an_object(night: Night) -> None:
    night.store.delete(night.video_key)


def change_an_object(night: Night) -> None:
    night.store.put_bytes(b"another", night.video_key, content_type="video/mp4")


def lose_the_sidecar(night: Night) -> None:
    night.store.delete(results.sidecar_key(night.batch_id, night.first, night.winner.id))


def write_late(night: Night) -> None:
    night.change("UPDATE attempts SET note = 'still here'", night.failed)


def commit_twice(night: Night) -> None:
    """As if there were no fence: one that lost its job takes it back and commits."""
    with night.db.transaction() as session:
        job = session.get_one(Job, night.second)
        job.state, job.attempt_id = states.JobState.RUNNING, night.failed
    night.change("UPDATE attempts SET state = 'running'", night.failed)
    night.commit(night.failed)


def overlap(night: Night) -> None:
    night.change("UPDATE attempts SET finished_at = datetime(finished_at, '+1 day')", night.failed)


def lengthen_a_lease(night: Night) -> None:
    """As a worker would whose own clock is five minutes fast."""
    later = "UPDATE attempts SET lease_until = datetime(lease_until, '+300 seconds')"
    night.change(later, night.winner.id)


def miscount(night: Night) -> None:
    night.change("UPDATE batches SET succeeded = 1, failed = 1", night.batch_id)


def charge_wrongly(night: Night) -> None:
    night.change("UPDATE jobs SET error_count = 0", night.second)


def lose_the_manifest(night: Night) -> None:
    night.store.delete(results.batch_key(night.batch_id, "manifest.json"))


def cut_the_output(night: Night) -> None:
    key = results.batch_key(night.batch_id, "output.jsonl")
    first_line = night.store.read_bytes(key).splitlines(keepends=True)[0]
    night.store.put_bytes(first_line, key, content_type=results.JSONL)


def start_in_a_pause(night: Night) -> None:
    around = timedelta(seconds=1)
    at = night.winner.started_at
    night.pauses.append(Pause(batch_id=night.batch_id, since=at - around, until=at + around))


def start_after_the_deadline(night: Night) -> None:
    past = "UPDATE batches SET deadline_at = '2020-01-01 00:00:00.000000'"
    night.change(past, night.batch_id)


def render_to_the_end_twice(night: Night) -> None:
    for attempt_id in (night.failed, night.world.job(night.second).attempt_id):
        night.change("UPDATE attempts SET seconds = '{}'", attempt_id)


@pytest.mark.parametrize(
    ("harm", "check"),
    [
        (promise_more, checker.promises_are_kept),
        (lose_a_job, checker.nothing_is_lost),
        (lose_a_job, checker.states_follow_the_table),
        (lose_an_object, checker.winners_are_in_the_store),
        (change_an_object, checker.winners_are_in_the_store),
        (lose_the_sidecar, checker.winners_are_in_the_store),
        (write_late, checker.fences_hold),
        (commit_twice, checker.nothing_is_committed_twice),
        (commit_twice, checker.fences_hold),
        (overlap, checker.one_live_attempt_per_job),
        (lengthen_a_lease, checker.leases_know_the_database_clock_only),
        (miscount, checker.counts_add_up),
        (charge_wrongly, checker.budgets_are_charged_rightly),
        (lose_the_manifest, checker.manifests_are_complete),
        (cut_the_output, checker.manifests_are_complete),
        (start_in_a_pause, checker.nothing_starts_while_paused),
        (start_after_the_deadline, checker.deadlines_hold),
        (render_to_the_end_twice, checker.finished_videos_are_not_rendered_again),
    ],
)
def test_each_harm_is_found(
    night: Night, harm: Callable[[Night], None], check: Callable[..., Iterator[str]]
) -> None:
    harm(night)
    assert check.__name__ in night.wrong()


def test_a_look_between_finds_counts_that_are_wrong_for_a_moment(night: Night) -> None:
    miscount(night)
    assert checker.snapshot_is_in_order(night.db) != []


def test_an_execution_more_is_explained_by_a_strike_at_its_worker_alone(night: Night) -> None:
    seen = checker.read(night.db, night.store, plan=PLAN, promises=night.promises)
    now = datetime.now(UTC)
    hour = timedelta(hours=1)

    def strike(*workers: str) -> Strike:
        return Strike(
            what="kill child", target="", at=now - hour, until=now + hour, workers=workers
        )

    assert checker.extra_executions(seen, [strike("sim0@host0")]) == (1, [])
    number, unexplained = checker.extra_executions(seen, [strike("sim1@host0")])
    assert (number, len(unexplained)) == (1, 1)


@pytest.mark.parametrize(
    ("begin", "end", "seconds"), [(0, 5, 5), (0, 20, 10), (12, 15, 0), (15, 40, 20), (30, 40, 10)]
)
def test_time_without_a_database_is_nobodys_delay(begin: int, end: int, seconds: float) -> None:
    now = datetime.now(UTC)

    def at(second: int) -> datetime:
        return now + timedelta(seconds=second)

    strikes = [
        Strike(what="postgresql restarted", target="", at=at(14), until=at(20)),
        Strike(what="postgresql stopped", target="", at=at(10), until=at(18)),
        Strike(what="redis stopped", target="", at=at(0), until=at(40)),
    ]
    assert checker.seconds_with_database(strikes, at(begin), at(end)) == seconds


@pytest.mark.parametrize("how", checker.DATABASE_AWAY)
@pytest.mark.parametrize(("away", "seconds"), [((), 40), ((5, 10), 30), ((5, 90), 40)])
def test_a_crash_is_to_be_noticed_from_when_the_database_is_back(
    night: Night, away: tuple[int, ...], seconds: float, how: str
) -> None:
    night.change("UPDATE attempts SET state = 'lost'", night.failed)
    seen = checker.read(night.db, night.store, plan=PLAN, promises=night.promises)
    (lost,) = (a for each in seen.attempts.values() for a in each if a.id == night.failed)
    lost.started_at, lost.finished_at = (datetime(2026, 1, 1, 0, 0, n, tzinfo=UTC) for n in (0, 40))

    def strike(what: str, at: int, until: int) -> Strike:
        begin, end = (lost.started_at + timedelta(seconds=n) for n in (at, until))
        return Strike(what=what, target="", at=begin, until=end, workers=(lost.worker,))

    strikes = [strike("kill launcher", 0, 0)]
    strikes += [strike(how, *away)] if away else []
    assert [each.seconds for each in checker.detections(seen, strikes)] == [seconds]


def test_a_secret_in_a_log_is_found(tmp_path: Path) -> None:
    log = tmp_path / "host.log"
    log.write_text("connecting to redis://:hush@127.0.0.1")
    assert checker.secrets_in([log], {"redis password": "hush"}) == [
        "host.log shows the redis password"
    ]
    assert checker.secrets_in([log], {"other": "unseen"}) == []


def test_a_part_of_the_long_form_has_more_strikes_per_job_and_as_many_more_renders() -> None:
    def long(scale: float) -> run.Script:
        return scripts.long(scale=scale, seed=1, workers_per_host=2, on_sqlite=False, minutes=1)

    assert long(1.0).strikes_per_job == 1.0
    part = long(0.2)
    assert sum(part.quotas.values()) == 51
    assert part.strikes_per_job == pytest.approx(51 / 37.6)
    figures = {"extra_share": 0.012, "unexplained_executions": 0, "unexplained": []}
    figures |= dict.fromkeys(run.MOST_SECONDS)
    most = run.MOST_EXTRA_SHARE * part.strikes_per_job
    assert list(run._missed(figures, most_extra_share=most)) == []
    assert "1.20%" in next(run._missed(figures, most_extra_share=run.MOST_EXTRA_SHARE))
