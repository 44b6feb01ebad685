"""What one process is about to take of main memory is no other's to count on."""

import subprocess
import sys
import threading

import pytest

from worker import reservations

HOLD = """
import pathlib, sys, time
from worker import reservations
held = reservations.Reservations(pathlib.Path(sys.argv[1]))
with held.turn():
    held.reserve(700)
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def pending(tmp_path):
    """`pending()`: what a process without a reservation of its own sees."""

    def look() -> int:
        with reservations.Reservations(tmp_path).turn() as pending_bytes:
            return pending_bytes

    return look


def test_another_host_that_shares_the_home_has_memory_of_its_own(tmp_path, pending, monkeypatch):
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(reservations.socket, "gethostname", lambda: "elsewhere")
        other = reservations.Reservations(tmp_path)
    with other.turn():
        other.reserve(700)
    assert pending() == 0
    other.release()


def test_reservations_of_others_add_up_and_ones_own_does_not_count(tmp_path, pending):
    first, second = (reservations.Reservations(tmp_path) for _ in range(2))
    for each, num_bytes in ((first, 5), (second, 7), (first, 11)):
        with each.turn():
            each.reserve(num_bytes)
    assert pending() == 18
    with first.turn() as pending_bytes:
        assert pending_bytes == 7
    for _ in range(2):
        first.release()
    assert pending() == 7
    second.release()
    assert pending() == 0


def test_who_comes_in_anothers_turn_waits_and_sees_what_was_reserved_in_it(tmp_path):
    first, second = (reservations.Reservations(tmp_path) for _ in range(2))
    seen = []

    def look():
        with second.turn() as pending_bytes:
            seen.append(pending_bytes)

    waits = threading.Thread(target=look)
    with first.turn():
        waits.start()
        waits.join(0.2)
        assert seen == []
        first.reserve(5)
    waits.join(30)
    assert seen == [5]
    first.release()


def test_a_reservation_ends_with_a_killed_process(tmp_path, pending):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        assert pending() == 700
        process.kill()
    assert pending() == 0
    (folder,) = (tmp_path / "locks").iterdir()
    assert [path.name for path in folder.iterdir()] == [reservations.TURN]


def test_a_full_disk_costs_the_reservation_alone(tmp_path):
    script = """
import pathlib, resource, signal, sys
from worker import reservations
held = reservations.Reservations(pathlib.Path(sys.argv[1]))
with held.turn():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    held.reserve(700)
held.release()
held.release()
"""
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "memory.not_reserved" in done.stdout + done.stderr


def test_a_home_that_cannot_be_written_costs_the_reservation_alone(tmp_path):
    (tmp_path / "locks").write_text("a file")
    held = reservations.Reservations(tmp_path)
    with held.turn() as pending_bytes:
        held.reserve(5)
    held.release()
    assert pending_bytes == 0
