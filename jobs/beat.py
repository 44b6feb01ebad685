"""A sign of life in a file, for health checks on the same machine: the process goes round.

It says nothing of the database: to start a process again ends no outage, and costs renders.
"""

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

from jobs import settings

STALE_SECONDS = 60.0  # a look takes well under a second; one at a silent database takes longer


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A file whose age tells when its process last went round."""

    path: Path
    stale_seconds: float

    def touch(self) -> None:
        """A disk that fails ends no process: its file only grows old."""
        with contextlib.suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.touch()

    def age_seconds(self) -> float | None:
        """None: it has never been seen."""
        try:
            return max(time.time() - self.path.stat().st_mtime, 0.0)
        except FileNotFoundError:
            return None

    def is_alive(self) -> bool:
        age = self.age_seconds()
        return age is not None and age < self.stale_seconds


def of_notifier(config: settings.Settings) -> Beat:
    stale = max(STALE_SECONDS, 5 * config.tick_seconds)
    return Beat(path=config.home / "notifier.beat", stale_seconds=stale)


def of_launcher(config: settings.Settings) -> Beat:
    """Of whichever `rushes worker` of this home goes round."""
    return Beat(path=config.home / "launcher.beat", stale_seconds=STALE_SECONDS)


def of_dispatcher(config: settings.Settings) -> Beat:
    stale = max(STALE_SECONDS, 5 * config.tick_seconds)
    return Beat(path=config.home / "dispatcher.beat", stale_seconds=stale)
