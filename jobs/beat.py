"""A sign of life in a file, for health checks on the same machine."""

import time
from dataclasses import dataclass
from pathlib import Path

from jobs import settings

STALE_SECONDS = 60.0  # a tick takes well under a second; a database that restarts takes longer


@dataclass(frozen=True, kw_only=True)
class Beat:
    """A file whose age tells when its process was last seen well."""

    path: Path
    stale_seconds: float

    def touch(self) -> None:
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


def of_dispatcher(config: settings.Settings) -> Beat:
    stale = max(STALE_SECONDS, 5 * config.tick_seconds)
    return Beat(path=config.home / "dispatcher.beat", stale_seconds=stale)
