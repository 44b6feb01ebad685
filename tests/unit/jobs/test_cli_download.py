"""Downloads: harmless names, verified content, resumed where they stopped."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from jobs import (
    cli,
    database,
    download,
    errors,
    folder_store,
    lifecycle,
    queries,
    requests,
    results,
    settings,
    storage,
    stores,
)
from jobs.cli import exits
from jobs.schema import Batch

pytestmark = pytest.mark.usefixtures("no_broker")
CONTENT = b"not really a video"


def rushes(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, [*arguments])


@pytest.fixture
def store() -> storage.ObjectStore:
    return stores.open_store(settings.load())


def finished_batch(
    db: database.Database, store: storage.ObjectStore, *custom_ids: str | None
) -> str:
    lines = [
        json.dumps({"prompt": "x"} | ({} if name is None else {"custom_id": name}))
        for name in custom_ids
    ]
    Path("p.jsonl").write_text("\n".join(lines))
    batch_id = rushes("submit", "p.jsonl", "--preset", "tiny", "-q").stdout.strip()
    for position in range(len(custom_ids)):
        finish(db, store, batch_id, position)
    results.write(db, store, batch_id)
    return batch_id


def finish(db: database.Database, store: storage.ObjectStore, batch_id: str, position: int) -> None:
    with db.reading() as session:
        job = queries.find_job(session, f"{batch_id}/{position}")
        job = queries.jobs(session, batch_id, after=position - 1, limit=1)[0]
    claim = db.write(lifecycle.claim, job.id, worker="w", lease_seconds=60)
    assert claim is not None
    key = results.video_key(batch_id, job.id, claim.attempt_id)
    sidecar = results.sidecar_key(batch_id, job.id, claim.attempt_id)
    stored = store.put_bytes(CONTENT, key, content_type="video/mp4")
    told = json.dumps({"video": {"sha256": stored.sha256}}).encode()
    store.put_bytes(told, sidecar, content_type="application/json")
    video = lifecycle.StoredVideo(
        key=stored.key, size_bytes=stored.size_bytes, sha256=stored.sha256
    )
    db.write(lifecycle.succeed, claim.attempt_id, video=video)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("[!.]*") if path.is_file()}


def test_videos_and_result_files_arrive(
    db: database.Database, store: storage.ObjectStore, tmp_path: Path
) -> None:
    finished_batch(db, store, "cat", None)
    result = rushes("download", "latest", str(tmp_path / "out"), "--include", "sidecar")
    assert result.exit_code == 0, result.output
    assert files(tmp_path / "out") == {
        *("cat.mp4", "cat.json", "00001.mp4", "00001.json"),
        *download.RESULT_FILES,
    }
    assert (tmp_path / "out" / "cat.mp4").read_bytes() == CONTENT


def test_jobs_that_have_no_video_are_counted(db: database.Database, tmp_path: Path) -> None:
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    assert rushes("submit", "p.jsonl", "--preset", "tiny", "-q").exit_code == 0
    assert rushes("cancel", "latest").exit_code == 0
    result = rushes("download", "latest", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    assert "no video of 2 cancelled jobs" in result.stderr.splitlines()


def test_the_local_output_file_names_the_videos_and_the_local_manifest_seals_it(
    db: database.Database, store: storage.ObjectStore, tmp_path: Path
) -> None:
    batch_id = finished_batch(db, store, "cat/1", None, "CAT_1")
    folder = tmp_path / "out"
    assert rushes("download", "latest", str(folder)).exit_code == 0
    output = (folder / "output.jsonl").read_bytes()
    entries = [json.loads(line) for line in output.splitlines()]
    named = [entry["video"].pop("file") for entry in entries]
    assert named == ["cat_1.mp4", "00001.mp4", "CAT_1-00002.mp4"]
    stored = store.read_bytes(results.batch_key(batch_id, "output.jsonl"))
    assert entries == [json.loads(line) for line in stored.splitlines()]
    sealed = json.loads((folder / "manifest.json").read_text())["files"]["output.jsonl"]
    assert sealed["bytes"] == len(output)
    assert sealed["sha256"] == hashlib.sha256(output).hexdigest()


def test_watching_fetches_videos_as_they_come_and_ends_with_the_result_files(
    db: database.Database,
    store: storage.ObjectStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also through a while in which the store is away; a second run finds all there."""
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    batch_id = rushes("submit", "p.jsonl", "--preset", "tiny", "-q").stdout.strip()
    folder = tmp_path / "out"
    seen: list[set[str]] = []

    def meanwhile(_seconds: float) -> None:
        seen.append(files(folder))
        if len(seen) == 2:
            finish(db, store, batch_id, 1)
            monkeypatch.setattr(store, "download", store_is_away)
        elif len(seen) == 3:
            monkeypatch.undo()
            monkeypatch.setattr(download.time, "sleep", meanwhile)
        elif len(seen) == 4:
            finish(db, store, batch_id, 0)
        elif len(seen) == 5:
            assert results.write(db, store, batch_id)

    def store_is_away(key: str, path: Path) -> None:
        raise storage.StorageUnavailable(store.address(key), "away")

    monkeypatch.setattr(download, "RETRY_SECONDS", 0.001)
    monkeypatch.setattr(download.time, "sleep", meanwhile)
    outcomes = list(download.follow(db, store, batch_id, folder, sidecars=False))
    videos = {"00000.mp4", "00001.mp4"}
    assert seen == [set(), set(), set(), {"00001.mp4"}, videos]
    assert [outcome.file for outcome in outcomes] == [
        *("00001.mp4", "00000.mp4"),
        *download.RESULT_FILES,
    ]
    again = list(download.follow(db, store, batch_id, folder, sidecars=False))
    assert [outcome.status for outcome in again[:2]] == [download.Status.THERE] * 2


