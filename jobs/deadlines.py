"""When a batch must be finished, as a person says it."""

import re
from datetime import datetime, timedelta, tzinfo

UNITS = {"m": "minutes", "min": "minutes", "h": "hours", "d": "days"}
LONGEST = timedelta(days=366)
WHAT_WOULD_DO = "give a time such as 06:00, a span such as 90m, 2h or 3d, or 2026-12-24T06:00"


def parse(text: str, *, now: datetime, zone: tzinfo | None = None) -> datetime | timedelta:
    """`06:00` the next time the clock shows it, `2h` from the submit, or an ISO date and time.

    Times without a zone are in `zone`, by default this machine's. ValueError says what would do.
    """
    text = text.strip()
    if (found := span(text)) is not None:
        if not timedelta(0) < found <= LONGEST:
            raise ValueError(f"must be above 0 and at most {LONGEST.days} days, got {text!r}")
        return found
    # Through the clock on the wall: a night with a clock change is an hour longer or shorter.
    moment = _clock(text, now.astimezone(zone).replace(tzinfo=None)) or _date_and_time(text)
    if moment is None:
        raise ValueError(f"{WHAT_WOULD_DO}, got {text!r}")
    if moment.tzinfo is None:
        try:
            moment = moment.astimezone() if zone is None else moment.replace(tzinfo=zone)
        except OverflowError as error:
            raise ValueError(f"{text} is more than {LONGEST.days} days away") from error
    if not now < moment <= now + LONGEST:
        when = "is over" if moment <= now else f"is more than {LONGEST.days} days away"
        raise ValueError(f"{moment.isoformat(sep=' ', timespec='minutes')} {when}")
    return moment


def span(text: str) -> timedelta | None:
    """`90m`, `2h`, `3d`; None for what is none."""
    if not (found := re.fullmatch(r"([0-9]{1,6}(?:\.[0-9]{1,3})?) ?(m|min|h|d)", text)):
        return None
    return timedelta(**{UNITS[found[2]]: float(found[1])})


def _clock(text: str, wall: datetime) -> datetime | None:
    if not (clock := re.fullmatch(r"([01]?[0-9]|2[0-3]):([0-5][0-9])", text)):
        return None
    moment = wall.replace(hour=int(clock[1]), minute=int(clock[2]), second=0, microsecond=0)
    return moment if moment > wall else moment + timedelta(days=1)


def _date_and_time(text: str) -> datetime | None:
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        return None
