"""A finished video reaches the store once, however often something stands in its way."""

import dataclasses
import json
import shutil
import threading

import pytest

from jobs import (
    lifecycle,
    orders,
    results,
    retries,
    servers,
    settings,
    states,
    storage,
    store_mark,
    stores,
)
from tests.waiting import until
from worker import publisher


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(publisher, "FIRST_WAIT_SECONDS", 0.02)
    monkeypatch.setattr(publisher, "LONGEST_WAIT_SECONDS", 0.1)


@pytest.fixture
def keys(host):
    def read():
        return list(stores.open_store(host.config).list())

    return read


@pytest.fixture
def in_background():
    """`in_background(call)`: runs it in a thread that has ended when the test ends."""
    threads = []

    def start(call):
        threads.append(threading.Thread(target=call))
        threads[-1].start()
        return threads[-1]

    yield start
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


class Store:
    """A real store, with something done before each file."""

    def __init__(self, real, before):
        self.real, self.before = real, before
        self.types = {}

    def put_file(self, path, key, *, content_type):
        self.before(path)
        self.types[path.name] = content_type
        return self.real.put_file(path, key, content_type=content_type)


def test_a_video_and_its_sidecar_reach_the_store_and_the_job_succeeds(host, keys):
    folder = host.finished()
    job = host.job_of(folder)
    host.publisher().publish(folder.attempt_id)
    assert host.job(job.id).state is states.JobState.SUCCEEDED
    attempt = host.attempt(folder)
    assert attempt.state is states.AttemptState.SUCCEEDED
    ids = (job.batch_id, job.id, folder.attempt_id)
    assert keys() == sorted([results.video_key(*ids), results.sidecar_key(*ids)])
    assert attempt.video_key == results.video_key(*ids)
    assert stores.open_store(host.config).read_bytes(attempt.video_key) == b"video" * 1_000
    assert not folder.path.exists()


def test_a_second_message_does_nothing(host, keys):
    folder = host.finished()
    for _ in range(3):
        host.publisher().publish(folder.attempt_id)
    assert len(keys()) == 2


def test_a_store_that_cannot_be_written_delays_and_is_tried_until_it_can(host, in_background):
    folder = host.finished()
    results_folder = host.config.home / "results"
    results_folder.write_text("a file stands in the way")
    waiting = in_background(lambda: host.publisher().publish(folder.attempt_id))
    until(lambda: "the store does not take the video" in (host.attempt(folder).note or ""))
    first = host.attempt(folder).lease_until
    until(lambda: host.attempt(folder).lease_until > first)
    assert host.job_of(folder).error_count == 0
    results_folder.unlink()
    waiting.join(30)
    assert host.attempt(folder).state is states.AttemptState.SUCCEEDED
    assert len(host.attempts(host.job_of(folder).id)) == 1


def test_a_video_is_kept_while_the_store_is_not_that_of_the_farm(
    host, in_background, tmp_path, monkeypatch
):
    """As when one host was started with another RUSHES_RESULTS_URL."""
    farm = stores.open_store(host.config)
    store_mark.Guard(host.db, farm).leave()
    folder = host.finished()
    (tmp_path / "elsewhere").mkdir()
    url = (tmp_path / "elsewhere").as_uri()
    other = stores.open_store(host.config.model_copy(update={"results_url": url}))
    thread = in_background(lambda: host.publisher(other).publish(folder.attempt_id))
    until(lambda: "is not the store of this farm" in (host.attempt(folder).note or ""))
    assert thread.is_alive()
    assert list(other.list()) == []
    store_mark.move(host.db, other)
    thread.join(60)
    assert host.attempt(folder).video_key in list(other.list())


def test_an_outage_of_s3_is_waited_out(host, in_background, tmp_path, monkeypatch):
    with servers.S3Server.start(tmp_path / "s3") as server:
        for name, value in server.environment().items():
            monkeypatch.setenv(name, value)
    folder = host.finished()
    host.config = settings.load()
    waiting = in_background(lambda: host.publisher().publish(folder.attempt_id))
    until(lambda: "does not take" in (host.attempt(folder).note or ""))
    with servers.S3Server.start(tmp_path / "s3", port=server.port):
        waiting.join(60)
    assert host.attempt(folder).state is states.AttemptState.SUCCEEDED


