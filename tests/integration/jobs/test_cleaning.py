"""What `rushes gc` deletes as old, and what it must leave alone: both databases, a real store."""

import base64
import contextlib
import io
import json
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import func, select, text, true, update
from sqlalchemy.exc import OperationalError

from jobs import (
    cleaning,
    database,
    errors,
    expiry,
    folder_store,
    holds,
    inputs,
    lifecycle,
    orders,
    presets,
    queries,
    results,
    settings,
    states,
    storage,
    store_mark,
    stores,
    submission,
    tokens,
    totals,
    uploads,
    workers,
)
from jobs.cleaning import Kind
from jobs.schema import (
    ApiRequest,
    ApiToken,
    Attempt,
    Base,
    Batch,
    Firing,
    Input,
    Job,
    Listener,
    Notice,
    Refusal,
    Schedule,
    StoredFile,
    Worker,
)
from tests.integration.jobs.conftest import PRESET, World

I2V = presets.load(str(Path(__file__).resolve().parents[3] / "configs" / "tiny_i2v.json"))
NO_GRACE = timedelta(0)
ONE_DATABASE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
"""For what is the same statement on both."""
DAYS = {"keep_results_days": 30, "keep_batches_days": 30, "keep_uploads_days": 30}


class Bucket:
    """A real store with a farm's batches in it."""

    def __init__(self, world: World, config: settings.Settings) -> None:
        self.world = world
        self.config = config
        self.store = stores.open_store(config)

    def submit(self, color: str = "red", **options: Any) -> str:
        """One job that starts from an image of this color."""
        row = {"prompt": "p", "image": picture(color)}
        file = submission.PromptFile(
            stream=io.BytesIO(json.dumps(row).encode()),
            source="p",
            format="jsonl",
            options=submission.Options(preset=I2V, **options),
            images=inputs.InputImages(config=self.config, base=None, store=self.store),
        )
        return submission.submit(self.world.db, file).batch_id

    def finish(self, batch_id: str, *, days_ago: float = 0) -> str:
        """Every video and the result files are there."""
        for job_id in self.world.job_ids(batch_id):
            attempt_id = self.world.claimed(job_id)
            self.world.rendered(attempt_id)
            ids = (batch_id, job_id, attempt_id)
            stored = self.store.put_bytes(b"mp4", results.video_key(*ids), content_type="video/mp4")
            self.store.put_bytes(b"{}", results.sidecar_key(*ids), content_type="text/plain")
            video = lifecycle.StoredVideo(key=stored.key, size_bytes=3, sha256=stored.sha256)
            assert self.world.db.write(lifecycle.succeed, attempt_id, video=video)
        assert results.write(self.world.db, self.store, batch_id)
        self.age(batch_id, days_ago)
        return batch_id

    def age(self, batch_id: str, days: float) -> None:
        with self.world.db.transaction() as session:
            ended = database.now(session) - timedelta(days=days)
            of_batch = update(Batch).where(Batch.id == batch_id)
            session.execute(of_batch.values(finished_at=ended))

    def clean(
        self, *kinds: Kind, apply: bool = True, grace: timedelta = NO_GRACE, **days: float | None
    ) -> dict[Kind, cleaning.Outcome]:
        config = self.config.model_copy(update=days)
        cleaner = cleaning.Cleaner(config, self.world.db, apply=apply, grace=grace)
        return {outcome.kind: outcome for outcome in cleaner.run(kinds or tuple(Kind))}

    def stored(self, prefix: str = "") -> list[str]:
        return list(self.store.list(prefix))

    def image(self, batch_id: str) -> str:
        key = self.world.only_job(batch_id).image_key
        assert key is not None
        return key


def picture(color: str) -> str:
    data = io.BytesIO()
    Image.new("RGB", (32, 32), color).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


@pytest.fixture
def bucket(world: World, s3: dict[str, str]) -> Bucket:
    return Bucket(world, settings.Settings(**s3))


@pytest.fixture
def folder_bucket(sqlite_world: World, tmp_path: Path) -> Bucket:
    (tmp_path / "results").mkdir()
    return Bucket(sqlite_world, settings.load(results_url=(tmp_path / "results").as_uri()))


def rows_of(world: World, table: type[Base]) -> int:
    with world.db.reading() as session:
        return session.scalar(select(func.count()).select_from(table)) or 0


def test_a_dry_run_counts_what_would_go_and_touches_nothing(bucket: Bucket) -> None:
    for color in ("red", "blue"):
        bucket.finish(bucket.submit(color), days_ago=31)
    bucket.finish(bucket.submit("red"), days_ago=29)
    before = bucket.stored()
    counted = bucket.clean(apply=False, **DAYS)
    assert bucket.stored() == before
    assert rows_of(bucket.world, Job) == 3
    assert counted[Kind.RESULTS].counts == {"batches": 2, "objects": 10}
    assert counted[Kind.BATCHES].counts == {"batches": 2, "jobs": 2}
    assert counted[Kind.INPUTS].counts == {"objects": 1}
    assert bucket.clean(**DAYS) == counted
    assert all(not any(o.counts.values()) for o in bucket.clean(**DAYS).values())


