"""Why jobs of a batch failed: counted anew now and then where that takes long."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy.orm import Session

from jobs import failures, shapes
from jobs.schema import Batch

SLOW_SECONDS = 0.2  # faster, and it is counted for everyone: some 30,000 failed jobs
IDLE_PER_COUNT = 9.0  # a tenth of the time, at most, is spent counting


@dataclass(frozen=True, kw_only=True)
class _Counted:
    failed: int
    groups: list[dict[str, Any]]
    good_until: float
    """By the clock of this process."""


@dataclass(kw_only=True)
class Groups:
    """Of the batches that somebody looks at. A page asks every two seconds."""

    _counted: Mapping[str, _Counted] = field(default_factory=dict)

    def of(self, session: Session, batch: Batch) -> list[dict[str, Any]]:
        """In a snapshot, as `failures.groups`. What was queued again is left out at once."""
        began = time.monotonic()
        known = self._counted.get(batch.id)
        if known is not None and began < known.good_until and known.failed <= batch.failed:
            return known.groups
        groups = [shapes.failure(group) for group in failures.groups(session, batch)]
        now = time.monotonic()
        if now - began >= SLOW_SECONDS:
            good_until = now + IDLE_PER_COUNT * (now - began)
            made = _Counted(failed=batch.failed, groups=groups, good_until=good_until)
            others = {key: each for key, each in self._counted.items() if now < each.good_until}
            self._counted = others | {batch.id: made}
        return groups
