"""A folder per attempt: finished at one moment, for one publisher at a time."""

import errno
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from worker import errors, scratch

FACTS = {
    "batch_id": "260101-abcd1234",
    "job_id": 3,
    "video": {"sha256": "0" * 64},
    "seconds": {"denoise": 1.5},
    "peak_memory_bytes": None,
    "prompt": "Zoë",
}


@pytest.fixture
def folder(tmp_path):
    made = scratch.AttemptFolder(
        root=tmp_path / "scratch", batch_id="260101-abcd1234", attempt_id=17
    )
    made.make()
    return made


def test_the_name_tells_batch_and_attempt(folder):
    assert folder.path.name == "260101-abcd1234.17"
    assert scratch.folders(folder.root) == [folder]


def test_a_sidecar_makes_a_folder_finished(folder):
    folder.video.write_bytes(b"video")
    assert not folder.is_finished
    folder.finish(FACTS)
    assert folder.is_finished
    assert json.loads(folder.sidecar.read_text("utf-8")) == FACTS
    facts = folder.facts()
    assert (facts.batch_id, facts.job_id, facts.video.sha256) == (FACTS["batch_id"], 3, "0" * 64)
    assert (facts.seconds, facts.peak_memory_bytes) == ({"denoise": 1.5}, None)


def test_a_crash_while_the_sidecar_is_written_leaves_an_unfinished_folder(folder, monkeypatch):
    folder.video.write_bytes(b"video")

    def power_cut(_handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(KeyboardInterrupt):
        folder.finish(FACTS)
    assert not folder.is_finished
    with folder.locked() as is_ours:
        assert not is_ours


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff\xfe",
        b'{"batch_id": "b"}',
        json.dumps(FACTS | {"video": 1}).encode(),
    ],
)
def test_a_sidecar_that_is_no_sidecar_is_the_disks_failure(folder, content):
    folder.sidecar.write_bytes(content)
    with pytest.raises(errors.DiskUnusable, match=r"sidecar\.json"):
        folder.facts()


def test_only_one_process_holds_a_folder(folder):
    folder.finish(FACTS)
    script = textwrap.dedent("""
        import sys
        from pathlib import Path
        from worker import scratch
        folder, = scratch.folders(Path(sys.argv[1]))
        with folder.locked() as is_ours:
            print(is_ours)
    """)

    def of_another_process():
        done = subprocess.run(
            [sys.executable, "-c", script, folder.root], check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    with folder.locked() as is_ours:
        assert is_ours
        assert of_another_process() == "False"
    assert of_another_process() == "True"


def test_only_one_thread_holds_a_folder(folder):
    folder.finish(FACTS)
    with folder.locked() as first, folder.locked() as second:
        assert (first, second) == (True, False)
    with folder.locked() as again:
        assert again


def test_what_lies_on_a_disk_that_takes_no_more_is_published(folder, monkeypatch):
    """As ext4 is mounted anew after an error of the disk: all of it can still be read."""
    folder.finish(FACTS)
    opened = Path.open

    def read_only(path, mode="r", *rest):
        if set(mode) & {"w", "a", "x", "+"}:
            raise OSError(errno.EROFS, "Read-only file system")
        return opened(path, mode, *rest)

    monkeypatch.setattr(Path, "open", read_only)
    with folder.locked() as first, folder.locked() as second:
        assert (first, second) == (True, False)


def test_a_disk_that_fails_is_told(folder, monkeypatch):
    folder.finish(FACTS)

    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "open", broken)
    with capture_logs() as told, folder.locked() as is_ours:
        assert not is_ours
    assert [each["event"] for each in told] == ["scratch.not_locked"]


def test_a_lock_is_given_back_when_its_holder_raises(folder):
    folder.finish(FACTS)
    with pytest.raises(ValueError, match="mine"), folder.locked():
        raise ValueError("mine")
    with folder.locked() as is_ours:
        assert is_ours


def test_a_folder_that_is_gone_or_unfinished_is_nobodys(folder):
    with folder.locked() as is_ours:
        assert not is_ours
    folder.remove()
    with folder.locked() as is_ours:
        assert not is_ours


def test_a_folder_that_its_holder_has_removed_meanwhile_is_nobodys(folder, monkeypatch):
    folder.finish(FACTS)
    monkeypatch.setattr("fcntl.flock", lambda *_: folder.remove())
    with folder.locked() as is_ours:
        assert not is_ours


def test_a_lock_writes_nothing_to_the_disk(folder):
    """A full disk must not keep a finished video from its upload."""
    folder.finish(FACTS)
    before = sorted(path.name for path in folder.path.iterdir())
    with folder.locked():
        assert sorted(path.name for path in folder.path.iterdir()) == before


def test_folders_come_oldest_first_and_foreign_files_are_ignored(tmp_path):
    for name in ("b.10", "b.9", "a-b.2", "b.x", "12", ".7", "b.²", "b."):
        (tmp_path / name).mkdir()
    (tmp_path / "note.txt").write_text("mine")
    found = [(folder.batch_id, folder.attempt_id) for folder in scratch.folders(tmp_path)]
    assert found == [("a-b", 2), ("b", 9), ("b", 10)]


def test_no_scratch_folder_is_an_empty_one(tmp_path):
    assert scratch.folders(tmp_path / "none") == []


def test_a_removed_folder_is_gone_and_may_be_removed_again(folder):
    folder.finish(FACTS)
    folder.remove()
    folder.remove()
    assert not folder.path.exists()


def test_a_scratch_that_is_a_file_is_the_disks_failure(tmp_path):
    (tmp_path / "scratch").write_text("")
    blocked = scratch.AttemptFolder(root=tmp_path / "scratch", batch_id="b", attempt_id=1)
    with pytest.raises(errors.DiskUnusable, match="scratch folder"):
        blocked.make()


def test_a_folder_that_vanished_is_the_disks_failure(folder):
    folder.remove()
    with pytest.raises(errors.DiskUnusable, match="scratch folder"):
        folder.finish(FACTS)
    with pytest.raises(errors.DiskUnusable, match="scratch folder"):
        scratch.sha256(folder.video)


def test_a_full_disk_while_the_sidecar_is_written_is_the_disks_failure(folder):
    (folder.path / "sidecar.json.part").symlink_to("/dev/full")
    with pytest.raises(errors.DiskUnusable, match="No space left"):
        folder.finish(FACTS)
    assert not folder.is_finished