def test_results_go_when_they_are_old_and_nothing_else_does(bucket: Bucket) -> None:
    old = bucket.finish(bucket.submit(), days_ago=31)
    young = bucket.finish(bucket.submit(), days_ago=29)
    unwritten = bucket.finish(bucket.submit(), days_ago=31)
    with bucket.world.db.transaction() as session:
        session.execute(update(Batch).where(Batch.id == unwritten).values(manifest_at=None))
    unfinished = bucket.submit()
    stays = [key for key in bucket.stored() if f"/{old}/" not in key]
    outcome = bucket.clean(Kind.RESULTS, keep_results_days=30)[Kind.RESULTS]
    assert outcome.counts == {"batches": 1, "objects": 5}
    assert outcome.size_bytes
    assert bucket.stored() == stays
    assert bucket.world.batch(old).results_removed_at is not None
    for other in (young, unwritten, unfinished):
        assert bucket.world.batch(other).results_expired_at is None


@ONE_DATABASE
def test_by_default_results_and_rows_stay_for_ever(bucket: Bucket) -> None:
    bucket.finish(bucket.submit(), days_ago=30_000)
    before = bucket.stored("batches/")
    done = bucket.clean()
    assert done[Kind.RESULTS].keep_days is None
    assert bucket.stored("batches/") == before
    assert rows_of(bucket.world, Job) == 1


def test_a_batch_whose_results_went_cannot_be_reopened(bucket: Bucket) -> None:
    batch_id = bucket.world.submit(2)
    ok, bad = bucket.world.job_ids(batch_id)
    bucket.world.succeed(bucket.world.claimed(ok))
    bucket.world.fail(bucket.world.claimed(bad), states.FailureKind.INPUT)
    results.write(bucket.world.db, bucket.store, batch_id)
    bucket.age(batch_id, 2)
    bucket.clean(Kind.RESULTS, keep_results_days=1)
    with pytest.raises(errors.BatchExpired, match="results were deleted"):
        bucket.world.retry(batch_id)
    assert bucket.world.job(bad).state is states.JobState.FAILED
    bucket.world.check()


@ONE_DATABASE
def test_a_batch_that_was_reopened_in_time_is_left_alone(bucket: Bucket) -> None:
    """The decision is made again under the row's lock, whoever chose the batch before."""
    batch_id = bucket.world.submit(1)
    bucket.world.fail(
        bucket.world.claimed(bucket.world.job_ids(batch_id)[0]), states.FailureKind.INPUT
    )
    results.write(bucket.world.db, bucket.store, batch_id)
    bucket.age(batch_id, 2)
    bucket.world.retry(batch_id)
    assert bucket.clean(Kind.RESULTS, keep_results_days=1)[Kind.RESULTS].counts["batches"] == 0
    assert bucket.world.batch(batch_id).results_expired_at is None


@pytest.mark.parametrize("kind", [Kind.RESULTS, Kind.INPUTS])
def test_a_batch_that_is_reopened_while_a_run_waits_for_its_row_is_left_alone(
    postgres_world: World, tmp_path: Path, kind: Kind
) -> None:
    (tmp_path / "results").mkdir()
    bucket = Bucket(postgres_world, settings.load(results_url=(tmp_path / "results").as_uri()))
    batch_id = bucket.submit()
    (job_id,) = bucket.world.job_ids(batch_id)
    bucket.world.fail(bucket.world.claimed(job_id), states.FailureKind.INPUT)
    results.write(bucket.world.db, bucket.store, batch_id)
    bucket.age(batch_id, 31)
    there = bucket.stored()
    with ThreadPoolExecutor(1) as pool:
        with bucket.world.db.transaction() as session:
            orders.retry_jobs(session, batch_id, from_states=(states.JobState.FAILED,))
            running = pool.submit(bucket.clean, kind, keep_results_days=30)
            wait_for_who_waits(bucket.world)
        assert not any(running.result(60)[kind].counts.values())
    assert bucket.stored() == there
    batch = bucket.world.batch(batch_id)
    assert (batch.results_expired_at, batch.inputs_expired_at) == (None, None)


def wait_for_who_waits(world: World) -> None:
    """Until somebody waits for a lock."""
    waiting = text(
        "SELECT count(*) FROM pg_stat_activity "
        "WHERE datname = current_database() AND wait_event_type = 'Lock'"
    )
    deadline = time.monotonic() + 30
    with world.db.reading() as session:
        while not session.scalar(waiting):
            assert time.monotonic() < deadline
            session.rollback()
            time.sleep(0.01)


class Stopped(BaseException):
    """As if the process were killed."""


def stop_after(
    monkeypatch: pytest.MonkeyPatch, store: storage.ObjectStore, calls: int, error: type
) -> None:
    real, made = store.delete_many, iter(range(1_000))

    def delete_many(keys: Sequence[str]) -> None:
        if next(made) >= calls:
            raise error("stopped")
        real(keys)

    monkeypatch.setattr(store, "delete_many", delete_many)
    monkeypatch.setattr(stores, "open_store", lambda _config: store)


