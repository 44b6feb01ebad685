"""Every way in which a command can end badly, as one line and an exit code."""

import contextlib
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import click

from jobs import errors
from jobs.cli import exits, output

DAY_SECONDS = 24 * 3600  # from UTC: the C library knows such time zones, Python's clock none


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What is told of an exception."""

    kind: str
    message: str
    exit_code: int
    problems: tuple[errors.Problem, ...] = ()
    source: str = ""
    batch_id: str | None = None


def exit_code_of(run: Callable[[], object], *, as_json: bool) -> int:
    """Run a command; its exit code. Nothing leaves as a traceback."""
    _replace_closed_streams()
    _tolerate_narrow_encodings()
    try:
        code = run()
    except (KeyboardInterrupt, click.Abort):
        with _written_if_it_can():
            click.echo("interrupted", err=True)
        return exits.INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as no_arguments:
        with _written_if_it_can():
            click.echo(no_arguments.format_message(), err=True)
        return no_arguments.exit_code
    except BrokenPipeError:
        _drop_unwritten()
        return exits.ERROR
    except Exception as error:  # whatever it is, a person reads one line of it
        if os.environ.get("RUSHES_DEBUG"):
            with _written_if_it_can():
                traceback.print_exc()
        failure = _failure(error)
        _tell(failure, as_json=as_json)
        return failure.exit_code
    return code if isinstance(code, int) else exits.OK


def _tell(failure: Failure, *, as_json: bool) -> None:
    if as_json:
        with _written_if_it_can():
            output.emit_line({"error": _shape(failure)})
    with _written_if_it_can():
        for problem in failure.problems:
            output.note(output.problem_line(failure.source, problem))
        if not failure.problems or len(failure.problems) > 1:
            output.note(f"error: {failure.message}")


@contextmanager
def _written_if_it_can() -> Iterator[None]:
    """The exit code is told also where nobody reads and no disk has room."""
    with contextlib.suppress(OSError):
        yield
    _drop_unwritten()


def _drop_unwritten() -> None:
    """What a stream could not get rid of: at its end Python would try again and fail for it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _shape(failure: Failure) -> dict[str, Any]:
    shape: dict[str, Any] = {
        "kind": failure.kind,
        "message": failure.message,
        "exit_code": failure.exit_code,
    }
    if failure.batch_id is not None:
        shape["batch_id"] = failure.batch_id
    if failure.problems:
        shape["source"] = failure.source
        shape["problems"] = [output.problem_shape(problem) for problem in failure.problems]
    return shape


def _failure(error: Exception) -> Failure:
    if isinstance(error, errors.InvalidInput):
        return _invalid(error)
    if isinstance(error, errors.RushesError):
        return _of(error, str(error), error.exit_code)
    if isinstance(error, click.ClickException):
        return _of(error, _with_help_hint(error), error.exit_code)
    if reason := _database_reason(error):
        return Failure(kind="DatabaseUnavailable", message=reason, exit_code=exits.ERROR)
    if isinstance(error, OSError):
        told = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        return _of(error, told, exits.ERROR)
    if isinstance(error, ValueError) and abs(time.localtime().tm_gmtoff) >= DAY_SECONDS:
        zone = os.environ.get("TZ")
        told = f"TZ={zone} is a day or more from UTC: set TZ to a zone such as Europe/Berlin"
        return Failure(kind="InvalidTimeZone", message=told, exit_code=exits.USAGE)
    text = f"{type(error).__name__}: {error}".splitlines()[0][:500]
    again = "" if os.environ.get("RUSHES_DEBUG") else "; RUSHES_DEBUG=1 shows where"
    return _of(error, f"{text} (this is a defect in rushes{again})", exits.ERROR)


def _of(error: Exception, message: str, exit_code: int) -> Failure:
    return Failure(
        kind=type(error).__name__,
        message=message,
        exit_code=exit_code,
        batch_id=getattr(error, "batch_id", None),
    )


def _invalid(error: errors.InvalidInput) -> Failure:
    number = len(error.problems)
    counted = "1 problem" if number == 1 else f"{number:,} problems"
    return Failure(
        kind="InvalidInput",
        message=f"{counted} in {error.source}: nothing was done" if number else str(error),
        exit_code=error.exit_code,
        problems=error.problems,
        source=error.source,
    )


def _with_help_hint(error: click.ClickException) -> str:
    message = error.format_message()
    ctx = getattr(error, "ctx", None)
    if ctx is None:
        return message
    if isinstance(error, click.NoSuchOption) and error.option_name in ("-o", "--output"):
        return f"{error.option_name} goes after the command: `{ctx.command_path} COMMAND -o json`"
    end = "" if message.endswith((".", "?", "!")) else "."
    return f"{message}{end} See `{ctx.command_path} --help`."


def _database_reason(error: Exception) -> str | None:
    if "sqlalchemy" not in sys.modules:
        return None
    from sqlalchemy import exc

    from jobs import database, settings

    if not isinstance(error, exc.DBAPIError):
        return None
    return database.advice(error, database.connect(settings.load()).url)


def _replace_closed_streams() -> None:
    """A stream that was closed before we began is none at all in Python."""
    if sys.stdout is None:
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


def _tolerate_narrow_encodings() -> None:
    for stream in (sys.stdout, sys.stderr):
        if callable(reconfigure := getattr(stream, "reconfigure", None)):
            reconfigure(errors="backslashreplace")
