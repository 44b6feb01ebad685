"""What a worker needs of this machine, but for its devices."""

import pytest

from jobs import semaphores
from jobs.doctor import machine
from tests.told import told_by


def test_ffmpeg_is_there() -> None:
    assert told_by(machine.check_ffmpeg)["ffmpeg"].status == "ok"


def test_a_machine_whose_shared_memory_is_full_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told_by(machine.check_shared_memory)["shared memory"].status == "ok"
    monkeypatch.setattr(semaphores, "refusal", lambda: "no semaphore can be made: [Errno 28] ...")
    found = told_by(machine.check_shared_memory)["shared memory"]
    assert (found.status, "--shm-size" in found.advice) == ("fail", True)
