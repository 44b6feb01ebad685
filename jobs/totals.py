"""What attempts and fire times come to, also those that were deleted as old: totals never fall.

Whole numbers, times in milliseconds: in whichever order they are added up, the sum is the same.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from sqlalchemy import BigInteger, ColumnElement, case, cast, func, select
from sqlalchemy.orm import Session

from jobs import database, states
from jobs.schema import Attempt, PastTotal

STAGES = ("load", "text", "image", "denoise", "decode", "mux")
"""Of a render; what an attempt's `seconds` names."""
BUCKETS = (1, 5, 15, 30, 60, 120, 300, 600, 1_200, 3_600, 7_200)  # seconds
FIRINGS = "firings"

Totals = Counter[tuple[str, str, str]]
"""By state, kind of failure (or nothing) and what was added up."""


def of_attempts(session: Session, which: ColumnElement[bool]) -> Totals:
    """Live ones count as claimed alone."""
    seconds = database.seconds_between(session, Attempt.started_at, Attempt.finished_at)
    columns: dict[str, Any] = {
        "count": func.count(),
        "milliseconds": func.sum(_milliseconds(seconds)),
        **{f"le:{edge}": func.sum(case((seconds <= edge, 1), else_=0)) for edge in BUCKETS},
        **{
            f"stage:{name}": func.sum(_milliseconds(Attempt.seconds[name].as_float()))
            for name in STAGES
        },
    }
    rows = session.execute(
        select(Attempt.state, Attempt.failure_kind, *columns.values())
        .where(which)
        .group_by(Attempt.state, Attempt.failure_kind)
    )
    totals: Totals = Counter()
    for state, kind, *values in rows:
        for name, value in zip(columns, values, strict=True):
            if value:
                totals[state.value, kind.value if kind else "", name] += int(value)
    return totals


def of_firings(ended: Iterable[states.FiringState]) -> Totals:
    return Counter((state.value, "", FIRINGS) for state in ended)


def past(session: Session) -> Totals:
    """Of everything that was deleted. It changes whenever something is."""
    rows = session.scalars(select(PastTotal))
    return Counter({(row.state, row.kind, row.name): row.value for row in rows})


def keep(session: Session, totals: Totals) -> None:
    """Call this where the rows are deleted, in the same transaction."""
    if not totals:
        return
    insert = database.insert(session, PastTotal)
    rows = [
        # In order: two that delete at once wait for each other, not in a circle.
        {"state": state, "kind": kind, "name": name, "value": value}
        for (state, kind, name), value in sorted(totals.items())
    ]
    statement = insert.values(rows).on_conflict_do_update(
        index_elements=[PastTotal.state, PastTotal.kind, PastTotal.name],
        set_={"value": PastTotal.value + insert.excluded.value},
    )
    session.execute(statement)


def _milliseconds(seconds: ColumnElement[float]) -> ColumnElement[int]:
    return cast(func.round(seconds * 1000), BigInteger)
