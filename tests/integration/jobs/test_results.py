"""What a finished batch leaves in the store."""

import hashlib
import json
import threading
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from jobs import folder_store, lifecycle, results, settings, states, storage, stores
from jobs.schema import Batch
from tests.integration.jobs.conftest import World


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


@pytest.fixture
def store(folder: Path) -> storage.ObjectStore:
    return stores.open_store(settings.load(results_url=folder.as_uri()))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def mixed_batch(world: World) -> str:
    rows = [
        {"prompt": "gut 日", "custom_id": "ok", "metadata": {"shot": "1"}},
        {"prompt": "bad", "custom_id": "bad"},
        {"prompt": "stopped"},
        {"prompt": "crashes"},
        {"prompt": "fine", "seed": 5},
    ]
    batch_id = world.submit(rows, name="../../etc/passwd")
    ok, bad, stopped, crashes, fine = world.job_ids(batch_id)
    for job_id in (fine, ok):
        attempt_id = world.claimed(job_id)
        world.rendered(attempt_id)
        video = lifecycle.StoredVideo(
            key=results.video_key(batch_id, job_id, attempt_id), size_bytes=9, sha256="a" * 64
        )
        assert world.db.write(lifecycle.succeed, attempt_id, video=video)
    world.fail(world.claimed(bad), states.FailureKind.INPUT, error="no such thing")
    for _ in range(2):
        world.expire(world.claimed(crashes))
        world.end_lost()
    world.cancel_job(stopped)
    return batch_id


def test_each_job_is_in_one_of_two_files_in_the_order_of_the_prompts(
    world: World, store: storage.ObjectStore, folder: Path
) -> None:
    batch_id = mixed_batch(world)
    assert results.write(world.db, store, batch_id) is True
    top = folder / "batches" / batch_id
    done, failed = lines(top / "output.jsonl"), lines(top / "errors.jsonl")
    assert [entry["position"] for entry in done] == [0, 4]
    assert [entry["position"] for entry in failed] == [1, 2, 3]
    job = world.jobs(batch_id)[0]
    assert done[0] == {
        "custom_id": "ok",
        "job_id": job.id,
        "position": 0,
        "state": "succeeded",
        "prompt": "gut 日",
        "seed": job.seed,
        "metadata": {"shot": "1"},
        "video": {
            "key": f"batches/{batch_id}/jobs/{job.id}/{job.attempt_id}/video.mp4",
            "url": (top / f"jobs/{job.id}/{job.attempt_id}/video.mp4").as_uri(),
            "bytes": 9,
            "sha256": "a" * 64,
        },
        "seconds": {"denoise": 1.5},
        "worker": "gpu0@here",
    }
    assert failed[0]["error"] == {
        "kind": "input",
        "message": "no such thing",
        "quarantined": False,
    }
    assert [entry["worker"] for entry in failed] == ["gpu0@here", None, "gpu0@here"]
    for entry, place in zip(failed, (1, 2, 3), strict=True):
        ended = world.jobs(batch_id)[place].finished_at
        assert ended is not None
        assert entry["finished_at"] == ended.isoformat()
    assert failed[1]["error"] is None
    assert failed[1]["state"] == "cancelled"
    assert failed[2]["error"]["quarantined"] is True


