"""When a rule fires in a year with its clock changes, against a minute-by-minute reading."""

import itertools
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from cronsim import CronSim

from jobs import cron

MINUTE = timedelta(minutes=1)
YEAR = datetime(2026, 1, 1, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)
CHANGES = {
    "Europe/Berlin": ("2026-03-29T01:00", "2026-10-25T01:00"),
    "America/New_York": ("2026-03-08T07:00", "2026-11-01T06:00"),
    "Australia/Lord_Howe": ("2026-10-03T15:30", "2026-04-04T15:00"),  # by half an hour
}
"""When the clock goes forward and when it goes back, in UTC."""
FIXED = ("0 2 * * *", "30 2 * * *", "15 1,2,3 * * *", "0,30 1-3 * * SUN", "59 1 1 * *")
WILD = ("*/10 * * * *", "*/10 2 * * *", "0 */2 * * *", "*/20 1 * * *", "30 * * * *")


def fire_times(rule: cron.Rule, start: datetime, end: datetime) -> list[datetime]:
    """In [start, end)."""
    found = []
    for moment in rule.after(start - timedelta(seconds=1)):
        if moment >= end:
            return found
        found.append(moment)
    return found


def minute_by_minute(rule: cron.Rule, start: datetime, end: datetime) -> list[datetime]:
    """A clock that a daemon looks at each minute, remembering what it has seen."""
    fields = CronSim(rule.expression, datetime(2000, 1, 1))

    def matches(wall: datetime) -> bool:
        return (
            wall.month in fields.months
            and fields.match_day(wall.date())
            and wall.hour in fields.hours
            and wall.minute in fields.minutes
        )

    def skipped(last: datetime, wall: datetime) -> Iterator[datetime]:
        while (last := last + MINUTE) < wall:
            yield last

    found, seen = [], set[datetime]()
    last = start.astimezone(rule.zone).replace(tzinfo=None) - MINUTE
    moment = start
    while moment < end:
        wall = moment.astimezone(rule.zone).replace(tzinfo=None, fold=0)
        if rule.follows_the_clock:
            due = matches(wall)
        else:
            new = {wall, *skipped(last, wall)} - seen
            seen |= new
            due = any(map(matches, new))
        if due:
            found.append(moment)
        last, moment = wall, moment + MINUTE
    return found


@pytest.mark.parametrize("zone", CHANGES)
@pytest.mark.parametrize("expression", [*FIXED, *WILD])
def test_around_each_change_it_fires_as_a_clock_read_minute_by_minute(
    zone: str, expression: str
) -> None:
    rule = cron.parse(expression, zone)
    for text in CHANGES[zone]:
        change = datetime.fromisoformat(text).replace(tzinfo=UTC)
        before, after = change.astimezone(rule.zone), (change - MINUTE).astimezone(rule.zone)
        assert before.utcoffset() != after.utcoffset(), "the test names a wrong moment"
        start, end = change - timedelta(hours=30), change + timedelta(hours=30)
        assert fire_times(rule, start, end) == minute_by_minute(rule, start, end)


@pytest.mark.parametrize("zone", CHANGES)
@pytest.mark.parametrize("expression", ["0 2 * * *", "30 2 * * *", "59 1 * * *"])
def test_a_daily_rule_fires_once_on_each_date_of_a_year(zone: str, expression: str) -> None:
    rule = cron.parse(expression, zone)
    start = datetime(2026, 1, 1, tzinfo=rule.zone)
    end = datetime(2027, 1, 1, tzinfo=rule.zone)
    found = fire_times(rule, start.astimezone(UTC), end.astimezone(UTC))
    dates = [moment.astimezone(rule.zone).date() for moment in found]
    assert len(dates) == 365
    assert dates == sorted(set(dates))


@pytest.mark.parametrize("zone", CHANGES)
def test_an_hourly_rule_fires_in_equal_steps_where_clocks_change_by_hours(zone: str) -> None:
    found = fire_times(cron.parse("0 * * * *", zone), *YEAR)
    steps = {later - earlier for earlier, later in itertools.pairwise(found)}
    if zone == "Australia/Lord_Howe":  # 01:00, 02:30 is 90 minutes on, then 03:00 is 30 more
        assert steps == {timedelta(minutes=minutes) for minutes in (60, 90)}
    else:
        assert len(found) == 8760
        assert steps == {timedelta(hours=1)}


def test_a_time_that_is_left_out_fires_when_the_clock_jumps() -> None:
    rule = cron.parse("30 2 * * *", "Europe/Berlin")
    found = rule.next(datetime(2026, 3, 28, 12, tzinfo=UTC))
    assert found == datetime(2026, 3, 29, 1, 0, tzinfo=UTC)
    assert found.astimezone(rule.zone).isoformat() == "2026-03-29T03:00:00+02:00"


def test_a_time_that_comes_twice_fires_the_first_time_only() -> None:
    rule = cron.parse("30 2 * * *", "Europe/Berlin")
    first = rule.next(datetime(2026, 10, 24, 12, tzinfo=UTC))
    assert first == datetime(2026, 10, 25, 0, 30, tzinfo=UTC)
    assert rule.next(first) == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)
    # Asked between the two: not again.
    assert rule.next(first + MINUTE) == datetime(2026, 10, 26, 1, 30, tzinfo=UTC)


def test_from_any_start_the_next_time_is_the_same() -> None:
    """Dispatchers that start within the changed hours agree with those that ran on."""
    for zone, texts in CHANGES.items():
        for expression in ("*/10 2 * * *", "15,45 1-2 * * *"):
            rule = cron.parse(expression, zone)
            change = datetime.fromisoformat(texts[1]).replace(tzinfo=UTC)
            whole = fire_times(rule, change - timedelta(hours=4), change + timedelta(hours=30))
            moment = change - timedelta(hours=4)
            while moment < change + timedelta(hours=4):
                expected = next(found for found in whole if found > moment)
                assert rule.next(moment) == expected
                moment += timedelta(minutes=7)


def test_the_latest_times_are_found_without_reading_a_whole_outage() -> None:
    rule = cron.parse("* * * * *", "UTC")
    since, until = YEAR
    assert rule.latest(2, since=since, until=until) == [until - MINUTE, until]
    assert rule.latest(5, since=until - MINUTE, until=until) == [until - MINUTE, until]
    daily = cron.parse("@daily", "UTC")
    assert daily.latest(3, since=since, until=until)[0] == until - timedelta(days=2)
    assert cron.parse("0 0 29 2 *", "UTC").latest(1, since=since, until=until) == []


@pytest.mark.parametrize(
    ("expression", "zone", "told"),
    [
        ("0 25 * * *", "UTC", "bad hour"),
        ("0 2 * *", "UTC", "five fields"),
        ("0 0 2 * * *", "UTC", "five fields"),
        ("hello", "UTC", "five fields"),
        ("0 0 30 2 *", "UTC", "bad day-of-month"),
        ("0 0 31 2,4 *", "UTC", "bad day-of-month"),
        ("0 2 * * *", "Berlin", r"did you mean Europe/Berlin\?"),
        ("0 2 * * *", "../etc/passwd", "no time zone"),
        ("0 2 * * *", "", "no time zone"),
    ],
)
def test_what_cannot_be_read_is_told(expression: str, zone: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        cron.parse(expression, zone)
