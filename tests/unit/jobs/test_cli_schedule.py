"""`rushes schedule`, as a person at a terminal and as a script meet it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jobs import cli

Rushes = Callable[..., Result]
pytestmark = pytest.mark.usefixtures("no_broker", "db")
NIGHTLY = ("--cron", "30 2 * * *", "--tz", "Europe/Berlin", "--preset", "tiny")


@pytest.fixture
def rushes() -> Rushes:
    def run(*arguments: str) -> Result:
        result = CliRunner().invoke(cli.main, ["schedule", *arguments])
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture(autouse=True)
def _prompts() -> None:
    Path("p.txt").write_text("a {{style}} cat {{counter}}\n")


def test_a_name_that_cannot_be_seen_is_refused(rushes: Rushes) -> None:
    style = ("--list", "style=noir")
    refused = rushes("add", "\u200b\u2060", *NIGHTLY, "--file", "p.txt", *style)
    assert refused.exit_code == 2
    assert "a name must have a character that can be seen" in refused.output


def test_a_schedule_from_its_first_day_to_its_last(rushes: Rushes) -> None:
    added = rushes("add", "night", *NIGHTLY, "--file", "p.txt", "--list", "style=noir,anime")
    assert added.exit_code == 0, added.output
    assert "30 2 * * * in Europe/Berlin" in added.output
    batch_id = rushes("run-now", "night", "-q").stdout.strip()
    shown = json.loads(rushes("show", "night", "-o", "json").stdout)
    assert len(shown["coming"]) == 5
    assert all("T0" in moment for moment in shown["coming"])
    assert shown["batches_made"] == 1
    assert shown["misfire"] == "run_once"
    (fired,) = json.loads(rushes("history", "night", "-o", "json").stdout)["firings"]
    assert fired["batch"]["batch_id"] == batch_id
    assert fired["is_manual"] is True
    assert "is paused" in rushes("pause", "night").output
    assert "is paused already" in rushes("pause", "night").output
    assert "paused" in rushes("list").output
    assert json.loads(rushes("resume", "night", "-o", "json").stdout)["changed"] is True
    assert rushes("remove", "night").exit_code == 0
    assert rushes("show", "night").exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--list", "stil=noir"), "unknown variable {{style}}"),
        (("--list", "style"), "NAME=A,B"),
        (("--misfire", "catch_up"), "--misfire must be"),
        (("--misfire", "often"), "--misfire must be"),
        (("--misfire", "catch_up:1000"), "catch_up must be 1 to 100"),
        (("--tz", "Berlin"), "did you mean Europe/Berlin?"),
        (("--cron", "99 2 * * *"), "bad minute"),
        (("--file", "none.txt"), "none.txt: there is no such file"),
        (("--file", "."), ".: is a folder: give a file"),
        (("--file", "-"), "-: is neither a file, to be kept, nor s3://bucket/key"),
        (("--file", "http://h/p.txt"), "http://h/p.txt: is neither a file"),
        (("--list", "style=@none.txt"), "none.txt: there is no such file"),
        (("--file", "s3://bucket"), "must be s3://bucket/key"),
        (("--priority", "1000"), "priority must be"),
    ],
)
def test_what_is_wrong_is_told_and_nothing_is_stored(
    rushes: Rushes, arguments: tuple[str, str], told: str
) -> None:
    result = (
        rushes("add", "night", *NIGHTLY, "--file", "p.txt", "--list", "style=noir", *arguments)
        if arguments[0] != "--list"
        else rushes("add", "night", *NIGHTLY, "--file", "p.txt", *arguments)
    )
    assert result.exit_code == 2, result.output
    assert told in result.output
    assert json.loads(rushes("list", "-o", "json").stdout) == {"schedules": []}


def test_a_list_that_is_given_twice_is_refused(rushes: Rushes) -> None:
    lists = ("--list", "style=noir", "--list", "style=anime,clay")
    result = rushes("add", "night", *NIGHTLY, "--file", "p.txt", *lists)
    assert (result.exit_code, "--list style is given twice" in result.output) == (2, True)


def test_the_help_tells_each_command_whole() -> None:
    listed = CliRunner().invoke(cli.main, ["schedule", "--help"]).output
    assert "..." not in listed.partition("Commands:")[2]
