"""Options that many commands share."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import click

from jobs import states

Command = TypeVar("Command", bound=Callable[..., Any])


class Seconds(click.FloatRange):
    """Which `nan` passes through, and `inf` too where there is no upper end."""

    name = "number of seconds"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        seconds: float = super().convert(value, param, ctx)
        if not math.isfinite(seconds):
            self.fail(f"{value} is not a number of seconds.", param, ctx)
        return seconds


class Whole(click.IntRange):
    """Called what it is in messages, not `integer range`."""

    name = "whole number"


class NamedPath(click.Path):
    """Not an empty text, which would be the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("is empty: give a path, such as . for this folder.", param, ctx)
        return super().convert(value, param, ctx)


def not_empty(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """A script's variable that is not set must not be as if nothing was said."""
    if value == "":
        raise click.BadParameter("is empty.")
    return value


def owner(_ctx: click.Context, _parameter: click.Parameter, value: str | None) -> str | None:
    """Without blanks at its ends, with which it would be another one that looks the same."""
    stripped = value and value.strip()
    if value and not stripped:
        raise click.BadParameter("is blank.")
    return stripped


def kinds(text: str) -> Callable[[Command], Command]:
    """`--kind` of failures, handed on as `kinds`."""
    return click.option(
        "--kind",
        "kinds",
        type=click.Choice([kind.value for kind in states.FailureKind]),
        multiple=True,
        help=f"{text}; may be given several times.",
    )


def misused(message: str) -> click.UsageError:
    """Told with the way to the help of the command that runs."""
    return click.UsageError(message, click.get_current_context())


def _without_color(ctx: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if wanted:
        ctx.color = False


def _is_json(ctx: click.Context, _parameter: click.Parameter, value: str) -> bool:
    of_group = ctx.parent is not None and ctx.parent.params.get("as_json", False)
    return value == "json" or bool(of_group)


no_color = click.option(
    "--no-color",
    is_flag=True,
    expose_value=False,
    callback=_without_color,
    help="Print without colors, as NO_COLOR=1 does.",
)

_output = click.option(
    "-o",
    "--output",
    "as_json",
    type=click.Choice(["human", "json"]),
    default="human",
    show_default=True,
    callback=_is_json,
    help="Who reads it.",
)


def output(command: Command) -> Command:
    """`-o/--output` and `--no-color`; the command gets `as_json`."""
    return _output(no_color(command))


def asks_for_json(arguments: Sequence[str]) -> bool:
    """What the command line says before it is parsed: errors in it are told the same way."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if argument == "--":
            return False
        if argument == "json" and re.fullmatch("-q*o|--output", before):
            return True
        if re.fullmatch("-q*ojson|--output=json", argument):
            return True
    return False
