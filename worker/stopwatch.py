"""Seconds per stage of one job, and when its device worked for it. Loads no torch."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime

from worker import tracing

ON_DEVICE = frozenset({"text", "image", "denoise", "decode"})
"""Stages that keep the device busy; others wait for it or need it not."""
ON_HOST = frozenset({"mux"})
"""Runs beside the next job: waiting for the device would be waiting for that one's work."""


def _nothing() -> None:
    pass


@dataclass
class Timings:
    """`synchronize` waits for the device, so that a stage's seconds include its work."""

    synchronize: Callable[[], None] = _nothing
    seconds: dict[str, float] = field(default_factory=dict)
    device_began: float | None = None
    """First work of the device for this job, in seconds since 1970 by this host's clock."""
    device_ended: float | None = None
    """The last that was seen to end."""

    @contextmanager
    def stage(self, name: str, *, waits: bool = True) -> Iterator[None]:
        """`waits`: for the device at the end. Else a later part of the stage will."""
        began = time.perf_counter()
        if name in ON_DEVICE and self.device_began is None:
            self.device_began = time.time()
        with tracing.stage(name):
            try:
                yield
            finally:
                if waits and name not in ON_HOST:
                    self.synchronize()
                spent = time.perf_counter() - began
                self.seconds[name] = round(self.seconds.get(name, 0.0) + spent, 4)
                if name in ON_DEVICE:
                    self.device_ended = time.time()

    def on_device(self) -> dict[str, str | None]:
        """For the sidecar: from when to when, as ISO 8601 in UTC."""
        return {
            "device_began_at": _iso(self.device_began),
            "device_ended_at": _iso(self.device_ended),
        }


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()
