"""Numbers -> places in a drawing. Pure; the templates draw."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

WIDTH, HEIGHT = 720, 240
LEFT, TOP, BOTTOM = 72, 24, 32  # room for numbers and times, also in the large type of phones
MOST_POINTS = 240
GAP_SECONDS = 120.0  # longer between two samples: nobody looked


@dataclass(frozen=True, kw_only=True)
class Bar:
    kind: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, kw_only=True)
class Chart:
    """In the units of its view box, from its upper left corner."""

    words: str
    """What it shows, for those who cannot see it."""
    ticks: Sequence[tuple[float, str]]
    marks: Sequence[tuple[float, str]]
    step: str = ""
    bars: Sequence[Bar] = ()
    lines: Sequence[str] = ()
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT


def bars(spans: Sequence[Mapping[str, Any]], *, span_seconds: int) -> Chart:
    """Succeeded below, failed on top of them."""
    top = _round_up(max((span["succeeded"] + span["failed"] for span in spans), default=0))
    wide = (WIDTH - LEFT) / max(len(spans), 1)
    found: list[Bar] = []
    for number, span in enumerate(spans):
        below = 0
        for kind, value in (("good", span["succeeded"]), ("bad", span["failed"])):
            if not value:
                continue
            below += value
            found.append(
                Bar(
                    kind=kind,
                    x=round(LEFT + number * wide + 1, 1),
                    y=_y(below, top),
                    width=round(max(wide - 2, 1), 1),
                    height=round(_y(below - value, top) - _y(below, top), 1),
                )
            )
    good, bad = (sum(span[key] for span in spans) for key in ("succeeded", "failed"))
    step = f"{span_seconds // 60} min"
    marks = [
        (LEFT + number * wide, _clock(spans[number]["since"])) for number in range(6, len(spans), 6)
    ]
    return Chart(
        words=f"{good:,} videos and {bad:,} failed attempts in {len(spans)} times {step}; "
        f"at most {max((span['succeeded'] for span in spans), default=0):,} videos in {step}",
        ticks=_ticks(top),
        marks=marks,
        step=step,
        bars=found,
    )


def lines(samples: Sequence[Mapping[str, Any]]) -> Chart:
    """Open jobs over time; a gap where nobody looked."""
    values = [sample["queued"] + sample["running"] for sample in samples]
    top = _round_up(max(values, default=0))
    if not samples:
        return Chart(words="Nothing was counted yet", ticks=_ticks(top), marks=())
    first, last = samples[0]["at"], samples[-1]["at"]
    seconds = max((last - first).total_seconds(), 1.0)
    step = -(-len(samples) // MOST_POINTS)
    parts: list[list[str]] = [[]]
    before: datetime | None = None
    for at, value in _thinned([sample["at"] for sample in samples], values, step):
        if before is not None and (at - before).total_seconds() > GAP_SECONDS + step * 15:
            parts.append([])
        x = LEFT + (at - first).total_seconds() / seconds * (WIDTH - LEFT)
        parts[-1].append(f"{x:.1f},{_y(value, top)}")
        before = at
    middle = first + (last - first) / 2
    return Chart(
        words=f"{values[-1]:,} jobs are open now, {max(values):,} at most since "
        f"{first.astimezone(UTC):%Y-%m-%d %H:%M} UTC",
        ticks=_ticks(top),
        marks=[
            (LEFT + 32, _clock(first)),
            ((LEFT + WIDTH) / 2, _clock(middle)),
            (WIDTH - 36, _clock(last)),
        ],
        lines=[" ".join(points) for points in parts],
    )


def _thinned(
    times: Sequence[datetime], values: Sequence[int], step: int
) -> list[tuple[datetime, int]]:
    """Of so many neighbours the highest: a peak must not vanish."""
    return [
        (times[start], max(values[start : start + step])) for start in range(0, len(values), step)
    ]


def _round_up(value: int) -> int:
    """To 1, 2 or 5 times a power of ten, at least 2."""
    size = 1
    while True:
        for factor in (2, 5, 10):
            if value <= factor * size:
                return factor * size
        size *= 10


def _y(value: float, top: int) -> float:
    return round(TOP + (1 - value / top) * (HEIGHT - TOP - BOTTOM), 1)


def _ticks(top: int) -> list[tuple[float, str]]:
    return [(_y(value, top), _short(value)) for value in (0, top // 2, top)]


def _short(value: int) -> str:
    """2500 -> 2.5k: a long number has no room beside the drawing."""
    for size, unit in ((1_000_000, "M"), (1_000, "k")):
        if value >= size:
            return f"{value / size:g}{unit}"
    return str(value)


def _clock(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%H:%M}"
