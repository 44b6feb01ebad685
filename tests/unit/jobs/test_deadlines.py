"""Deadlines as people write them."""

import time
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from jobs import deadlines

BERLIN = ZoneInfo("Europe/Berlin")
EVENING = datetime(2026, 11, 27, 22, 15, tzinfo=UTC)  # 23:15 in Berlin


def test_the_end_of_time_is_too_far_away_in_every_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        with pytest.raises(ValueError, match="more than 366 days away"):
            deadlines.parse("9999-12-31T23:59", now=EVENING)
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("06:00", datetime(2026, 11, 28, 5, 0, tzinfo=UTC)),
        ("23:59", datetime(2026, 11, 27, 22, 59, tzinfo=UTC)),
        ("23:15", datetime(2026, 11, 28, 22, 15, tzinfo=UTC)),
        ("2026-12-24T06:00", datetime(2026, 12, 24, 5, 0, tzinfo=UTC)),
        ("2026-12-24 06:00+02:00", datetime(2026, 12, 24, 4, 0, tzinfo=UTC)),
        ("2026-12-24T06:00:00Z", datetime(2026, 12, 24, 6, 0, tzinfo=UTC)),
        ("2h", timedelta(hours=2)),
        ("1.5h", timedelta(minutes=90)),
        ("90m", timedelta(minutes=90)),
        ("3d", timedelta(days=3)),
    ],
)
def test_a_deadline_is_understood(text: str, found: datetime | timedelta) -> None:
    assert deadlines.parse(text, now=EVENING, zone=BERLIN) == found


def test_a_clock_time_after_a_change_of_clocks_is_that_of_the_new_day() -> None:
    before = datetime(2026, 10, 24, 20, 0, tzinfo=UTC)  # 22:00, summer time; it ends at night
    found = deadlines.parse("06:00", now=before, zone=BERLIN)
    assert found == datetime(2026, 10, 25, 5, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tomorrow", "give a time such as 06:00"),
        ("25:00", "give a time"),
        ("2", "give a time"),
        ("-2h", "give a time"),
        ("0h", "must be above 0"),
        ("400d", "at most 366 days"),
        ("2026-11-27T10:00", "is over"),
        ("2030-01-01T00:00", "more than 366 days away"),
        ("", "give a time"),
    ],
)
def test_what_is_no_deadline_is_told(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        deadlines.parse(text, now=EVENING, zone=BERLIN)
