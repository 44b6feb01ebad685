"""What lies on a host's disk is published, waited for or removed; nothing stops the look."""

import contextlib
import shutil
import sqlite3
from datetime import timedelta

import pytest
from sqlalchemy import update

from jobs import broker, lifecycle, orders, retries, settings, states
from jobs.schema import Attempt
from worker import finished, scratch, tasks


@pytest.fixture
def look(host):
    def run():
        return finished.find_unfinished(host.db, host.bell, host.config)

    return run


def lose_all(host):
    host.db.write(
        lifecycle.end_lost_attempts, budgets=retries.budgets(host.config), worker="cpu0@here"
    )


def test_a_finished_video_is_announced_again(host, look):
    folder = host.finished()
    assert look() == [folder.attempt_id]
    assert host.waiting_publishes() == [folder.attempt_id]
    assert host.attempt(folder).state is states.AttemptState.RENDERED


def test_it_is_announced_once_while_its_message_waits(host, look):
    """An outage of hours must not fill Redis."""
    folder = host.finished()
    for _ in range(5):
        assert look() == [folder.attempt_id]
    assert host.waiting_publishes() == [folder.attempt_id]


def test_thousands_that_wait_for_a_store_are_a_few_messages(host, look, monkeypatch):
    """Those beyond what is read back would be sent again at each look, and fill Redis."""
    assert 2 * finished.MOST_ON_THE_WAY < broker.MOST_READ
    monkeypatch.setattr(finished, "MOST_ON_THE_WAY", 2)
    folders = [host.finished() for _ in range(4)]
    ids = [folder.attempt_id for folder in folders]
    for _ in range(3):
        assert look() == ids
        assert sorted(host.waiting_publishes()) == ids[:2]
    host.bell.redis.delete(broker.publish_queue(host.config.host_name))
    for folder in folders[:2]:
        folder.remove()
    look()
    assert sorted(host.waiting_publishes()) == ids[2:]


def test_its_lease_is_renewed_when_half_of_it_is_over(host, look):
    """Not at every look: after hours without a store thousands wait, and workers must beat."""
    folder = host.finished()
    look()
    first = host.attempt(folder).lease_until
    assert look() == [folder.attempt_id]
    assert host.attempt(folder).lease_until == first
    with host.db.transaction() as session:
        half = timedelta(seconds=host.config.publish_lease_seconds / 2)
        session.execute(update(Attempt).values(lease_until=first - half))
    assert look() == [folder.attempt_id]
    assert host.attempt(folder).lease_until > first


def test_one_that_waits_says_so_from_the_first_look_on(host, look):
    """Also while the lease that its worker left it with is still long."""
    folder = host.finished()
    finished.renew(host.db, host.config, folder, note=None)
    look()
    assert host.attempt(folder).note == "waits for its upload"


def test_a_cancel_of_one_that_waits_is_heard_at_the_next_look(host, look):
    folder = host.finished()
    look()
    host.db.write(orders.cancel_job, host.job_of(folder).id)
    assert look() == []
    assert not folder.path.exists()
    assert host.job_of(folder).state is states.JobState.CANCELLED


def test_one_that_is_being_published_is_left_to_its_publisher(host, look):
    folder = host.finished()
    with folder.locked() as is_ours:
        assert is_ours
        assert look() == []
    assert look() == [folder.attempt_id]


def test_one_that_nobody_waits_for_is_removed(host, look):
    lost, cancelled = host.finished(), host.finished()
    host.db.write(orders.cancel_job, host.job_of(cancelled).id)
    lost_job = host.job_of(lost)
    host.db.write(
        lifecycle.fail,
        lost.attempt_id,
        kind=states.FailureKind.WORKER_LOST,
        error="silent",
        budgets=retries.budgets(host.config),
    )
    assert look() == []
    assert not lost.path.exists()
    assert not cancelled.path.exists()
    assert host.job(lost_job.id).state is states.JobState.QUEUED
    assert host.job_of(cancelled).state is states.JobState.CANCELLED


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[]", b"{}"])
def test_a_damaged_sidecar_stops_nobody_else(host, look, content):
    damaged, good = host.finished(), host.finished()
    damaged.sidecar.write_bytes(content)
    assert look() == [good.attempt_id]
    assert host.attempt(damaged).failure_kind is states.FailureKind.DISK
    assert host.job_of(damaged).state is states.JobState.QUEUED
    assert not damaged.path.exists()


def test_an_unfinished_folder_of_a_live_attempt_is_left_alone(host, look):
    folder = host.folder(host.claim(host.submit()[0]))
    folder.make()
    folder.video.write_bytes(b"half")
    assert look() == []
    assert folder.video.exists()


def test_an_unfinished_folder_of_an_attempt_that_is_over_is_garbage(host, look):
    folder = host.folder(host.claim(host.submit()[0]))
    folder.make()
    folder.video.write_bytes(b"half")
    (folder.path / "sidecar.json.part").write_bytes(b"{")
    lose_all(host)
    assert look() == []
    assert not folder.path.exists()