@pytest.mark.parametrize("calls", [0, 2])
def test_a_run_that_was_killed_is_gone_on_with(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch, calls: int
) -> None:
    batch_id = bucket.finish(bucket.submit(), days_ago=31)
    monkeypatch.setattr(storage, "MOST_DELETED_AT_ONCE", 2)
    with monkeypatch.context() as broken:
        stop_after(broken, bucket.store, calls, Stopped)
        with pytest.raises(Stopped):
            bucket.clean(**DAYS)
    assert bucket.world.batch(batch_id).results_expired_at is not None
    assert bucket.world.batch(batch_id).results_removed_at is None
    assert rows_of(bucket.world, Job) == 1  # they say what is left to do
    done = bucket.clean(**DAYS)
    assert done[Kind.RESULTS].counts == {"batches": 1, "objects": 5 - 2 * calls}
    assert bucket.stored() == []
    assert rows_of(bucket.world, Batch) == 0


@ONE_DATABASE
def test_a_store_that_is_away_is_told_and_ends_no_other_kind(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.finish(bucket.submit(idempotency_key="k"), days_ago=100)
    with monkeypatch.context() as broken:
        stop_after(broken, bucket.store, 0, errors.RushesError)
        done = bucket.clean(**DAYS)
    assert done[Kind.RESULTS].error == "stopped"
    assert done[Kind.KEYS].counts == {"keys": 1}
    assert len(bucket.stored()) == 6
    assert bucket.clean(**DAYS)[Kind.RESULTS].error is None
    assert bucket.stored() == []


@pytest.mark.parametrize("apply", [True, False])
def test_another_farms_store_is_left_alone(
    folder_bucket: Bucket, tmp_path: Path, apply: bool
) -> None:
    bucket = folder_bucket
    store_mark.Guard(bucket.world.db, bucket.store).leave()
    batch_id = bucket.finish(bucket.submit(), days_ago=100)
    (tmp_path / "other").mkdir()
    other = Bucket(bucket.world, settings.load(results_url=(tmp_path / "other").as_uri()))
    key = f"inputs/ab/{'ab' * 32}"
    other.store.put_bytes(b"image", key, content_type="image/png")
    done = other.clean(apply=apply, **DAYS, keep_inputs_days=0)
    for kind in (Kind.RESULTS, Kind.INPUTS):
        assert "is not the store of this farm" in str(done[kind].error)
    assert other.stored() == [key]
    with bucket.world.db.reading() as session:
        assert session.get_one(Batch, batch_id).results_expired_at is None
    pictures = inputs.InputImages(config=other.config, base=None, store=other.store)
    with contextlib.closing(pictures):
        pictures.resolve(picture("blue"))
        with pytest.raises(store_mark.OtherStore):
            pictures.upload(other.world.db)
    assert other.stored() == [key]


def test_rows_go_after_the_objects_and_leave_other_batches_whole(bucket: Bucket) -> None:
    old = bucket.finish(bucket.submit(idempotency_key="night"), days_ago=31)
    other = bucket.finish(bucket.submit(), days_ago=1)
    job = bucket.world.only_job(old)
    with bucket.world.db.transaction() as session:
        request = {"api": "videos", "owner": "", "name": "video_1", "body": {}}
        now = database.now(session)
        session.add(ApiRequest(batch_id=old, created_at=now, **request))
        session.add(firing(schedule(session), days_ago=31, batch_id=old))
    # With results that stay longer, rows wait for them.
    assert bucket.clean(Kind.BATCHES, keep_batches_days=30, keep_results_days=60)[
        Kind.BATCHES
    ].counts == {"batches": 0, "jobs": 0}
    bucket.clean(Kind.RESULTS, Kind.BATCHES, **DAYS)
    with bucket.world.db.reading() as session:
        assert session.get(Job, job.id) is None
        assert session.scalars(select(Attempt.job_id)).all() == bucket.world.job_ids(other)
        assert session.scalars(select(Batch.id)).all() == [other]
        assert session.scalars(select(Firing.batch_id)).all() == [None]
        assert session.scalars(select(ApiRequest)).all() == []
    assert bucket.submit(idempotency_key="night") != old
    bucket.world.check()


def test_rows_stay_until_the_result_files_are_written(folder_bucket: Bucket) -> None:
    batch_id = folder_bucket.finish(folder_bucket.submit(), days_ago=31)
    with folder_bucket.world.db.transaction() as session:
        session.execute(update(Batch).where(Batch.id == batch_id).values(manifest_at=None))
    folder_bucket.clean(Kind.BATCHES, keep_batches_days=30)
    assert rows_of(folder_bucket.world, Batch) == rows_of(folder_bucket.world, Job) == 1


@ONE_DATABASE
def test_rows_may_go_while_the_bucket_keeps_the_results(bucket: Bucket) -> None:
    bucket.finish(bucket.submit(), days_ago=31)
    before = bucket.stored("batches/")
    bucket.clean(Kind.RESULTS, Kind.BATCHES, keep_batches_days=30)
    assert rows_of(bucket.world, Batch) == 0
    assert bucket.stored("batches/") == before


@ONE_DATABASE
def test_rows_say_what_is_left_of_results_that_are_half_deleted(bucket: Bucket) -> None:
    batch_id = bucket.finish(bucket.submit(), days_ago=31)
    with bucket.world.db.transaction() as session:
        now = database.now(session)
        going = update(Batch).where(Batch.id == batch_id)
        session.execute(going.values(results_expired_at=now))
        assert expiry.forget(session, now, keeps_results=True) == 0
        session.execute(going.values(results_removed_at=now))
        assert expiry.forget(session, now, keeps_results=True) == 1


@ONE_DATABASE
def test_images_of_an_open_batch_do_not_expire(bucket: Bucket) -> None:
    batch_id = bucket.submit()
    with bucket.world.db.transaction() as session:
        expiry.expire_inputs(session, [bucket.image(batch_id)], before=database.now(session))
    assert bucket.world.batch(batch_id).inputs_expired_at is None


def test_a_slow_deletion_takes_nothing_from_who_came_after_its_time(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds, "CONDEMNED", timedelta(seconds=-1))
    with sqlite_world.db.transaction() as session:
        assert holds.condemn(session, ["k"]) == ["k"]
    holds.hold_all(sqlite_world.db, ["k"])
    with sqlite_world.db.transaction() as session:
        holds.forget(session, ["k"])
        assert holds.held(session, ["k"]) == {"k"}


def keys_of(world: World) -> set[str]:
    with world.db.reading() as session:
        return set(session.scalars(select(Input.key)))


def test_what_one_run_deletes_no_other_run_does(world: World) -> None:
    assert world.db.write(holds.condemn, ["k"]) == ["k"]
    assert world.db.write(holds.condemn, ["k"]) == []


def test_a_run_forgets_neither_new_holds_nor_what_another_deletes(world: World) -> None:
    with world.db.transaction() as session:
        holds.hold(session, ["new", "old"])
        holds.condemn(session, ["condemned"])
        long_ago = database.now(session) - 2 * holds.GRACE
        session.execute(update(Input).where(Input.key == "old").values(held_at=long_ago))
        holds.forget_old(session)
    assert keys_of(world) == {"new", "condemned"}


def test_more_images_than_one_statement_takes_are_all_held(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds, "KEYS_AT_ONCE", 2)
    holds.hold_all(sqlite_world.db, "abcde")
    assert keys_of(sqlite_world) == set("abcde")


def test_a_run_forgets_old_holds(folder_bucket: Bucket) -> None:
    folder_bucket.submit()
    with folder_bucket.world.db.transaction() as session:
        long_ago = database.now(session) - 2 * holds.GRACE
        session.execute(update(Input).values(held_at=long_ago))
    assert keys_of(folder_bucket.world)
    folder_bucket.clean(Kind.INPUTS, grace=holds.GRACE)
    assert keys_of(folder_bucket.world) == set()


def test_what_was_decided_too_long_ago_is_not_deleted(
    folder_bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Submits rely on the image again once it is no longer condemned."""
    key = folder_bucket.image(folder_bucket.finish(folder_bucket.submit(), days_ago=31))
    with monkeypatch.context() as slow:
        slow.setattr(cleaning, "LATEST_DELETE_SECONDS", -1.0)
        error = folder_bucket.clean(Kind.INPUTS)[Kind.INPUTS].error
    assert error == "the database was slow to answer: run it again"
    assert folder_bucket.stored("inputs/") == [key]
    assert folder_bucket.clean(Kind.INPUTS)[Kind.INPUTS].counts == {"objects": 1}


@ONE_DATABASE
def test_nobody_is_told_of_a_batch_whose_rows_are_going(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expiry, "JOBS_AT_ONCE", 1)
    batch_id = bucket.world.submit(3)
    bucket.finish(batch_id, days_ago=31)
    db = bucket.world.db
    with db.reading() as session:
        before = database.now(session) - timedelta(days=30)
    assert db.write(expiry.forget, before, keeps_results=True) == 1
    assert db.write(expiry.delete_jobs, batch_id) == 1
    with db.reading() as session:
        assert queries.batches(session, limit=10) == []
        for reference in (batch_id, batch_id[:9]):
            with pytest.raises(errors.NotFound):
                queries.find_batch(session, reference)
    done = bucket.clean(Kind.BATCHES, keep_batches_days=30)
    assert done[Kind.BATCHES].counts == {"batches": 1, "jobs": 2}
    assert rows_of(bucket.world, Attempt) == 0


def test_an_image_stays_while_any_batch_may_start_from_it(bucket: Bucket) -> None:
    old = bucket.finish(bucket.submit("red"), days_ago=31)
    live = bucket.submit("red")
    alone = bucket.image(bucket.finish(bucket.submit("blue"), days_ago=31))
    shared = bucket.image(old)
    assert shared == bucket.image(live)
    assert bucket.clean(Kind.INPUTS)[Kind.INPUTS].counts == {"objects": 1}
    assert bucket.stored("inputs/") == [shared]
    assert shared != alone
    bucket.finish(live, days_ago=29)
    assert bucket.clean(Kind.INPUTS)[Kind.INPUTS].counts == {"objects": 0}
    bucket.age(live, 31)
    assert bucket.clean(Kind.INPUTS)[Kind.INPUTS].counts == {"objects": 1}
    assert bucket.stored("inputs/") == []
    assert bucket.world.batch(live).inputs_expired_at is not None


def test_a_batch_whose_image_went_cannot_be_reopened(bucket: Bucket) -> None:
    batch_id = bucket.submit()
    (job_id,) = bucket.world.job_ids(batch_id)
    bucket.world.fail(bucket.world.claimed(job_id), states.FailureKind.INPUT)
    bucket.age(batch_id, 31)
    bucket.clean(Kind.INPUTS)
    with pytest.raises(errors.BatchExpired, match="input images were deleted"):
        bucket.world.retry(batch_id)
    assert bucket.world.job(job_id).state is states.JobState.FAILED


@ONE_DATABASE
def test_an_upload_and_a_schedule_keep_their_image(bucket: Bucket) -> None:
    keys = []
    for color in ("red", "blue", "green", "yellow", "white"):
        keys.append(bucket.image(bucket.finish(bucket.submit(color), days_ago=31)))
    uploaded, scheduled, free, listed, escaped = keys
    with bucket.world.db.transaction() as session:
        stored = storage.StoredObject(key=uploaded, size_bytes=1, sha256="0" * 64)
        names = {"owner": "", "purpose": "vision", "name": "a.png"}
        file_id = uploads.new_id(database.now(session))
        uploads.add(session, stored, file_id=file_id, **names)
        prompts = f'{{"prompt": "p", "image": "s3://rushes/{scheduled}"}}'
        session.add(schedule(session, prompts=prompts))
        prompts = '{"prompt": "p", "image": "{{first}}"}'
        lists = {"first": ["https://images.test/a.png", f"s3://rushes/{listed}"]}
        session.add(schedule(session, prompts=prompts, lists=lists))
        prompts = f'{{"prompt": "p", "image": "s3://rushes/{escaped}"}}'.replace("/", r"\/")
        session.add(schedule(session, prompts=prompts))
    assert bucket.clean(Kind.INPUTS)[Kind.INPUTS].counts == {"objects": 1}
    assert bucket.stored("inputs/") == sorted({*keys} - {free})
    with bucket.world.db.transaction() as session:
        past = database.now(session) - timedelta(days=31)
        session.execute(update(StoredFile).values(created_at=past))
    bucket.clean(Kind.UPLOADS, Kind.INPUTS, keep_uploads_days=30)
    assert bucket.stored("inputs/") == sorted([scheduled, listed, escaped])


@ONE_DATABASE
def test_an_error_of_the_database_is_told_in_one_line(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OperationalError("DELETE FROM x", {"owner": "me"}, Exception("disk is full\nmore"))

    monkeypatch.setattr(cleaning.expiry, "old_tokens", broken)
    error = bucket.clean(Kind.TOKENS, **DAYS)[Kind.TOKENS].error
    assert error is not None
    assert "rushes.db: disk is full: check DATABASE_URL" in error
    assert "more" not in error


@ONE_DATABASE
def test_nothing_goes_while_it_is_unknown_what_a_schedule_names(bucket: Bucket) -> None:
    """A file that is made anew each night, or that our keys may not read for the moment."""
    bucket.finish(bucket.submit(), days_ago=31)
    with bucket.world.db.transaction() as session:
        row = schedule(session)
        row.prompts, row.prompts_url = None, bucket.store.address("prompts/nightly.jsonl")
        name = row.name
        session.add(row)
    there = bucket.stored()
    for outcome in bucket.clean(Kind.RESULTS, Kind.INPUTS, **DAYS).values():
        assert outcome.error is not None
        assert name in outcome.error
        assert "mend or remove the schedule" in outcome.error
    assert bucket.stored() == there


@ONE_DATABASE
def test_what_the_store_does_not_let_go_keeps_nothing_else(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cleaning, "MOST_REFUSED", 2)
    first, *free = sorted(bucket.finish(bucket.submit(), days_ago=31) for _ in range(4))
    held = free.pop(1)
    real = bucket.store.delete_many

    def delete_many(keys: Sequence[str]) -> None:
        if first in keys[0] or held in keys[0]:
            raise storage.StorageDenied(keys[0], "is held")
        real(keys)

    monkeypatch.setattr(bucket.store, "delete_many", delete_many)
    monkeypatch.setattr(stores, "open_store", lambda _config: bucket.store)
    outcome = bucket.clean(Kind.RESULTS, **DAYS)[Kind.RESULTS]
    assert outcome.counts["batches"] == 2
    assert outcome.error is not None
    assert "is held (and 1 more)" in outcome.error
    assert [bucket.stored(f"batches/{batch_id}/") for batch_id in free] == [[], []]


@pytest.mark.parametrize(
    ("problem", "times"),
    [(storage.StorageUnavailable("file://r", "away"), 1), (storage.StorageDenied("k", "no"), 2)],
    ids=["away", "refuses everything"],
)
def test_a_store_that_lets_nothing_go_is_not_asked_for_all_of_it(
    folder_bucket: Bucket, monkeypatch: pytest.MonkeyPatch, problem: Exception, times: int
) -> None:
    for _ in range(3):
        folder_bucket.finish(folder_bucket.submit(), days_ago=31)
    asked = []

    def delete_many(keys: Sequence[str]) -> None:
        asked.append(keys)
        raise problem

    monkeypatch.setattr(cleaning, "MOST_REFUSED", 2)
    monkeypatch.setattr(folder_bucket.store, "delete_many", delete_many)
    monkeypatch.setattr(stores, "open_store", lambda _config: folder_bucket.store)
    assert folder_bucket.clean(Kind.RESULTS, **DAYS)[Kind.RESULTS].error is not None
    assert len(asked) == times


@ONE_DATABASE
def test_a_name_that_the_store_cannot_delete_keeps_nothing_else(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd, free = sorted(bucket.finish(bucket.submit(), days_ago=31) for _ in range(2))
    real = bucket.store.delete_many

    def delete_many(keys: Sequence[str]) -> None:
        if odd in keys[0]:
            storage.checked_key(f"batches/{odd}/")
        real(keys)

    monkeypatch.setattr(bucket.store, "delete_many", delete_many)
    monkeypatch.setattr(stores, "open_store", lambda _config: bucket.store)
    outcome = bucket.clean(Kind.RESULTS, **DAYS)[Kind.RESULTS]
    assert outcome.counts["batches"] == 1
    assert outcome.error is not None
    assert f"batches/{odd}/" in outcome.error
    assert bucket.stored(f"batches/{free}/") == []


@pytest.mark.parametrize("apply", [True, False])
def test_a_name_that_no_row_can_hold_keeps_nothing_else(
    world: World, tmp_path: Path, apply: bool
) -> None:
    """And stays: it cannot be ours."""
    bucket = Bucket(world, settings.load(results_url=tmp_path.as_uri()))
    bucket.finish(bucket.submit(), days_ago=31)
    strange = [tmp_path / "inputs" / name for name in ("a" * 210, os.fsdecode(b"\xe9t\xe9"))]
    for path in strange:
        path.touch()
    outcome = bucket.clean(Kind.INPUTS, apply=apply)[Kind.INPUTS]
    assert outcome.counts == {"objects": 1}
    assert outcome.error is not None
    assert "that are not ours stay: 2, such as 'inputs/" in outcome.error
    assert outcome.error.isprintable()
    assert all(path.exists() for path in strange)


@ONE_DATABASE
def test_results_that_a_schedule_starts_from_stay(bucket: Bucket) -> None:
    batch_id = bucket.finish(bucket.submit(), days_ago=31)
    with bucket.world.db.transaction() as session:
        url = f"s3://rushes/{results.batch_key(batch_id, 'output.jsonl')}"
        session.add(schedule(session, prompts=f'{{"prompt": "p", "image": "{url}"}}'))
    assert bucket.clean(Kind.RESULTS, **DAYS)[Kind.RESULTS].counts["batches"] == 0


def test_a_submit_waits_while_its_image_is_being_deleted_and_lays_it_anew(
    bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = bucket.image(bucket.finish(bucket.submit(), days_ago=31))
    submitting = threading.Thread(target=bucket.submit)
    real = bucket.store.delete_many

    def delete_many(keys: Sequence[str]) -> None:
        submitting.start()
        time.sleep(0.3)
        assert rows_of(bucket.world, Batch) == 1
        real(keys)

    monkeypatch.setattr(bucket.store, "delete_many", delete_many)
    monkeypatch.setattr(stores, "open_store", lambda _config: bucket.store)
    monkeypatch.setattr(holds, "LOOK_SECONDS", 0.05)
    assert bucket.clean(Kind.INPUTS)[Kind.INPUTS].counts == {"objects": 1}
    submitting.join()
    assert rows_of(bucket.world, Batch) == 2
    assert bucket.stored("inputs/") == [key]


def test_an_image_that_a_submit_has_just_asked_for_stays(folder_bucket: Bucket) -> None:
    key = folder_bucket.image(folder_bucket.finish(folder_bucket.submit(), days_ago=31))
    with folder_bucket.world.db.transaction() as session:
        holds.forget_old(session, grace=NO_GRACE)
    make_old(folder_bucket, key)
    images = inputs.InputImages(config=folder_bucket.config, base=None, store=folder_bucket.store)
    images.resolve(picture("red"))
    images.upload(folder_bucket.world.db)  # between this and the commit, nothing names the image
    for apply in (False, True):
        done = folder_bucket.clean(Kind.INPUTS, apply=apply, grace=holds.GRACE)
        assert done[Kind.INPUTS].counts == {"objects": 0}
    assert folder_bucket.stored("inputs/") == [key]


def test_a_new_object_stays_whoever_laid_it(folder_bucket: Bucket) -> None:
    """A submit of an older version, which does not say what it needs."""
    key = folder_bucket.image(folder_bucket.finish(folder_bucket.submit(), days_ago=31))
    with folder_bucket.world.db.transaction() as session:
        holds.forget_old(session, grace=NO_GRACE)
    folder_bucket.clean(Kind.INPUTS, grace=holds.GRACE)
    assert folder_bucket.stored("inputs/") == [key]
    make_old(folder_bucket, key)
    folder_bucket.clean(Kind.INPUTS, grace=holds.GRACE)
    assert folder_bucket.stored("inputs/") == []


def make_old(bucket: Bucket, key: str) -> None:
    assert isinstance(bucket.store, folder_store.FolderStore)
    path = Path(bucket.store.address(key).removeprefix("file://"))
    past = time.time() - 2 * holds.GRACE.total_seconds()
    os.utime(path, (past, past))


def attempts_ever(world: World) -> totals.Totals:
    with world.db.snapshot() as session:
        return totals.past(session) + totals.of_attempts(session, true())


def test_two_runs_at_once_are_no_quarrel(bucket: Bucket) -> None:
    """And what they delete is counted once."""
    for color in ("red", "blue", "green"):
        bucket.finish(bucket.submit(color), days_ago=31)
    before = attempts_ever(bucket.world)
    assert before["succeeded", "", "count"] == 3
    done: list[dict[Kind, cleaning.Outcome]] = []
    runs = [threading.Thread(target=lambda: done.append(bucket.clean(**DAYS))) for _ in range(2)]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert [o.error for each in done for o in each.values()] == [None] * 2 * len(Kind)
    assert bucket.stored() == []
    assert rows_of(bucket.world, Batch) == rows_of(bucket.world, Attempt) == 0
    assert attempts_ever(bucket.world) == before


def schedule(
    session: Any,
    *,
    prompts: str = '{"prompt": "p"}',
    lists: dict[str, list[str]] | None = None,
) -> Schedule:
    row = Schedule(
        name=f"s{time.monotonic_ns()}",
        cron="0 0 * * *",
        zone="UTC",
        misfire=states.Misfire.SKIP,
        overlap=states.Overlap.QUEUE,
        prompts=prompts,
        format="jsonl",
        lists=lists or {},
        preset="tiny",
        look=PRESET.look.model_dump(mode="json"),
        options={},
        created_at=database.now(session),
        paused_at=database.now(session),
    )
    session.add(row)
    session.flush()
    return row


def firing(of: Schedule, *, days_ago: float, batch_id: str | None = None) -> Firing:
    at = of.created_at - timedelta(days=days_ago)
    return Firing(
        schedule_id=of.id,
        fire_at=at,
        created_at=at,
        state=states.FiringState.MADE,
        batch_id=batch_id,
    )


def add_tokens(session: Any, old: datetime) -> None:
    for name in ("valid", "revoked long ago", "revoked now", "ran out long ago"):
        token, _ = tokens.create(session, name=name, owner="", scopes=[tokens.Scope.READ])
        if "revoked" in name:
            token.revoked_at = old if "long" in name else database.now(session)
        if "ran out" in name:
            token.expires_at = old


def add_requests(session: Any, old: datetime) -> None:
    its_batch = session.scalars(select(Batch.id)).one()
    for name, created_at, deleted_at, batch_id in (
        ("refused long ago", old, None, None),
        # By this row alone it is known that its video was deleted.
        ("deleted long ago", old, old, its_batch),
        ("refused now", database.now(session), None, None),
    ):
        session.add(
            ApiRequest(
                api="videos",
                owner="",
                name=name,
                batch_id=batch_id,
                body={},
                created_at=created_at,
                deleted_at=deleted_at,
            )
        )


def add_firings(session: Any, old: datetime) -> None:
    of, ago = schedule(session), (database.now(session) - old) / timedelta(days=1)
    open_batch = session.scalars(select(Batch.id)).one()
    session.add_all(
        [
            firing(of, days_ago=ago),
            firing(of, days_ago=1),
            firing(of, days_ago=ago + 1, batch_id=open_batch),
        ]
    )


def add_notices(session: Any, old: datetime) -> None:
    now = database.now(session)
    listener = Listener(name="l", url="https://example.org", events=[], created_at=old)
    session.add(listener)
    session.flush()
    for created_at, next_try_at in ((old, None), (old, now), (now, None)):
        session.add(
            Notice(
                message_id="m",
                listener_id=listener.id,
                event="batch.finished",
                body={},
                created_at=created_at,
                next_try_at=next_try_at,
            )
        )


@ONE_DATABASE
@pytest.mark.parametrize(
    ("kind", "table", "add", "kept"),
    [
        (Kind.TOKENS, ApiToken, add_tokens, 2),
        (Kind.REQUESTS, ApiRequest, add_requests, 2),
        (Kind.HISTORY, Firing, add_firings, 2),
        (Kind.NOTICES, Notice, add_notices, 2),
    ],
)
def test_small_things_go_when_they_are_old(
    bucket: Bucket, kind: Kind, table: type[Base], add: Callable[..., None], kept: int
) -> None:
    bucket.world.submit()
    with bucket.world.db.transaction() as session:
        add(session, database.now(session) - timedelta(days=400))
    there = rows_of(bucket.world, table)
    counted = bucket.clean(kind, apply=False)[kind]
    assert sum(counted.counts.values()) == there - kept
    assert rows_of(bucket.world, table) == there
    assert bucket.clean(kind)[kind] == counted
    assert rows_of(bucket.world, table) == kept


@ONE_DATABASE
def test_workers_that_are_there_stay_however_short_they_are_to_be_kept(bucket: Bucket) -> None:
    bucket.world.register("idle@h")
    with bucket.world.db.transaction() as session:
        between_beats = database.now(session) - timedelta(seconds=workers.ALIVE_SECONDS / 2)
        session.execute(update(Worker).values(heartbeat_at=between_beats))
        table, which = expiry.old_workers(database.now(session))
        assert session.scalars(select(table).where(which)).all() == []


@ONE_DATABASE
def test_workers_that_hold_a_job_stay_however_silent(bucket: Bucket) -> None:
    batch_id = bucket.world.submit()
    for name in ("busy@h", "idle@h", "new@h"):
        bucket.world.register(name)
    bucket.world.claimed(bucket.world.job_ids(batch_id)[0], worker="busy@h")
    with bucket.world.db.transaction() as session:
        past = database.now(session) - timedelta(days=31)
        silent = update(Worker).where(Worker.name.in_(["busy@h", "idle@h"]))
        session.execute(silent.values(heartbeat_at=past))
        for name, needs_test in (("new@h", True), ("busy@h", False), ("gone@h", True)):
            kind = states.FailureKind.DEVICE
            told = {"queue": "", "kind": kind, "reason": "", "times": 1, "since": past}
            session.add(Refusal(worker=name, until=past, needs_test=needs_test, **told))
    assert bucket.clean(Kind.WORKERS)[Kind.WORKERS].counts == {"workers": 1, "refusals": 2}
    with bucket.world.db.reading() as session:
        assert set(session.scalars(select(Worker.name))) == {"busy@h", "new@h"}
        assert session.scalars(select(Refusal.worker)).all() == ["new@h"]  # it waits for its test


@ONE_DATABASE
def test_an_idempotency_key_is_free_again_when_it_is_old(bucket: Bucket) -> None:
    batch_id = bucket.finish(bucket.submit(idempotency_key="night"), days_ago=91)
    live = bucket.submit(idempotency_key="live")
    assert bucket.clean(Kind.KEYS)[Kind.KEYS].counts == {"keys": 1}
    assert bucket.submit(idempotency_key="night") != batch_id
    assert bucket.submit(idempotency_key="live") == live


def test_temporary_folders_of_killed_processes_go(
    sqlite_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    made = re.compile(r'TemporaryDirectory\(prefix="(rushes-[^"]*)"')
    top = Path(settings.__file__).parents[1]
    sources = [path for part in ("jobs", "worker") for path in (top / part).rglob("*.py")]
    ours = {found for path in sources for found in made.findall(path.read_text(encoding="utf-8"))}
    assert len(ours) >= 6
    past = time.time() - 31 * 24 * 3600
    for prefix in (*ours, "rushes-notes-", "other-"):
        (tmp_path / f"{prefix}x").mkdir()
        os.utime(tmp_path / f"{prefix}x", (past, past))
    (tmp_path / f"{min(ours)}new").mkdir()
    config = settings.load(scratch_dir=str(tmp_path / "scratch"))
    in_scratch = config.scratch_dir / f"{min(ours)}x"
    in_scratch.mkdir(parents=True)
    os.utime(in_scratch, (past, past))
    Bucket(sqlite_world, config).clean(Kind.SCRATCH, apply=True)
    assert not in_scratch.exists()
    left = {path.name for path in tmp_path.iterdir() if path.name.startswith(("rushes-", "other-"))}
    assert left == {"rushes-notes-x", "other-x", f"{min(ours)}new"}


def test_scratch_folders_go_when_no_attempt_needs_them(sqlite_world: World, tmp_path: Path) -> None:
    config = settings.load(scratch_dir=str(tmp_path / "scratch"))
    bucket = Bucket(sqlite_world, config)
    batch_id = sqlite_world.submit(3)
    claimed = [sqlite_world.claimed(job_id) for job_id in sqlite_world.job_ids(batch_id)]
    live, rendered, over = claimed
    sqlite_world.rendered(rendered)
    sqlite_world.release(over)
    past = time.time() - 31 * 24 * 3600
    for name, is_old in (
        (f"{batch_id}.{live}", True),
        (f"{batch_id}.{rendered}", True),
        (f"{batch_id}.{over}", True),
        (f"other-farm.{live}", True),
        ("other-farm.6666", True),
        ("other-farm.7777", False),
        ("other-farm.8888", True),
        ("other-farm.9999", True),
        ("notes", True),
    ):
        folder = config.scratch_dir / name
        folder.mkdir(parents=True)
        (folder / "video.mp4").write_bytes(b"1234")
        if name.endswith(".9999"):
            (folder / "sidecar.json").touch()  # finished: the other farm uploads it
        if is_old:
            for path in (*folder.iterdir(), folder):
                os.utime(path, (past, past))
    (config.scratch_dir / "other-farm.6666" / "video.mp4").touch()  # written to until now
    for apply in (False, True):
        outcome = bucket.clean(Kind.SCRATCH, apply=apply)[Kind.SCRATCH]
        assert (outcome.counts, outcome.size_bytes) == ({"folders": 3, "of_others": 1}, 12)
    left = {path.name for path in config.scratch_dir.iterdir()}
    needed = {f"{batch_id}.{live}", f"{batch_id}.{rendered}"}
    assert left == needed | {f"other-farm.{n}" for n in (6666, 7777, 9999)} | {"notes"}
