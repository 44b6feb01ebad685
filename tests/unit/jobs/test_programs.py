"""Running a program that answers, fails, or cannot be ended."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jobs import programs


def test_what_it_said_is_told_whatever_its_status():
    code = "import sys; print('yes'); print('but', file=sys.stderr); sys.exit(3)"
    done = programs.run([sys.executable, "-c", code], seconds=60)
    assert (done.returncode, done.stdout, done.stderr) == (3, "yes\n", "but\n")


def test_odd_bytes_are_no_error():
    code = r"import sys; sys.stdout.buffer.write(b'\xff')"
    assert (
        programs.run([sys.executable, "-c", code], seconds=60).stdout == "\N{REPLACEMENT CHARACTER}"
    )


def test_it_cannot_read_what_a_person_types():
    code = "import sys; print(repr(sys.stdin.read()))"
    assert programs.run([sys.executable, "-c", code], seconds=60).stdout == "''\n"


def test_one_that_takes_too_long_is_ended(tmp_path):
    started = tmp_path / "started"
    command = ["/bin/sh", "-c", f"echo $$ > {started}; exec sleep 60"]
    with pytest.raises(subprocess.TimeoutExpired):
        programs.run(command, seconds=0.5)
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)


def test_one_that_no_signal_ends_is_left_behind(monkeypatch):
    """As one that sleeps in the kernel, for a GPU that fell off the bus."""
    left = []
    monkeypatch.setattr(subprocess.Popen, "kill", lambda process: left.append(process))
    began = time.monotonic()
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            programs.run(["sleep", "60"], seconds=0.2)
        assert time.monotonic() - began < 30
    finally:
        for process in left:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
