"""How much the farm finished lately, from the newest attempts."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import database, queries, states
from jobs.schema import Attempt

NEWEST_ATTEMPTS = 20_000  # looked at: a chart must not become work for the database
BAD = (states.AttemptState.FAILED, states.AttemptState.LOST)


@dataclass(frozen=True, kw_only=True)
class Span:
    """What ended in some seconds."""

    since: datetime
    succeeded: int
    failed: int
    """Attempts that failed or were lost; their jobs may have been tried again."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Spans of equal length, the oldest first; the last one ends now."""

    spans: Sequence[Span]
    span_seconds: float
    cut_at: datetime | None
    """There were more attempts than were looked at: some of those that ended before are missing."""

    @property
    def is_cut(self) -> bool:
        return self.cut_at is not None


def lately(session: Session, *, span_seconds: float, spans: int) -> Throughput:
    """The last `spans` spans, by the database's clock."""
    now = database.now(session)
    begin = now - timedelta(seconds=span_seconds * spans)
    left_out = queries.attempt_before_newest(session, NEWEST_ATTEMPTS)
    rows = session.execute(
        select(Attempt.state, Attempt.finished_at)
        .where(Attempt.id > left_out, Attempt.finished_at > begin)
        .where(Attempt.state.in_((states.AttemptState.SUCCEEDED, *BAD)))
    ).all()
    counted: Counter[tuple[int, bool]] = Counter()
    for state, finished_at in rows:
        assert finished_at is not None
        number = int((finished_at - begin).total_seconds() / span_seconds)
        counted[min(number, spans - 1), state in BAD] += 1
    return Throughput(
        spans=[
            Span(
                since=begin + timedelta(seconds=span_seconds * number),
                succeeded=counted[number, False],
                failed=counted[number, True],
            )
            for number in range(spans)
        ],
        span_seconds=span_seconds,
        cut_at=_cut_at(session, left_out, begin),
    )


def _cut_at(session: Session, left_out: int, begin: datetime) -> datetime | None:
    """When the newest of those that were not looked at ended, if within the time."""
    ended_at = session.scalar(select(Attempt.finished_at).where(Attempt.id == left_out))
    return ended_at if ended_at is not None and ended_at > begin else None
