"""Who writes the result files of a finished batch, and when."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, update
from structlog.testing import capture_logs

from jobs import (
    database,
    errors,
    folder_store,
    result_writer,
    results,
    settings,
    states,
    storage,
    store_mark,
)
from jobs.schema import Batch
from tests.integration.jobs.conftest import World
from tests.waiting import until


def writer_of(world: World, results_url: str | None = None) -> result_writer.ResultWriter:
    url = world.db.url.render_as_string(hide_password=False)
    config = settings.load(database_url=url, results_url=results_url, tick_seconds=0.05)
    return result_writer.ResultWriter(config, db=world.db)


def finished(world: World) -> str:
    batch_id = world.submit(1)
    world.cancel_batch(batch_id)
    return batch_id


def test_result_files_are_written_once_for_a_finished_batch(world: World) -> None:
    batch_id = world.submit(1)
    writer = writer_of(world)
    assert writer.write_finished() == 0
    world.succeed(world.claimed(world.only_job(batch_id).id))
    assert writer.write_finished() == 1
    assert world.batch(batch_id).manifest_at is not None
    assert world.batch(batch_id).results_lease_until is None
    assert writer.write_finished() == 0


def test_result_files_are_written_again_after_a_retry(world: World, tmp_path: Path) -> None:
    batch_id = world.submit(1)
    job_id = world.only_job(batch_id).id
    folder = tmp_path / "results"
    folder.mkdir()
    writer = writer_of(world, folder.as_uri())
    world.fail(world.claimed(job_id), states.FailureKind.INPUT)
    writer.write_finished()
    manifest = folder / "batches" / batch_id / "manifest.json"
    assert json.loads(manifest.read_text())["counts"]["failed"] == 1
    world.retry(batch_id)
    assert writer.write_finished() == 0
    world.succeed(world.claimed(job_id))
    assert writer.write_finished() == 1
    assert json.loads(manifest.read_text())["counts"]["succeeded"] == 1
    assert (manifest.parent / "errors.jsonl").read_text() == ""


def test_a_store_that_fails_delays_the_files_and_is_not_asked_again_at_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        finished(world)
    in_the_way = tmp_path / "store"
    in_the_way.write_text("a file where a folder should be")
    writer = writer_of(world, (in_the_way / "results").as_uri())
    with capture_logs() as logs:
        assert writer.write_finished() == 0
        told = [entry for entry in logs if entry["event"] == "batch.manifest_delayed"]
        assert told
        assert writer.write_finished() == 0
        assert [e for e in logs if e["event"] == "batch.manifest_delayed"] == told
    in_the_way.unlink()
    (in_the_way / "results").mkdir(parents=True)
    monkeypatch.setattr(writer, "_again_at", 0.0)
    assert writer.write_finished() == 3


@pytest.mark.parametrize(
    ("error", "asked"),
    [(storage.StorageUnavailable("s3://here", "no answer"), 1), (errors.RushesError("odd"), 3)],
    ids=["silent", "odd"],
)
def test_a_store_that_is_silent_is_waited_for_once_and_not_for_each_batch(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch, error: errors.RushesError, asked: int
) -> None:
    for _ in range(3):
        finished(sqlite_world)
    tries: list[str] = []

    def fail(_db: object, _store: object, batch_id: str, **_options: Any) -> bool:
        tries.append(batch_id)
        raise error

    monkeypatch.setattr(results, "write", fail)
    assert writer_of(sqlite_world).write_finished() == 0
    assert len(tries) == asked


def test_a_batch_that_meets_a_defect_waits_for_the_end_of_its_lease_and_holds_up_no_other(
    sqlite_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = (finished(sqlite_world) for _ in range(2))
    tries: list[str] = []
    write = results.write

    def fail_for_one(
        db: database.Database, store: storage.ObjectStore, batch_id: str, **options: Any
    ) -> bool:
        tries.append(batch_id)
        if batch_id == first:
            raise RecursionError("too deep")
        return write(db, store, batch_id, **options)

    monkeypatch.setattr(results, "write", fail_for_one)
    writer = writer_of(sqlite_world, tmp_path.as_uri())
    with capture_logs() as logs:
        assert writer.write_finished() == 1
    assert logs[0]["error"] == "RecursionError: too deep"
    assert logs[0]["exc_info"] is True
    third = finished(sqlite_world)
    assert writer.write_finished() == 1
    assert tries == [first, second, third]
    with sqlite_world.db.transaction() as session:
        past = database.now(session) - timedelta(seconds=1)
        session.execute(update(Batch).values(results_lease_until=past))
    assert writer.write_finished() == 0
    assert tries[3:] == [first]


def test_batches_that_ended_in_one_moment_are_tried_once_each(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [finished(world) for _ in range(3)]
    with world.db.transaction() as session:
        session.execute(update(Batch).values(finished_at=database.now(session)))
    tries: list[str] = []

    def fail(_db: object, _store: object, batch_id: str, **_options: Any) -> bool:
        tries.append(batch_id)
        raise errors.RushesError("odd")

    monkeypatch.setattr(results, "write", fail)
    assert writer_of(world).write_finished() == 0
    assert tries == sorted(batches)


def test_a_long_backlog_makes_no_statement_longer(sqlite_world: World) -> None:
    counts: list[int] = []

    def count(_c: object, _r: object, _text: str, values: Any, *_: object) -> None:
        counts.append(len(values))

    event.listen(sqlite_world.db.engine, "before_cursor_execute", count)
    longest = []
    for backlog in (1, 20):
        for _ in range(backlog):
            finished(sqlite_world)
        counts.clear()
        assert writer_of(sqlite_world).write_finished() == backlog
        longest.append(max(counts))
    assert longest[0] == longest[1]


def test_a_store_that_is_set_wrongly_is_told(world: World) -> None:
    finished(world)
    with capture_logs() as logs:
        assert writer_of(world, "ftp://nobody/here").write_finished() == 0
    assert "RUSHES_RESULTS_URL" in logs[0]["error"]


def test_several_writers_write_each_batch_once(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = [finished(world) for _ in range(4)]
    written: list[str] = []
    write = results.write

    def slow(
        db: database.Database, store: storage.ObjectStore, batch_id: str, **options: Any
    ) -> bool:
        written.append(batch_id)
        time.sleep(0.1)
        return write(db, store, batch_id, **options)

    monkeypatch.setattr(results, "write", slow)
    (tmp_path / "results").mkdir()
    writers = [writer_of(world, (tmp_path / "results").as_uri()) for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda writer: writer.write_finished(), writers))
    assert sorted(written) == sorted(batches)
    assert sum(done) == 4


def test_a_batch_whose_writer_died_is_written_when_its_lease_is_over(world: World) -> None:
    batch_id = finished(world)
    taken = world.db.write(result_writer.take, seconds=60)
    assert taken is not None
    assert taken.batch_id == batch_id
    assert writer_of(world).write_finished() == 0
    with world.db.transaction() as session:
        past = database.now(session) - timedelta(seconds=1)
        session.execute(update(Batch).values(results_lease_until=past))
    assert writer_of(world).write_finished() == 1


def test_the_lease_is_renewed_while_the_files_are_written(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(world)
    monkeypatch.setattr(result_writer, "LEASE_SECONDS", 0.6)
    write = results.write
    others: list[int] = []

    def slow(*arguments: Any, **options: Any) -> bool:
        monkeypatch.setattr(results, "write", write)
        time.sleep(1.5)
        others.append(writer_of(world).write_finished())
        return write(*arguments, **options)

    monkeypatch.setattr(results, "write", slow)
    assert writer_of(world).write_finished() == 1
    assert others == [0]


def test_a_lease_outlives_an_outage_of_the_database(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = finished(sqlite_world)
    monkeypatch.setattr(result_writer, "LEASE_SECONDS", 0.6)
    taken = sqlite_world.db.write(result_writer.take, seconds=0.6)
    assert taken is not None
    renew, tried = result_writer.renew, threading.Semaphore(0)

    def away(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(result_writer, "renew", renew)
        tried.release()
        raise database.DatabaseUnavailable(sqlite_world.db.url, "no answer")

    monkeypatch.setattr(result_writer, "renew", away)
    with result_writer._Lease(sqlite_world.db, batch_id, taken.lease_until):
        assert tried.acquire(timeout=20)
        until(lambda: sqlite_world.batch(batch_id).results_lease_until != taken.lease_until)


def test_a_writer_that_has_lost_its_lease_replaces_no_file(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood still while the batch was retried, ended again and was written by another."""
    batch_id = world.submit(1)
    job_id = world.only_job(batch_id).id
    world.fail(world.claimed(job_id), states.FailureKind.INPUT)
    (tmp_path / "results").mkdir()
    first, second = (writer_of(world, (tmp_path / "results").as_uri()) for _ in range(2))
    write_lines = results._write_lines

    def overtaken(*arguments: Any) -> Any:
        monkeypatch.setattr(results, "_write_lines", write_lines)
        found = write_lines(*arguments)
        world.retry(batch_id)
        world.succeed(world.claimed(job_id))
        assert second.write_finished() == 1
        return found

    monkeypatch.setattr(results, "_write_lines", overtaken)
    assert first.write_finished() == 0
    assert world.batch(batch_id).manifest_at is not None
    folder = tmp_path / "results" / "batches" / batch_id
    assert json.loads((folder / "manifest.json").read_text())["counts"]["succeeded"] == 1
    assert len((folder / "output.jsonl").read_text().splitlines()) == 1


