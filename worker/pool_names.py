"""What Celery's pool has on the machine under a name: semaphores, and a temporary folder.

A process that must not render is killed with all that it started, and so was billiard's tracker,
which removes the names of semaphores when the others have ended. Each such end left one.
"""

import multiprocessing.process
import os
import subprocess
import tempfile
from collections.abc import Sequence

from billiard import semaphore_tracker


def install() -> None:
    """Before the pool begins."""
    semaphore_tracker.spawnv_passfds = _begin_apart
    # Billiard's files there lose their names at once: no folder of their own has to be removed.
    config = multiprocessing.process.current_process()._config  # type: ignore[attr-defined]  # not in typeshed
    config["tempdir"] = tempfile.gettempdir()


def _begin_apart(path: str | bytes, arguments: Sequence[str], files: Sequence[int]) -> int:
    """In a session of its own, which no kill of our group reaches. It ends by itself after us."""
    return subprocess.Popen(  # noqa: S603  # billiard's own argument list, no shell
        arguments,
        executable=path,
        pass_fds=files,
        # It is there for names that are left, and would write a line of text for each such end.
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
        start_new_session=True,
    ).pid
