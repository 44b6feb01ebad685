"""When a cron rule fires in its time zone. Pure: no clock, no database.

The fields are cronsim's business; it is asked without a time zone. What a clock change does to a
rule is decided here, as Debian's cron does it:

- A rule whose minute and hour are both fixed (`30 2 * * *`) fires once per date: when the clock is
  turned forward past its time, at that moment; when the clock is turned back, the first time only.
- Any other rule (`*/10 * * * *`, `0 */2 * * *`) follows the clock: it does not fire in the hour
  that is left out, and fires both times in the one that comes twice.
"""

import difflib
import functools
import zoneinfo
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from cronsim import CronSim, CronSimError

DAY = timedelta(days=1)
FIELDS = 5
MAX_CHARS = 200
RANGES = "minute 0 to 59, hour 0 to 23, day that its month has, month 1 to 12, weekday 0 to 7"
NICKNAMES = {
    "@hourly": "0 * * * *",
    "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *",
    "@weekly": "0 0 * * 0",
    "@monthly": "0 0 1 * *",
    "@yearly": "0 0 1 1 *",
    "@annually": "0 0 1 1 *",
}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A cron expression of five fields, and the IANA zone whose clock it is read by."""

    expression: str
    zone: zoneinfo.ZoneInfo

    @property
    def follows_the_clock(self) -> bool:
        minute, hour = self.expression.split()[:2]
        return minute.startswith("*") or hour.startswith("*")

    def after(self, moment: datetime) -> Iterator[datetime]:
        """Every fire time later than `moment` (aware), in order, in UTC; ends after some 50 years.

        No fire time is given twice.
        """
        last = moment.astimezone(UTC)
        find = _by_the_clock if self.follows_the_clock else _once_a_date
        for found in find(self, last):
            if found > last:
                last = found
                yield found

    def next(self, moment: datetime) -> datetime | None:
        return next(self.after(moment), None)

    def latest(self, count: int, *, since: datetime, until: datetime) -> list[datetime]:
        """The last `count` fire times in [since, until], in order. Looks no further back."""
        width = timedelta(hours=1)
        while True:
            start = max(until - width, since)
            found = list(_until(self.after(start - timedelta(microseconds=1)), until))
            if len(found) >= count or start == since:
                return found[-count:]
            width *= 4


def parse(expression: str, zone: str) -> Rule:
    """ValueError says which field or name is wrong, and what would do."""
    text = NICKNAMES.get(expression.strip().lower(), expression.strip())
    fields = text.split()
    if len(fields) != FIELDS or len(text) > MAX_CHARS:
        raise ValueError(
            f"a cron rule has five fields (minute hour day month weekday), such as "
            f"'0 2 * * *' for two in the night; got {_shown(expression)}"
        )
    text = " ".join(fields)
    try:
        CronSim(text, datetime(2000, 1, 1))
    except CronSimError as error:
        told = f"{str(error).lower()} in cron rule {_shown(expression)}"
        raise ValueError(f"{told} ({RANGES})") from None
    rule = Rule(expression=text, zone=_zone(zone))
    if rule.next(datetime(2000, 1, 1, tzinfo=UTC)) is None:
        raise ValueError(f"cron rule {_shown(expression)} never fires: there is no such date")
    return rule


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _zone(name: str) -> zoneinfo.ZoneInfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        close = _close_zones(name)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise ValueError(
            f"no time zone {_shown(name)}: give an IANA name such as Europe/Berlin or UTC{hint}"
        ) from None


def _close_zones(name: str) -> list[str]:
    known = {zone.rpartition("/")[2].lower(): zone for zone in sorted(_zone_names())}
    close = difflib.get_close_matches(name.rpartition("/")[2].lower()[:40], known, n=1)
    return [known[found] for found in close]


@functools.cache
def _zone_names() -> frozenset[str]:
    return frozenset(zoneinfo.available_timezones())


def _until(times: Iterator[datetime], end: datetime) -> Iterator[datetime]:
    for moment in times:
        if moment > end:
            return
        yield moment


def _dates(rule: Rule, wall: datetime) -> Iterator[datetime]:
    """What the fields say, by a clock that is never changed, later than `wall`; both naive."""
    yield from CronSim(rule.expression, wall)


def _once_a_date(rule: Rule, moment: datetime) -> Iterator[datetime]:
    # A day earlier: the time before a change may lie behind the one after it.
    for wall in _dates(rule, _wall(moment - DAY, rule.zone)):
        found = wall.replace(tzinfo=rule.zone).astimezone(UTC)
        if _wall(found, rule.zone) != wall:
            found = _change_between(found - DAY, found, rule.zone)  # left out: when the clock jumps
        yield found


def _by_the_clock(rule: Rule, moment: datetime) -> Iterator[datetime]:
    """Between two changes of the clock, its time and UTC differ by the same amount."""
    start, begin = moment, _wall(moment, rule.zone)
    while True:
        offset = _offset(start, rule.zone)
        change = None
        for wall in _dates(rule, begin):
            found = (wall - offset).replace(tzinfo=UTC)
            change = _next_change(start, found, rule.zone)
            if change is not None:
                break
            yield found
            start = found
        if change is None:
            return  # no date in sight
        # From just before: the change itself may be a fire time, by the new clock.
        start, begin = change, _wall(change, rule.zone) - timedelta(seconds=1)


def _offset(moment: datetime, zone: zoneinfo.ZoneInfo) -> timedelta:
    offset = moment.astimezone(zone).utcoffset()
    assert offset is not None
    return offset


def _wall(moment: datetime, zone: zoneinfo.ZoneInfo) -> datetime:
    """What the clock shows, naive."""
    return moment.astimezone(zone).replace(tzinfo=None, fold=0)


def _next_change(start: datetime, end: datetime, zone: zoneinfo.ZoneInfo) -> datetime | None:
    """The first moment in (start, end] when the clock shows another offset than before."""
    while start < end:
        after = min(start + DAY, end)
        if _offset(start, zone) != _offset(after, zone):
            return _change_between(start, after, zone)
        start = after
    return None


def _change_between(before: datetime, after: datetime, zone: zoneinfo.ZoneInfo) -> datetime:
    """The one moment in (before, after] from which the offset is another; to the second."""
    old = _offset(before, zone)
    low, high = before.replace(microsecond=0), after
    while high - low > timedelta(seconds=1):
        middle = (low + (high - low) / 2).replace(microsecond=0)
        if _offset(middle, zone) == old:
            low = middle
        else:
            high = middle
    return high.replace(microsecond=0)