def test_a_batch_that_is_reopened_while_it_is_read_keeps_the_files_of_its_end(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`rushes wait ... || rushes retry ...` comes just then."""
    batch_id = world.submit(3)
    for job_id in world.job_ids(batch_id):
        world.fail(world.claimed(job_id), states.FailureKind.INPUT)
    (tmp_path / "results").mkdir()
    writer = writer_of(world, (tmp_path / "results").as_uri())
    assert writer.write_finished() == 1
    folder = tmp_path / "results" / "batches" / batch_id
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    world.retry(batch_id)
    for job_id in world.job_ids(batch_id):
        world.fail(world.claimed(job_id), states.FailureKind.INPUT)
    rows = results._rows

    def reopened(*arguments: Any) -> Any:
        yield from list(rows(*arguments))[:1]
        world.retry(batch_id)

    monkeypatch.setattr(results, "_rows", reopened)
    assert writer.write_finished() == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_lease_that_is_another_writers_by_now_is_not_renewed(world: World) -> None:
    batch_id = finished(world)
    first = world.db.write(result_writer.take, seconds=-1)
    second = world.db.write(result_writer.take, seconds=60)
    assert first is not None
    assert second is not None
    renewed = world.db.write(result_writer.renew, batch_id, held=first.lease_until, seconds=60)
    assert renewed is None
    assert (
        world.db.write(result_writer.renew, batch_id, held=second.lease_until, seconds=60)
        is not None
    )


def test_the_loop_writes_until_it_is_told_to_stop(world: World) -> None:
    writer, stop = writer_of(world), threading.Event()
    thread = threading.Thread(target=writer.run, args=(stop,))
    thread.start()
    try:
        batch_id = finished(world)
        until(lambda: world.batch(batch_id).manifest_at)
    finally:
        stop.set()
        thread.join(20)
    assert not thread.is_alive()


def test_the_loop_marks_the_store_as_the_farms(world: World, tmp_path: Path) -> None:
    folder, stop = tmp_path / "results", threading.Event()
    folder.mkdir()
    thread = threading.Thread(target=writer_of(world, folder.as_uri()).run, args=(stop,))
    thread.start()
    try:
        until(lambda: list(folder.glob("farms/*")))
    finally:
        stop.set()
        thread.join(20)


def test_result_files_are_not_written_to_another_store(world: World, tmp_path: Path) -> None:
    batch_id = finished(world)
    for name in ("farm", "elsewhere"):
        (tmp_path / name).mkdir()
    farm = folder_store.FolderStore(tmp_path / "farm", may_make=False)
    store_mark.Guard(world.db, farm).leave()
    with capture_logs() as logs:
        assert writer_of(world, (tmp_path / "elsewhere").as_uri()).write_finished() == 0
    assert "is not the store of this farm" in logs[0]["error"]
    assert not list((tmp_path / "elsewhere").iterdir())
    assert writer_of(world, (tmp_path / "farm").as_uri()).write_finished() == 1
    assert world.batch(batch_id).manifest_at is not None


def test_the_loop_outlives_the_database() -> None:
    config = settings.load(database_url="postgresql://x@127.0.0.1:1/y", tick_seconds=0.05)
    writer = result_writer.ResultWriter(config, db=database.connect(config))
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool, capture_logs() as logs:
        running = pool.submit(writer.run, stop)
        try:
            until(lambda: len(logs) >= 2 or running.done())
        finally:
            stop.set()
        running.result(20)
    assert {entry["event"] for entry in logs} == {"results.database_unavailable"}
