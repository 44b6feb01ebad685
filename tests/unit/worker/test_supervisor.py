"""Children come back with growing pauses, never spin, and end with all that they started."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

from jobs import supervisor
from tests.waiting import until

SLEEP = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]


@pytest.fixture
def child():
    """`child(command)`: started, and killed at the end of the test."""
    made = []

    def start(command, **options):
        made.append(supervisor.Child(name="test", command=command, **options))
        made[-1].start()
        return made[-1]

    yield start
    for one in made:
        one.kill()


@pytest.fixture
def clock(monkeypatch):
    """Time passes when the test says so, for pauses only."""

    class Clock:
        now = 1_000.0

        def monotonic(self):
            return self.now

    made = Clock()
    monkeypatch.setattr(supervisor, "time", made)
    return made


def end(one):
    one.send(signal.SIGKILL)
    one.wait(20)


def test_a_child_that_ends_comes_back_after_a_pause(child, clock):
    one = child(SLEEP)
    first_pid = one.pid
    end(one)
    assert one.revive()
    assert not one.revive()
    assert not one.is_alive
    clock.now += supervisor.FIRST_PAUSE_SECONDS
    assert not one.revive()
    assert one.is_alive
    assert one.pid != first_pid
    assert one.restarts == 1


def test_a_living_child_is_left_alone(child, clock):
    one = child(SLEEP)
    pid = one.pid
    for _ in range(5):
        clock.now += 100
        assert not one.revive()
    assert (one.pid, one.restarts) == (pid, 0)


def pauses_of(one, clock, times, *, lives=0.0):
    found = []
    for _ in range(times):
        clock.now += lives
        end(one)
        assert one.revive()
        began = clock.now
        while not one.is_alive:
            clock.now += 0.5
            one.revive()
        found.append(clock.now - began)
    return found


def test_pauses_double_up_to_a_minute(child, clock):
    one = child(SLEEP)
    assert pauses_of(one, clock, 8) == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_child_that_had_settled_comes_back_soon(child, clock):
    one = child(SLEEP)
    assert pauses_of(one, clock, 3) == [1, 2, 4]
    assert pauses_of(one, clock, 2, lives=supervisor.SETTLED_SECONDS) == [1, 1]


def test_a_child_that_cannot_start_does_not_spin(child, clock):
    """Its program does not exist: noticed, told and tried again ever more rarely."""
    one = child(["/no/such/program"])
    until(lambda: not one.is_alive)
    starts = 0
    for _ in range(1_000):
        before = one.restarts
        one.revive()
        if one.restarts > before:
            starts += 1
            until(lambda: not one.is_alive)
        clock.now += 0.5
    assert 8 <= starts <= 14  # 500 seconds in pauses of 1, 2, 4, ... 60


def test_a_child_that_cannot_even_be_forked_is_tried_again(child, clock, tmp_path):
    log_path = tmp_path / "logs" / "log"
    one = child(SLEEP, log_path=log_path)
    end(one)
    one.revive()
    log_path.unlink()
    log_path.mkdir()  # cannot be opened
    for _ in range(100):
        clock.now += 0.5
        one.revive()
    assert not one.is_alive
    assert one.restarts < 10
    log_path.rmdir()
    clock.now += supervisor.LONGEST_PAUSE_SECONDS
    one.revive()
    assert one.is_alive


PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
print(child.pid, flush=True)
time.sleep(600)
"""


def family(child, tmp_path):
    one = child([sys.executable, "-S", "-c", PARENT], log_path=tmp_path / "log")
    until(lambda: (tmp_path / "log").read_text().endswith("\n"))
    return one, psutil.Process(int((tmp_path / "log").read_text()))


def is_gone(process):
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def test_kill_ends_a_child_and_what_it_started(child, tmp_path):
    one, grandchild = family(child, tmp_path)
    one.kill()
    until(lambda: is_gone(grandchild))


def test_what_a_dead_child_has_started_ends_before_it_comes_back(child, clock, tmp_path):
    """A rendering process without its Celery parent would keep the device."""
    one, grandchild = family(child, tmp_path)
    end(one)
    assert one.revive()
    until(lambda: is_gone(grandchild))


def test_the_terminal_interrupts_only_us(child):
    one = child(SLEEP)
    assert os.getpgid(one.pid) == one.pid != os.getpgid(0)


def test_children_end_with_a_parent_that_was_killed(tmp_path):
    script = textwrap.dedent(f"""
        import sys, time
        from jobs import supervisor
        child = supervisor.Child(name="test", command={SLEEP!r})
        child.start()
        print(child.pid, flush=True)
        time.sleep(600)
    """)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as parent:
        child = psutil.Process(int(parent.stdout.readline()))
        until(lambda: "time.sleep(600)" in "".join(child.cmdline()))
        parent.kill()
    until(lambda: is_gone(child))


def test_the_log_of_a_child_that_ended_is_named(child, clock, tmp_path, capsys):
    """It says why."""
    one = child(SLEEP, log_path=tmp_path / "log")
    end(one)
    assert one.revive()
    assert str(tmp_path / "log") in capsys.readouterr().out


def test_output_is_appended_to_the_log(child, tmp_path):
    log_path = tmp_path / "logs" / "log"
    for word in ("one", "two"):
        one = child([sys.executable, "-S", "-c", f"print('{word}')"], log_path=log_path)
        assert one.wait(20)
    assert log_path.read_text().split() == ["one", "two"]


def test_only_one_holds_a_lock_and_the_next_may_follow(tmp_path):
    path = tmp_path / "home" / "up.lock"
    with (
        supervisor.only_one(path, "busy here"),
        pytest.raises(supervisor.AlreadyRunning, match="busy here"),
        supervisor.only_one(path, "busy here"),
    ):
        pass
    with supervisor.only_one(path, "busy here"):
        pass


def test_a_killed_holder_lets_go_of_its_lock(tmp_path):
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from jobs import supervisor
        with supervisor.only_one(Path(sys.argv[1]), "busy"):
            print("held", flush=True)
            time.sleep(600)
    """)
    path = tmp_path / "up.lock"
    command = [sys.executable, "-c", script, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        with (
            pytest.raises(supervisor.AlreadyRunning),
            supervisor.only_one(path, "busy"),
        ):
            pass
        holder.kill()
    with supervisor.only_one(path, "busy"):
        pass


@pytest.mark.parametrize("home", ["file/home", "/proc/rushes"])
def test_a_home_that_cannot_be_written_is_told_in_one_line(tmp_path, home):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(supervisor.FolderUnusable, match=r"cannot be written: [^\n]+$"),
        supervisor.only_one(tmp_path / Path(home) / "up.lock", "busy"),
    ):
        pass
