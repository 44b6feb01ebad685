"""From when on, as people write it."""

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import pytest

from jobs import since

BERLIN = ZoneInfo("Europe/Berlin")
MORNING = datetime(2026, 11, 28, 7, 15, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("90m", datetime(2026, 11, 28, 5, 45, tzinfo=UTC)),
        ("1d", datetime(2026, 11, 27, 7, 15, tzinfo=UTC)),
        ("2026-11-27", datetime(2026, 11, 26, 23, 0, tzinfo=UTC)),
        (" 2026-11-27T22:00 ", datetime(2026, 11, 27, 21, 0, tzinfo=UTC)),
        ("2026-11-27 22:00Z", datetime(2026, 11, 27, 22, 0, tzinfo=UTC)),
    ],
)
def test_a_beginning_is_understood(text: str, found: datetime) -> None:
    assert since.parse(text, now=MORNING, zone=BERLIN) == found


@pytest.mark.parametrize(
    "text", ["", "lately", "12", "-2h", "999999d", "2026-13-01", "0001-01-01T00:00+14:00"]
)
def test_what_is_no_beginning_is_told_what_would_do(text: str) -> None:
    with pytest.raises(ValueError, match="give a span such as 90m, 12h or 3d, a date"):
        since.parse(text, now=MORNING, zone=BERLIN)
