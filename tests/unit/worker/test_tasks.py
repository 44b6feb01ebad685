"""What a worker process loads, and when."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest


def modules_after(statements: str) -> set[str]:
    script = f"{statements}\nimport sys\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return set(done.stdout.split())


def test_the_tasks_load_no_torch():
    assert modules_after("import worker.tasks").isdisjoint({"torch", "models", "transformers"})


def test_a_publisher_never_loads_torch():
    loaded = modules_after("from worker import tasks; tasks.publisher().publish(1)")
    assert "worker.publisher" in loaded
    assert loaded.isdisjoint({"torch", "models", "transformers", "worker.runner"})


def test_a_child_that_cannot_read_its_settings_ends_its_celery():
    """Which would go on with it, and take messages for what it cannot render."""
    script = (
        "import os; os.setpgrp(); from worker import tasks;"
        "os.environ['RUSHES_DTYPE'] = 'foo'; tasks._begin()"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL
    assert "worker.cannot_start" in done.stderr
    assert "RUSHES_DTYPE" in done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="semaphores have no files elsewhere")
def test_a_celery_that_can_make_no_semaphores_says_why(monkeypatch):
    """Its own words would be `Unrecoverable error`, without a place."""
    monkeypatch.setenv("RUSHES_WORKER_NAME", "cpu0@here")
    script = (
        "import resource as r; from celery import signals; from worker import tasks;"
        "r.setrlimit(r.RLIMIT_FSIZE, (0, r.getrlimit(r.RLIMIT_FSIZE)[1]));"  # no file has room
        "signals.worker_init.send(sender=None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "worker.cannot_start" in line
    assert "--shm-size" in line


@pytest.mark.skipif(sys.platform != "linux", reason="semaphores have no files elsewhere")
def test_a_celery_that_is_killed_with_its_group_leaves_no_name_behind(tmp_path):
    """What the next one would not know of, until the shared memory of a container is full."""
    script = (
        "import os; os.setpgrp(); from worker import tasks; import billiard, signal;"
        "pool = billiard.get_context('spawn'); number, lock = pool.Value('i'), pool.Lock();"
        "print(lock._semlock.name, flush=True); os.killpg(0, signal.SIGKILL)"
    )
    folder = tmp_path / "temporary"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", script],
        check=False,
        capture_output=True,  # until the tracker ends too
        text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stderr == ""
    name = done.stdout.strip().removeprefix("/")
    assert name
    assert not Path(f"/dev/shm/sem.{name}").exists()  # noqa: S108  # where Linux has them
    assert not list(folder.iterdir())


def test_the_launcher_never_loads_torch():
    loaded = modules_after(
        "from jobs import settings\nfrom worker import launch\n"
        "launch.make(settings.load(), devices='cpu')"
    )
    assert loaded.isdisjoint({"torch", "models", "transformers"})