def test_the_manifest_counts_and_seals_the_other_files(
    world: World, store: storage.ObjectStore, folder: Path
) -> None:
    batch_id = mixed_batch(world)
    results.write(world.db, store, batch_id)
    top = folder / "batches" / batch_id
    manifest = json.loads((top / "manifest.json").read_text())
    assert manifest["state"] == "partially_failed"
    assert manifest["counts"] == {"total": 5, "succeeded": 2, "failed": 2, "cancelled": 1}
    assert manifest["name"] == "../../etc/passwd"
    for name, count in (("output.jsonl", 2), ("errors.jsonl", 3)):
        data = (top / name).read_bytes()
        assert manifest["files"][name] == {
            "key": f"batches/{batch_id}/{name}",
            "lines": count,
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    assert world.batch(batch_id).manifest_at is not None


class Recording(folder_store.FolderStore):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.keys: list[str] = []
        self.during_manifest = lambda: None

    def put_file(self, path: Path, key: str, *, content_type: str) -> storage.StoredObject:
        self.keys.append(key)
        return super().put_file(path, key, content_type=content_type)

    def put_bytes(self, data: bytes, key: str, *, content_type: str) -> storage.StoredObject:
        self.keys.append(key)
        self.during_manifest()
        return super().put_bytes(data, key, content_type=content_type)


def test_the_manifest_comes_last(world: World, folder: Path) -> None:
    batch_id = mixed_batch(world)
    store = Recording(folder)
    results.write(world.db, store, batch_id)
    assert [key.rpartition("/")[2] for key in store.keys] == [
        "output.jsonl",
        "errors.jsonl",
        "manifest.json",
    ]


def test_who_has_lost_the_batch_after_the_other_files_writes_no_manifest(
    world: World, store: storage.ObjectStore, folder: Path
) -> None:
    batch_id = mixed_batch(world)
    answers = iter([True, True, False])
    assert results.write(world.db, store, batch_id, may_put=lambda: next(answers)) is False
    written = {path.name for path in (folder / "batches" / batch_id).glob("*.json*")}
    assert written == {"output.jsonl", "errors.jsonl"}
    assert world.batch(batch_id).manifest_at is None


def test_keys_hold_no_text_of_a_user(world: World, folder: Path) -> None:
    batch_id = mixed_batch(world)
    store = Recording(folder)
    results.write(world.db, store, batch_id)
    keys = [*store.keys, results.video_key(batch_id, 1, 2), results.sidecar_key(batch_id, 1, 2)]
    for key in keys:
        assert key.startswith(f"batches/{batch_id}/")
        assert set(key) <= set("abcdefghijklmnopqrstuvwxyz0123456789-/._")
        assert "passwd" not in key


def test_two_attempts_never_share_a_key() -> None:
    assert results.video_key("b", 1, 2) != results.video_key("b", 1, 3)


def test_an_open_batch_has_no_result_files(
    world: World, store: storage.ObjectStore, folder: Path
) -> None:
    assert results.write(world.db, store, world.submit()) is False
    assert not list(folder.iterdir())


def test_a_batch_longer_than_a_page_is_written_whole(
    world: World, store: storage.ObjectStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "ROWS_AT_ONCE", 4)
    for number in (3, 4, 5, 12):
        batch_id = world.submit(number)
        world.cancel_batch(batch_id)
        results.write(world.db, store, batch_id)
        found = lines(folder / "batches" / batch_id / "errors.jsonl")
        assert [entry["position"] for entry in found] == list(range(number))


def test_files_of_a_batch_that_was_reopened_while_they_were_written_do_not_count(
    world: World, folder: Path
) -> None:
    batch_id = mixed_batch(world)
    store = Recording(folder)
    store.during_manifest = lambda: world.retry(batch_id)
    assert results.write(world.db, store, batch_id) is False
    assert world.batch(batch_id).manifest_at is None


def test_a_slow_writer_that_replaces_newer_files_has_them_written_again(
    world: World, folder: Path
) -> None:
    """Its batch was retried, finished and written by another dispatcher in the meantime."""
    batch_id = world.submit()
    job = world.only_job(batch_id)
    world.fail(world.claimed(job.id), states.FailureKind.INPUT)
    quick, slow = Recording(folder), Recording(folder)

    def overtake() -> None:
        world.retry(batch_id)
        world.succeed(world.claimed(job.id))
        assert results.write(world.db, quick, batch_id)

    slow.during_manifest = overtake
    assert results.write(world.db, slow, batch_id) is False
    assert world.batch(batch_id).manifest_at is None
    assert results.write(world.db, quick, batch_id) is True
    manifest = json.loads((folder / "batches" / batch_id / "manifest.json").read_text())
    assert manifest["counts"]["succeeded"] == 1


def test_writing_holds_no_transaction_while_the_store_is_slow(world: World, folder: Path) -> None:
    batch_id = mixed_batch(world)
    store = Recording(folder)

    def others_write() -> None:
        thread = threading.Thread(target=world.submit)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()

    store.during_manifest = others_write
    assert results.write(world.db, store, batch_id)


def test_result_files_in_s3_are_the_same_as_in_a_folder(
    sqlite_world: World, s3: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    store = stores.open_store(settings.load())
    batch_id = mixed_batch(sqlite_world)
    assert results.write(sqlite_world.db, store, batch_id)
    output = store.read_bytes(results.batch_key(batch_id, "output.jsonl"))
    assert [json.loads(line)["position"] for line in output.splitlines()] == [0, 4]
    manifest = json.loads(store.read_bytes(results.batch_key(batch_id, "manifest.json")))
    assert manifest["files"]["output.jsonl"]["sha256"] == hashlib.sha256(output).hexdigest()


def test_a_finished_batch_that_was_written_is_not_touched(
    world: World, store: storage.ObjectStore
) -> None:
    batch_id = mixed_batch(world)
    finished_at = world.batch(batch_id).finished_at
    results.write(world.db, store, batch_id)
    assert world.batch(batch_id).finished_at == finished_at
    with world.db.transaction() as session:
        session.execute(update(Batch).values(manifest_at=None))
    assert results.write(world.db, store, batch_id) is True