def test_watching_a_damaged_video_tells_it_once_at_the_end(
    db: database.Database, store: storage.ObjectStore, tmp_path: Path
) -> None:
    batch_id = finished_batch(db, store, "a", "b")
    with db.reading() as session:
        attempt = queries.winning_attempt(session, queries.find_job(session, f"{batch_id}/a"))
    assert attempt is not None
    assert attempt.video_key is not None
    store.put_bytes(b"another", attempt.video_key, content_type="video/mp4")
    result = rushes("download", batch_id, str(tmp_path / "out"), "--watch")
    assert result.exit_code == exits.ERROR
    assert result.stderr.count("a.mp4") == 1
    assert files(tmp_path / "out") == {"b.mp4", *download.RESULT_FILES}


def test_the_folder_is_named_like_the_batch_by_default(
    db: database.Database, store: storage.ObjectStore
) -> None:
    batch_id = finished_batch(db, store, "cat")
    assert rushes("download", "latest").exit_code == 0
    assert Path(batch_id, "cat.mp4").exists()


def test_names_from_outside_stay_inside(
    db: database.Database, store: storage.ObjectStore, tmp_path: Path
) -> None:
    names = ["../../x", "a/b", "CON", "/etc/passwd", "..", "manifest", "A", "a", "a_b", "-rf", " "]
    names[-1] = "x" * 500
    finished_batch(db, store, *names)
    home = tmp_path / "deep" / "er"
    result = rushes("download", "latest", str(home), "--include", "sidecar", "-o", "json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["downloaded"] == len(names)
    videos = [entry["file"] for entry in told["files"] if entry["job_id"]]
    assert len({name.casefold() for name in videos}) == len(names)
    assert files(tmp_path / "deep") == {f"er/{name}" for name in files(home)}
    assert all("/" not in name and not name.startswith((".", "-")) for name in files(home))
    assert "con.mp4" not in {name.casefold() for name in videos}
    assert json.loads((home / "manifest.json").read_text())["batch_id"]


def test_a_second_download_fetches_only_what_is_missing_or_damaged(
    db: database.Database, store: storage.ObjectStore
) -> None:
    finished_batch(db, store, "whole", "gone", "short", "damaged")
    rushes("download", "latest", "out")
    Path("out/gone.mp4").unlink()
    Path("out/short.mp4").write_bytes(CONTENT[:5])
    Path("out/damaged.mp4").write_bytes(b"N" + CONTENT[1:])
    told = json.loads(rushes("download", "latest", "out", "-o", "json").stdout)
    assert (told["downloaded"], told["already_there"]) == (3, 1)
    assert {path.read_bytes() for path in Path("out").glob("*.mp4")} == {CONTENT}


def test_names_do_not_change_when_more_jobs_finish(
    db: database.Database, store: storage.ObjectStore
) -> None:
    Path("p.jsonl").write_text(
        '{"prompt": "x", "custom_id": "a/b"}\n{"prompt": "x", "custom_id": "a_b"}'
    )
    batch_id = rushes("submit", "p.jsonl", "--preset", "tiny", "-q").stdout.strip()
    finish(db, store, batch_id, 1)
    result = rushes("download", "latest", "out")
    assert "1 job not finished yet" in result.stderr
    assert files(Path("out")) == {"a_b-00001.mp4"}
    finish(db, store, batch_id, 0)
    rushes("download", "latest", "out")
    assert files(Path("out")) == {"a_b-00001.mp4", "a_b.mp4"}


def test_a_damaged_object_is_refused_and_the_others_arrive(
    db: database.Database, store: storage.ObjectStore
) -> None:
    batch_id = finished_batch(db, store, "good", "bad", "lost")
    key = [key for key in store.list(f"batches/{batch_id}/jobs/") if key.endswith("video.mp4")]
    store.put_bytes(CONTENT[::-1], sorted(key)[1], content_type="video/mp4")
    store.delete(sorted(key)[2])
    result = rushes("download", "latest", "out")
    assert result.exit_code == exits.ERROR
    assert "bad.mp4: " in result.stderr
    assert "lost.mp4: " in result.stderr
    assert {name for name in files(Path("out")) if "mp4" in name} == {"good.mp4"}


def delete_video(db: database.Database, store: storage.ObjectStore, reference: str) -> None:
    with db.transaction() as session:
        job = queries.find_job(session, reference)
        winner = queries.winning_attempt(session, job)
        assert winner is not None
        assert winner.video_key is not None
        store.delete(winner.video_key)
        store.delete(results.sidecar_key(job.batch_id, job.id, winner.id))
        row = requests.add(
            session,
            api=requests.VIDEOS,
            owner=session.get_one(Batch, job.batch_id).owner,
            name=requests.video_name(job.id),
            batch_id=job.batch_id,
            body={},
        )
        row.deleted_at = database.now(session)


def named_files(folder: Path) -> list[str | None]:
    lines = (folder / "output.jsonl").read_text().splitlines()
    return [json.loads(line)["video"].get("file") for line in lines]


@pytest.mark.parametrize("watching", [(), ("--watch",)])
def test_a_deleted_video_is_told_and_no_failure(
    db: database.Database, store: storage.ObjectStore, watching: tuple[str, ...]
) -> None:
    batch_id = finished_batch(db, store, "kept", "gone")
    delete_video(db, store, f"{batch_id}/gone")
    result = rushes("download", "latest", "out", "--include", "sidecar", *watching)
    assert (result.exit_code, result.stderr) == (exits.OK, "")
    assert result.stdout.endswith("1 deleted\n")
    assert files(Path("out")) == {"kept.mp4", "kept.json", *download.RESULT_FILES}
    assert named_files(Path("out")) == ["kept.mp4", None]
    told = json.loads(rushes("download", "latest", "out", "-o", "json", *watching).stdout)
    assert (told["already_there"], told["deleted"], told["failed"]) == (1, 1, 0)
    assert [entry["status"] for entry in told["files"][:2]] == ["there", "deleted"]


def test_a_video_that_was_fetched_before_it_was_deleted_stays(
    db: database.Database, store: storage.ObjectStore
) -> None:
    batch_id = finished_batch(db, store, "cat")
    rushes("download", "latest", "out")
    delete_video(db, store, f"{batch_id}/cat")
    result = rushes("download", "latest", "out", "--include", "sidecar")
    assert (result.exit_code, result.stderr) == (exits.OK, "")
    assert "1 already there" in result.stdout
    assert named_files(Path("out")) == ["cat.mp4"]


def test_a_video_that_was_made_again_after_it_was_deleted_is_fetched(
    db: database.Database, store: storage.ObjectStore
) -> None:
    batch_id = finished_batch(db, store, "cat")
    delete_video(db, store, f"{batch_id}/cat")
    with db.transaction() as session:
        job = queries.find_job(session, f"{batch_id}/cat")
        winner = queries.winning_attempt(session, job)
        assert winner is not None
        assert winner.video_key is not None
        store.put_bytes(CONTENT, winner.video_key, content_type="video/mp4")
        job.finished_at = database.now(session) + timedelta(seconds=1)
    assert "1 video (" in rushes("download", "latest", "out").stdout
    assert named_files(Path("out")) == ["cat.mp4"]


def test_a_store_that_stays_away_ends_it_and_says_so(
    db: database.Database, store: storage.ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished_batch(db, store, "a", "b", "c")
    monkeypatch.setenv("RUSHES_RESULTS_URL", "s3://bucket")
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.01)
    result = rushes("download", "latest", "out")
    assert result.exit_code == exits.ERROR
    *tried, last = result.stderr.splitlines()
    assert tried
    assert all("download.again" in line for line in tried)
    assert "does not answer" in last
    assert "the same command fetches the rest" in last


def test_who_ends_it_does_not_wait_for_what_waits(
    db: database.Database, store: storage.ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = finished_batch(db, store, *"abc")
    wanted = list(download.items(db, batch_id))

    def away(store: folder_store.FolderStore, key: str, _: Path) -> None:
        raise storage.StorageUnavailable(key, "SlowDown")

    monkeypatch.setattr(folder_store.FolderStore, "download", away)
    monkeypatch.setattr(download, "RETRY_SECONDS", 600.0)
    monkeypatch.setattr(download, "LONGEST_RETRY_SECONDS", 600.0)
    (Path("out") / "a.mp4").parent.mkdir()
    (Path("out") / "a.mp4").write_bytes(store.read_bytes(wanted[0].key))
    outcomes = download.fetch(store, iter(wanted), Path("out"), sidecars=False)
    assert next(outcomes).status is download.Status.THERE
    outcomes.close()  # type: ignore[attr-defined]  # as by Ctrl-C


@pytest.mark.parametrize("kind", [storage.BrokenOff, storage.StorageUnavailable])
def test_one_connection_that_breaks_does_not_end_it(
    db: database.Database,
    store: storage.ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[storage.StorageError],
) -> None:
    batch_id = finished_batch(db, store, "a")
    whole, tried = folder_store.FolderStore.download, set[str]()

    def download_once_broken(store: folder_store.FolderStore, key: str, path: Path) -> None:
        if key not in tried:
            tried.add(key)
            raise kind(key, "70 of 200 bytes came")
        whole(store, key, path)

    monkeypatch.setattr(folder_store.FolderStore, "download", download_once_broken)
    monkeypatch.setattr(download, "RETRY_SECONDS", 0.01)
    assert rushes("download", batch_id, "out").exit_code == exits.OK
    assert {"a.mp4", *download.RESULT_FILES} <= files(Path("out"))


@given(st.text(max_size=600))
def test_a_safe_name_is_one_harmless_component(text: str) -> None:
    name = download.safe_name(text)
    assert len(name.encode()) <= download.MAX_NAME_BYTES + 1
    assert not set(name) & set('/\\:*?"<>|\0\n')
    assert not name.startswith((".", "-"))
    assert name == name.rstrip(" .")
    assert name.split(".")[0].upper() not in {"CON", "NUL", "COM1", "LPT9"}


@given(st.lists(st.one_of(st.none(), st.text(max_size=5)), max_size=30))
def test_names_differ_on_every_file_system(custom_ids: list[str | None]) -> None:
    names = download.Names()
    made = [names.of(position, custom_id) for position, custom_id in enumerate(custom_ids)]
    assert len({name.casefold() for name in made}) == len(custom_ids)
    assert all(made)


def test_a_folder_keeps_to_one_batch(tmp_path: Path) -> None:
    """Names repeat between batches: the second would overwrite the first."""
    folder = tmp_path / "videos"
    folder.mkdir()
    (folder / download.OWNER_FILE).write_text("260101-zzzzzzzz\n")
    with pytest.raises(errors.InvalidInput, match="holds batch 260101-zzzzzzzz"):
        take(folder, "260101-aaaaaaaa")
    take(folder, "260101-zzzzzzzz")


def take(folder: Path, batch_id: str) -> None:
    with download.taken(database.connect(settings.load()), batch_id, folder, sidecars=False):
        pass


def test_two_downloads_do_not_work_in_one_folder(
    db: database.Database, store: storage.ObjectStore
) -> None:
    """As `--watch` in a terminal and the same command by cron; the second is told at once."""
    batch_id = finished_batch(db, store, "a")
    with download.taken(db, batch_id, Path("out"), sidecars=False):
        result = rushes("download", batch_id, "out")
        assert result.exit_code == exits.ERROR
        assert "out: another download works in this folder" in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert rushes("download", batch_id, "other").exit_code == exits.OK
    assert files(Path("out")) == set()
    assert rushes("download", batch_id, "out").exit_code == exits.OK


def test_a_folder_without_locks_is_used_all_the_same(
    db: database.Database, store: storage.ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(download.fcntl, "flock", refused)
    batch_id = finished_batch(db, store, "a")
    assert rushes("download", batch_id, "out").exit_code == exits.OK


@pytest.mark.parametrize("name", download.RESULT_FILES)
def test_a_file_of_ones_own_is_not_replaced_by_one_of_the_batch(
    db: database.Database, store: storage.ObjectStore, name: str
) -> None:
    batch_id = finished_batch(db, store, "a")
    Path("site").mkdir()
    Path("site", name).write_text("{}")
    result = rushes("download", batch_id, "site")
    assert result.exit_code == exits.USAGE
    assert f"holds a {name} of no batch" in result.stderr
    assert [path.read_text() for path in Path("site").iterdir()] == ["{}"]


@pytest.mark.parametrize("name", ["cat.mp4", "dog.mp4", "cat.json"])
def test_a_video_of_ones_own_is_not_replaced_either(
    db: database.Database, store: storage.ObjectStore, name: str
) -> None:
    """As those of `rushes render`; nor later, by one whose job is not finished yet."""
    Path("p.jsonl").write_text(
        '{"prompt": "x", "custom_id": "cat"}\n{"prompt": "x", "custom_id": "dog"}\n'
    )
    batch_id = rushes("submit", "p.jsonl", "--preset", "tiny", "-q").stdout.strip()
    finish(db, store, batch_id, 0)
    Path("mine").mkdir()
    Path("mine", name).write_text("mine")
    result = rushes("download", batch_id, "mine", "--include", "sidecar")
    assert result.exit_code == exits.USAGE
    assert f"mine: holds a {name} of no batch, which would be replaced" in result.stderr
    assert [path.read_text() for path in Path("mine").iterdir()] == ["mine"]
    assert "remove it, give another folder" in result.stderr
    Path("mine", name).rename("mine/bird.mp4")
    assert rushes("download", batch_id, "mine").exit_code == exits.OK
    assert files(Path("mine")) == {"bird.mp4", "cat.mp4"}


def test_a_folder_in_the_place_of_a_sidecar_is_told_before_anything_is_fetched(
    db: database.Database, store: storage.ObjectStore
) -> None:
    batch_id = finished_batch(db, store, "a", "b")
    Path("mine/b.json").mkdir(parents=True)
    result = rushes("download", batch_id, "mine", "--include", "sidecar")
    assert result.exit_code == exits.USAGE
    assert "mine: holds a b.json of no batch" in result.stderr


def test_the_same_videos_in_a_folder_without_mark_are_no_others(
    db: database.Database, store: storage.ObjectStore
) -> None:
    batch_id = finished_batch(db, store, "a", "b")
    Path("copy").mkdir()
    Path("copy/a.mp4").write_bytes(CONTENT)
    told = json.loads(rushes("download", batch_id, "copy", "-o", "json").stdout)
    assert (told["downloaded"], told["already_there"]) == (1, 1)


def test_a_folder_that_was_copied_without_its_mark_goes_on(
    db: database.Database, store: storage.ObjectStore
) -> None:
    batch_id = finished_batch(db, store, "a")
    assert rushes("download", batch_id, "out").exit_code == exits.OK
    Path("out", download.OWNER_FILE).unlink()
    other = finished_batch(db, store, "a")
    assert f"holds batch {batch_id}" in rushes("download", other, "out").stderr
    assert rushes("download", batch_id, "out").exit_code == exits.OK
    assert Path("out", download.OWNER_FILE).read_text().strip() == batch_id


def test_a_disk_that_is_full_at_the_seal_leaves_a_whole_manifest(
    db: database.Database, store: storage.ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = finished_batch(db, store, "a")
    write_text = Path.write_text

    def full(path: Path, text: str, *more: str) -> int:
        if "manifest" not in path.name:
            return write_text(path, text, *more)
        write_text(path, text[:20])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert "No space left" in rushes("download", batch_id, "out").stderr
    assert json.loads(Path("out/manifest.json").read_text())["batch_id"] == batch_id
    assert not list(Path("out").glob(".manifest*"))


@pytest.mark.parametrize("text", ["", "null", "{}", '{"video": {"sha256": "0"}}'])
def test_a_sidecar_that_is_not_of_its_video_is_fetched_again(
    db: database.Database, store: storage.ObjectStore, text: str
) -> None:
    batch_id = finished_batch(db, store, "a")
    fetch = ("download", batch_id, "out", "--include", "sidecar")
    rushes(*fetch)
    whole = Path("out/a.json").read_text()
    Path("out/a.json").write_text(text)
    assert rushes(*fetch).exit_code == exits.OK
    assert Path("out/a.json").read_text() == whole


def test_an_empty_folder_name_is_not_the_current_folder(
    db: database.Database, store: storage.ObjectStore
) -> None:
    batch_id = finished_batch(db, store, "a")
    before = files(Path())
    result = rushes("download", batch_id, "")
    assert (result.exit_code, "is empty" in result.stderr) == (exits.USAGE, True)
    assert files(Path()) == before


def test_a_name_that_the_locale_cannot_write_becomes_the_position(
    db: database.Database, store: storage.ObjectStore
) -> None:
    batch_id = finished_batch(db, store, "cat", "猫")
    command = [sys.executable, "-m", "jobs", "download", batch_id, "out"]
    narrow = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(
        command, env={**os.environ, **narrow}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (exits.OK, "")
    assert {"cat.mp4", "00001.mp4"} <= files(Path("out"))


def test_a_folder_that_a_full_disk_left_unmarked_can_be_taken_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "videos"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(download.DiskUnusable, match="when there is room"):
            take(folder, "260101-aaaaaaaa")
    assert list(folder.iterdir()) == []
    (folder / download.OWNER_FILE).write_text("")  # as older versions left it
    take(folder, "260101-aaaaaaaa")
    assert (folder / download.OWNER_FILE).read_text() == "260101-aaaaaaaa\n"


def test_a_folder_that_cannot_be_is_refused(
    db: database.Database, store: storage.ObjectStore, tmp_path: Path
) -> None:
    batch_id = finished_batch(db, store, "a")
    Path("taken").write_text("x")
    for folder in ("taken", "taken/below"):
        result = rushes("download", batch_id, folder)
        assert (result.exit_code, result.stderr.count(f"{folder} ")) == (2, 1), result.stderr


def test_a_full_disk_ends_it_with_what_is_there(
    db: database.Database, store: storage.ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch_id = finished_batch(db, store, "a")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "_fetch_video", full)
    result = rushes("download", batch_id, "here")
    assert result.exit_code == exits.ERROR
    assert "here: No space left on device; what is there is whole" in result.stderr
