"""What a worker process loads, and when."""

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


def test_the_launcher_never_loads_torch():
    loaded = modules_after(
        "from jobs import settings\nfrom worker import launch\n"
        "launch.make(settings.load(), devices='cpu')"
    )
    assert loaded.isdisjoint({"torch", "models", "transformers"})
