"""The self-test of a device: `python -m worker.selftest`, in a fresh process on that device.

Prints a JSON object with `failure`, null when the device is good. Whoever starts it watches the
clock and the exit status: a device that hangs or takes the process with it says nothing.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from jobs import logs, settings
from worker import errors, scratch
from worker import settings as worker_settings_module
from worker.settings import WorkerSettings


def run(worker_settings: WorkerSettings) -> dict[str, Any]:
    """Facts for the logs. Raises a RenderError that says what is wrong with the device."""
    # Each on its own: a simulated device needs no torch.
    if worker_settings.device == "sim":
        from worker import simulation

        return simulation.prove(worker_settings)
    from worker import device, proof

    here = device.current(worker_settings)
    root = settings.load().scratch_dir
    with scratch.disk_errors():
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="rushes-selftest-", dir=root) as folder:
            return proof.prove(here, Path(folder))


def main() -> int:
    logs.configure(settings.load())
    failure, facts = None, {}
    try:
        facts = run(worker_settings_module.load())
    except errors.RenderError as error:
        failure = str(error)
    sys.stdout.write(json.dumps({"failure": failure, "facts": facts}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
