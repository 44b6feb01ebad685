"""How things are printed: JSON and tables on stdout, everything said beside them on stderr."""

import json
import re
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

import click

from jobs import errors

if TYPE_CHECKING:
    from rich.console import Console

JOINERS = "\u200c\u200d"  # not printable by themselves, but parts of scripts and emoji
OBEYED = re.compile("[\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069]")
"""What a terminal may obey and JSON need not escape."""
MAX_CELL = 60
COLORS = {
    "succeeded": "green",
    "ok": "green",
    "alive": "green",
    "failed": "red",
    "fail": "red",
    "lost": "red",
    "silent": "red",
    "refuses": "red",
    "partially_failed": "yellow",
    "warn": "yellow",
    "cancelled": "yellow",
    "cancelling": "yellow",
    "paused": "yellow",
    "running": "cyan",
    "rendered": "cyan",
}


def console(*, stderr: bool = False) -> "Console":
    """Of rich: for pictures that change in place."""
    from rich.console import Console

    ctx = click.get_current_context(silent=True)
    return Console(stderr=stderr, no_color=True if ctx is not None and ctx.color is False else None)


def emit(value: object) -> None:
    """One JSON document on stdout."""
    _print(_document(value))


def emit_list(head: dict[str, object], name: str, values: Iterable[object]) -> None:
    """As `emit` prints `head | {name: values}`, of which not all are held at once."""
    start, _, end = _document(head | {name: [None]}).rpartition("\n    null\n")
    is_first = True
    try:
        for value in values:
            text = textwrap.indent(_document(value), " " * 4)
            _print(f"{start if is_first else ','}\n{text}", ends=False)
            is_first = False
    except Exception:  # what is told of it is a document, too
        if not is_first:
            _print(f"\n{end}")
        raise
    _print(_document(head | {name: []}) if is_first else f"\n{end}")


def _document(value: object) -> str:
    narrow = not (sys.stdout.encoding or "").lower().startswith("utf")
    text = json.dumps(value, indent=2, ensure_ascii=narrow, default=_json_of)
    return OBEYED.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def emit_line(value: object) -> None:
    """One line of JSON Lines on stdout, at once."""
    _print(json.dumps(value, default=_json_of))


def _json_of(value: object) -> str:
    assert isinstance(value, datetime), type(value)
    return value.isoformat()


def note(text: str) -> None:
    """A line on stderr: beside the output, never part of it."""
    click.echo(plain(text), err=True)


def line(text: str = "") -> None:
    _print(text)


def _print(text: str, *, ends: bool = True) -> None:
    try:
        click.echo(text, nl=ends)
    except OSError as error:
        error.filename = "standard output"  # for whoever tells of it
        raise


def plain(text: str) -> str:
    """The text without what a terminal would obey: control and direction characters escaped."""
    if text.isprintable():
        return text
    return "".join(
        char
        if char.isprintable() or char in JOINERS
        else char.encode("unicode_escape").decode("ascii")
        for char in text
    )


def problem_line(source: str, problem: errors.Problem) -> str:
    place = source if problem.line is None else f"{source}:{problem.line}"
    return f"{place}: {problem.message}"


def problem_shape(problem: errors.Problem) -> dict[str, Any]:
    return {"line": problem.line, "message": problem.message}


def state(name: str) -> str:
    """The word in its color."""
    return click.style(name, fg=COLORS.get(name))


def cut(text: str, width: int = MAX_CELL) -> str:
    """On one line, with an ellipsis where it was longer."""
    text = plain(text)
    if cells(text) <= width:
        return text
    kept, used = [], 0
    for char in text:
        used += cells(char)
        if used > width - 1:
            break
        kept.append(char)
    return "".join(kept).rstrip() + "…"


def cells(text: str) -> int:
    """Columns on a terminal."""
    if text.isascii():
        return len(text)
    return sum(
        0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF")
        for char in text
    )


def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Columns as wide as their widest cell; the cells may be styled."""
    whole = [list(headers), *map(list, rows)]
    widths = [max(_shown_cells(row[column]) for row in whole) for column in range(len(headers))]
    for row in whole:
        padded = [cell + " " * (widths[i] - _shown_cells(cell)) for i, cell in enumerate(row)]
        line("  ".join(padded).rstrip())


def _shown_cells(cell: str) -> int:
    return cells(click.unstyle(cell))


def facts(pairs: Sequence[tuple[str, str]]) -> None:
    """Names and values, one per line; empty values are left out."""
    width = max(len(name) for name, _ in pairs)
    for name, value in pairs:
        if value:
            line(f"{name:<{width}}  {value}")


def duration(seconds: float) -> str:
    """41 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def when(moment: datetime | None) -> str:
    """In the reader's time zone."""
    return "" if moment is None else moment.astimezone().strftime("%Y-%m-%d %H:%M:%S")


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