def test_an_outage_of_the_database_is_waited_out(host, in_background):
    folder = host.finished()
    tried = threading.Event()
    with host.database_outage():

        class Telling(publisher.Publisher):
            def _try(self, folder, tries):
                done = super()._try(folder, tries)
                tried.set()
                return done

        real = host.publisher()
        telling = Telling(**vars(real))
        waiting = in_background(lambda: telling.publish(folder.attempt_id))
        assert tried.wait(30)
    waiting.join(30)
    assert host.attempt(folder).state is states.AttemptState.SUCCEEDED


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: folder.video.write_bytes(b"other"),
        lambda folder: folder.video.unlink(),
        lambda folder: folder.sidecar.write_text("{"),
    ],
    ids=["changed", "missing", "sidecar"],
)
def test_a_damaged_video_is_rendered_again(host, keys, damage):
    folder = host.finished()
    job = host.job_of(folder)
    damage(folder)
    host.publisher().publish(folder.attempt_id)
    attempt = host.attempt(folder)
    assert attempt.failure_kind is states.FailureKind.DISK
    assert "video.mp4" in attempt.error or "sidecar.json" in attempt.error
    assert host.job(job.id).state is states.JobState.QUEUED
    assert not folder.path.exists()
    assert keys() == []


def test_a_video_damaged_during_its_upload_is_rendered_again(host):
    folder = host.finished()
    store = Store(stores.open_store(host.config), lambda path: path.unlink())
    host.publisher(store).publish(folder.attempt_id)
    assert host.attempt(folder).failure_kind is states.FailureKind.DISK


def test_the_video_of_a_cancelled_job_is_dropped(host, keys):
    folder = host.finished()
    job = host.job_of(folder)
    host.db.write(orders.cancel_job, job.id)
    host.publisher().publish(folder.attempt_id)
    assert host.job(job.id).state is states.JobState.CANCELLED
    assert host.attempt(folder).state is states.AttemptState.CANCELLED
    assert not folder.path.exists()
    assert keys() == []


def test_the_video_of_an_attempt_that_lost_its_job_is_dropped(host, keys):
    folder = host.finished()
    job = host.job_of(folder)
    host.db.write(
        lifecycle.end_lost_attempts, budgets=retries.budgets(host.config), worker="cpu0@here"
    )
    host.claim(host.job(job.id))
    host.publisher().publish(folder.attempt_id)
    assert host.job(job.id).state is states.JobState.RUNNING
    assert not folder.path.exists()
    assert keys() == []


def test_two_publishers_at_once_upload_once(host, in_background):
    folder = host.finished()
    uploaded, started, may_go_on = [], threading.Event(), threading.Event()

    def before(path):
        uploaded.append(path.name)
        started.set()
        assert may_go_on.wait(30)

    store = Store(stores.open_store(host.config), before)
    first = in_background(lambda: host.publisher(store).publish(folder.attempt_id))
    assert started.wait(30)
    host.publisher(store).publish(folder.attempt_id)
    may_go_on.set()
    first.join(30)
    assert uploaded == ["video.mp4", "sidecar.json"]
    assert host.attempt(folder).state is states.AttemptState.SUCCEEDED


def test_a_crash_after_the_upload_leaves_one_object_when_it_is_done_again(host, keys):
    class PowerCut(BaseException):
        pass

    def before(path):
        if path.name == "sidecar.json":
            raise PowerCut

    folder = host.finished()
    store = Store(stores.open_store(host.config), before)
    with pytest.raises(PowerCut):
        host.publisher(store).publish(folder.attempt_id)
    assert len(keys()) == 1
    host.publisher().publish(folder.attempt_id)
    assert len(keys()) == 2
    assert host.attempt(folder).state is states.AttemptState.SUCCEEDED


