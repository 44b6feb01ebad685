"""`rushes doctor` looks at real parts and says what to do."""

import json
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from jobs import cli, settings
from jobs.doctor import checks, examination

pytestmark = pytest.mark.usefixtures("no_broker")


def examined() -> dict[str, checks.Check]:
    return {check.name: check for check in examination.examine()}


def test_every_check_that_is_not_ok_says_what_to_do() -> None:
    found = examined()
    assert {check.status for check in found.values()} == {"ok", "warn", "fail"}
    for check in found.values():
        assert bool(check.advice) == (check.status != "ok"), check


def test_a_missing_database_fails_and_is_not_made() -> None:
    found = examined()
    assert found["database"].status == "fail"
    assert "rushes migrate" in found["database"].advice
    assert not (settings.load().home / "rushes.db").exists()


@pytest.mark.parametrize("url", ["nonsense", "postgres://127.0.0.1:1/db", "mysql://x/y"])
def test_a_wrong_database_fails_and_the_other_checks_go_on(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("DATABASE_URL", url)
    found = examined()
    assert found["database"].status == "fail"
    assert "dispatcher" in found


def test_a_check_that_meets_a_defect_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def odd(_config: settings.Settings) -> Iterator[checks.Check]:
        raise KeyError("odd")

    monkeypatch.setitem(examination.PARTS, "devices", odd)
    found = examined()
    assert (found["devices"].status, found["devices"].seen) == ("fail", "KeyError: 'odd'")
    assert "presets" in found


def test_a_wrong_setting_is_the_only_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_WINDOW", "0")
    found = examined()
    assert [check.status for check in found.values()] == ["fail"]


def test_the_command_fails_when_a_check_does() -> None:
    result = CliRunner().invoke(cli.main, ["doctor"])
    assert result.exit_code == 1
    assert "failures" in result.stdout
    told = json.loads(CliRunner().invoke(cli.main, ["doctor", "-o", "json"]).stdout)
    assert {"name", "status", "seen", "advice"} == set(told["checks"][0])
