"""Processes that are started again."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from structlog.testing import capture_logs

from jobs import supervisor

FOREVER = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
AT_ONCE = [sys.executable, "-S", "-c", "raise SystemExit(1)"]


class Clock:
    """Time that passes only when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(supervisor, "time", SimpleNamespace(monotonic=clock))
    return clock


@pytest.fixture
def started() -> Iterator[Callable[..., supervisor.Child]]:
    children: list[supervisor.Child] = []

    def start(command: list[str], **values: object) -> supervisor.Child:
        child = supervisor.Child(name="child", command=command, **values)  # type: ignore[arg-type]
        children.append(child)
        child.start()
        return child

    yield start
    for child in children:
        child.kill()


Start = Callable[..., supervisor.Child]


def test_a_living_child_is_left_alone(started: Start) -> None:
    child = started(FOREVER)
    pid = child.pid
    assert child.is_alive
    assert child.revive() is False
    assert (child.pid, child.restarts) == (pid, 0)
    assert child.wait(0.01) is False


def test_an_end_is_noticed_once_and_a_new_process_comes_after_the_pause(
    started: Start, clock: Clock
) -> None:
    child = started(FOREVER)
    old = child.pid
    child.send(signal.SIGKILL)
    assert child.wait(10)
    with capture_logs() as logs:
        assert [child.revive() for _ in range(3)] == [True, False, False]
    assert [entry["status"] for entry in logs] == [-signal.SIGKILL]
    assert not child.is_alive
    clock.now += supervisor.FIRST_PAUSE_SECONDS
    assert child.revive() is False
    assert child.is_alive
    assert child.pid != old
    assert child.restarts == 1


def test_each_pause_is_twice_the_last_one_up_to_the_longest(started: Start, clock: Clock) -> None:
    child = started(AT_ONCE)
    pauses = []
    with capture_logs() as logs:
        for _ in range(8):
            assert child.wait(10)
            assert child.revive() is True
            pauses.append(logs[-1]["again_in_seconds"])
            clock.now += pauses[-1] - 0.001
            child.revive()
            assert not child.is_alive
            clock.now += 0.002
            child.revive()
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]


def test_a_child_that_had_settled_begins_with_the_shortest_pause(
    started: Start, clock: Clock
) -> None:
    child = started(AT_ONCE)
    with capture_logs() as logs:
        for lived in (0, 0, supervisor.SETTLED_SECONDS, 0):
            assert child.wait(10)
            clock.now += lived
            assert child.revive() is True
            clock.now += logs[-1]["again_in_seconds"]
            child.revive()
    assert [entry["again_in_seconds"] for entry in logs] == [1, 2, 1, 2]


def test_a_signal_to_a_dead_child_is_no_error(started: Start) -> None:
    child = started(AT_ONCE)
    assert child.wait(10)
    child.send(signal.SIGTERM)
    child.kill()
    child.kill()


def test_its_output_is_added_to_its_log(started: Start, tmp_path: Path) -> None:
    log_path = tmp_path / "logs" / "child.log"
    script = "import os, sys; print(os.environ['WHO']); sys.exit('and an error')"
    for who in ("one", "two"):
        child = started([sys.executable, "-c", script], log_path=log_path, environment={"WHO": who})
        assert child.wait(20)
    lines = log_path.read_text().splitlines()
    assert sorted(lines) == ["and an error", "and an error", "one", "two"]


def test_ctrl_c_in_the_terminal_does_not_reach_it(started: Start) -> None:
    child = started(FOREVER)
    assert os.getsid(child.pid) == child.pid != os.getsid(0)


@pytest.mark.timeout(60)
def test_it_ends_with_its_parent_however_that_ends() -> None:
    script = """
import sys
from jobs import supervisor
up = "import time; print('up', flush=True); time.sleep(600)"
child = supervisor.Child(name="c", command=[sys.executable, "-c", up])
child.start()
print(child.pid, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        words = {parent.stdout.readline().strip() for _ in range(2)}
        (pid,) = words - {"up"}
        child = psutil.Process(int(pid))
        assert child.is_running()
        parent.kill()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not alive