def test_a_database_that_goes_amid_the_upload_costs_no_render(host):
    """What has been uploaded stays on the disk until the database knows of it."""
    folder = host.finished()
    before = {"video.mp4": lambda: None, "sidecar.json": host.break_database}
    store = Store(stores.open_store(host.config), lambda path: before[path.name]())
    assert host.publisher(store)._try(folder, 0) is not None
    host.mend_database()
    host.publisher().publish(folder.attempt_id)
    assert host.attempt(folder).state is states.AttemptState.SUCCEEDED
    assert len(host.attempts(host.job_of(folder).id)) == 1


def test_the_store_is_told_what_the_files_are(host):
    """A browser plays and shows them by that."""
    folder = host.finished()
    store = Store(stores.open_store(host.config), lambda _path: None)
    host.publisher(store).publish(folder.attempt_id)
    assert store.types == {"video.mp4": "video/mp4", "sidecar.json": "application/json"}


def test_a_folder_of_another_farm_is_left_alone(host, keys):
    """The same number of an attempt, but of another database on this disk."""
    folder = host.finished()
    foreign = folder.path.with_name(f"250101-zzzzzzzz.{folder.attempt_id}")
    shutil.copytree(folder.path, foreign)
    sidecar = json.loads((foreign / "sidecar.json").read_text())
    (foreign / "sidecar.json").write_text(json.dumps(sidecar | {"batch_id": "250101-zzzzzzzz"}))
    host.publisher().publish(folder.attempt_id)
    assert foreign.exists()
    assert not folder.path.exists()
    assert all(host.job_of(folder).batch_id in key for key in keys())


@pytest.mark.parametrize("content", [b"video" * 1_000, b"other"], ids=["whole", "damaged"])
def test_publishing_wakes_the_dispatcher(host, content):
    folder = host.finished()
    folder.video.write_bytes(content)
    host.publisher().publish(folder.attempt_id)
    assert host.bell.wait_for_kick(0.1)


def test_a_publisher_is_made_while_nothing_answers(monkeypatch):
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("DATABASE_URL", "postgresql://127.0.0.1:1/none")
    monkeypatch.setenv("RUSHES_RESULTS_URL", "s3://bucket")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x" * 16)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x" * 16)
    assert publisher.make().store.url == "s3://bucket"


def test_a_store_may_be_away_for_weeks():
    assert publisher.wait_seconds(0) <= publisher.FIRST_WAIT_SECONDS
    longest = publisher.LONGEST_WAIT_SECONDS
    assert longest / 2 <= publisher.wait_seconds(100_000) <= longest


@pytest.mark.parametrize("away", ["database", "store", "both"])
def test_a_wait_is_shorter_than_the_lease_that_counts_meanwhile(host, monkeypatch, away):
    """After an outage of the database silence is pardoned for a lease, and not for longer."""

    def fail(_path):
        if away == "both":
            host.break_database()
        raise storage.StorageUnavailable("videos", "away")

    config = host.config.model_copy(update={"lease_seconds": 3.0, "publish_lease_seconds": 30.0})
    folder, store = host.finished(), Store(stores.open_store(host.config), fail)
    made = dataclasses.replace(host.publisher(store), config=config)
    if away == "database":
        host.break_database()
    longest_seconds = made._try(folder, 0)
    if away != "store":
        host.mend_database()
    assert longest_seconds == (10.0 if away == "store" else 1.0)
    assert host.attempt(folder).state in states.LIVE_ATTEMPT_STATES


def test_the_database_is_asked_again_after_that_wait(host, monkeypatch):
    slept = []
    monkeypatch.setattr(publisher, "FIRST_WAIT_SECONDS", 60.0)
    monkeypatch.setattr(publisher, "LONGEST_WAIT_SECONDS", 60.0)
    monkeypatch.setattr(publisher.time, "sleep", slept.append)
    folder = host.finished()
    tries = iter([0.5, None])
    monkeypatch.setattr(publisher.Publisher, "_try", lambda *_: next(tries))
    host.publisher().publish(folder.attempt_id)
    assert slept == [0.5]
