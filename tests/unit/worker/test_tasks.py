"""What a worker process loads, and when."""

import signal
import subprocess
import sys


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


def test_the_launcher_never_loads_torch():
    loaded = modules_after(
        "from jobs import settings\nfrom worker import launch\n"
        "launch.make(settings.load(), devices='cpu')"
    )
    assert loaded.isdisjoint({"torch", "models", "transformers"})
