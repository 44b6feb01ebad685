"""From when on, as a person says it."""

from datetime import UTC, datetime, tzinfo

from jobs import deadlines

WHAT_WOULD_DO = "give a span such as 90m, 12h or 3d, a date such as 2026-12-24, or 2026-12-24T06:00"


def parse(text: str, *, now: datetime, zone: tzinfo | None = None) -> datetime:
    """`12h` ago, or an ISO date (its midnight), with a time or without.

    Times without a zone are in `zone`, by default this machine's. ValueError says what would do.
    """
    text = text.strip()
    try:
        if (span := deadlines.span(text)) is not None:
            return now - span
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None and zone is not None:
            moment = moment.replace(tzinfo=zone)
        return moment.astimezone(UTC)
    except (ValueError, OverflowError):
        raise ValueError(f"{WHAT_WOULD_DO}, got {text!r}") from None
