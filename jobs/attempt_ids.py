"""Ids of attempts: times, so that a restored database gives none again."""

import secrets
from datetime import UTC, datetime, timedelta

SINCE = datetime(2020, 1, 1, tzinfo=UTC)
BITS = 12  # below the milliseconds: 53 in all till 2089, which numbers in JSON hold
COUNTED_BELOW = 1 << 40
"""Those of versions that counted them; as times, the first three days of 2020."""


def new(now: datetime) -> int:
    """Never used before, also by a database that was restored from a backup and counts anew."""
    return earliest(now) | secrets.randbits(BITS)


def ahead() -> int:
    """By how much an id goes beyond the newest one when that is not smaller."""
    return 1 + secrets.randbits(BITS)


def earliest(moment: datetime) -> int:
    """No attempt that began at the moment or later has a smaller one."""
    return max((moment - SINCE) // timedelta(milliseconds=1), 0) << BITS