def test_a_folder_of_another_farm_is_left_alone(host, look):
    folder = host.finished()
    lose_all(host)
    unfinished = folder.path.with_name(f"250101-zzzzzzzz.{folder.attempt_id}")
    with_sidecar = folder.path.with_name(f"250101-zzzzzzzz.{folder.attempt_id + 1}")
    for foreign in (unfinished, with_sidecar):
        shutil.copytree(folder.path, foreign)
    (unfinished / "sidecar.json").unlink()
    assert look() == []
    assert unfinished.exists()
    assert with_sidecar.exists()
    assert not folder.path.exists()


def test_a_video_from_before_a_database_was_restored_is_no_other_jobs(host, look):
    """The rows are those of the backup, and another job is claimed first."""
    jobs = host.submit(2)
    file = host.config.home / "rushes.db"
    backup = file.with_suffix(".backup")
    with contextlib.closing(sqlite3.connect(file)) as source:
        source.execute("VACUUM INTO ?", [str(backup)])
    lost = host.finished(jobs[0])
    assert look() == [lost.attempt_id]
    host.db.close()
    for end in ("-wal", "-shm"):
        file.with_name(f"{file.name}{end}").unlink(missing_ok=True)
    backup.replace(file)
    claim = host.claim(jobs[1])
    assert look() == []
    assert host.attempts(jobs[1].id)[0].state is states.AttemptState.RUNNING
    host.publisher().publish(claim.attempt_id)
    assert host.job(jobs[1].id).state is states.JobState.RUNNING


def test_a_redis_that_is_down_is_told_after_the_leases_are_renewed(host, monkeypatch):
    folder = host.finished()
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    with pytest.raises(broker.BrokerUnavailable):
        finished.find_unfinished(host.db, broker.Broker(settings.load()), host.config)
    assert host.attempt(folder).state is states.AttemptState.RENDERED


def test_an_empty_disk_asks_nobody(host, monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    assert finished.find_unfinished(host.db, broker.Broker(settings.load()), host.config) == []


def test_a_finished_video_of_which_its_dead_worker_could_tell_nobody_is_kept(host, look):
    """The database was away when it was finished, and came back when its process was gone."""
    folder, unfinished = host.finished(), host.claim(host.submit()[0])
    finished.end_lost(host.db, host.config, "cpu0@here")
    assert host.attempt(folder).state is states.AttemptState.RENDERED
    assert host.attempts(unfinished.job_id)[0].state is states.AttemptState.LOST
    assert look() == [folder.attempt_id]


def test_a_scratch_disk_that_cannot_be_read_keeps_nothing(host, monkeypatch):
    def broken(*_):
        raise OSError(5, "Input/output error")

    folder = host.finished()
    monkeypatch.setattr(scratch, "folders", broken)
    finished.end_lost(host.db, host.config, "cpu0@here")
    assert host.attempt(folder).state is states.AttemptState.LOST


def test_a_new_child_keeps_what_the_one_before_it_has_finished(host, monkeypatch):
    monkeypatch.setattr(tasks, "runner", lambda: None)
    monkeypatch.setattr(tasks.logs, "configure", lambda _config: None)
    folder = host.finished()
    tasks._begin()
    assert host.attempt(folder).state is states.AttemptState.RENDERED


@pytest.fixture
def vanished(host):
    """Looks as the launcher does; the worker of these attempts is registered."""
    host.register()

    def run():
        return finished.requeue_vanished(host.db, host.config, launcher="test")

    return run


def test_a_finished_video_that_vanished_is_rendered_again_at_no_cost(host, look, vanished):
    """Not after the lease of its upload, and not as a crash."""
    gone, there = host.finished(), host.finished()
    look()
    shutil.rmtree(gone.path)
    assert vanished() == [gone.attempt_id]
    attempt, job = host.attempt(gone), host.job_of(gone)
    assert attempt.state is states.AttemptState.RELEASED
    assert f"the finished video is gone: {gone.path}" in attempt.note
    assert (job.state, job.error_count, job.crash_count) == (states.JobState.QUEUED, 0, 0)
    wait = job.not_before - attempt.finished_at
    assert wait > timedelta(seconds=1), "a disk that loses all of them keeps no device busy"
    assert host.attempt(there).state is states.AttemptState.RENDERED
    assert vanished() == []


def test_a_video_that_was_published_meanwhile_is_no_vanished_one(host, look, vanished):
    folder = host.finished()
    look()
    host.publisher().publish(folder.attempt_id)
    assert vanished() == []
    assert host.job_of(folder).state is states.JobState.SUCCEEDED


def test_a_video_on_the_disk_of_another_home_is_its_own_business(host, look, vanished):
    folder = host.finished()
    look()
    shutil.rmtree(folder.path)
    """Of another host, or beside us on the same one."""
    assert finished.requeue_vanished(host.db, host.config, launcher="another") == []


def test_a_video_that_is_being_rendered_has_not_vanished(host, vanished):
    host.claim(host.submit()[0])
    assert vanished() == []
