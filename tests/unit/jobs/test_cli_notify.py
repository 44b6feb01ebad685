"""`rushes notify`: a secret is shown once, an address never whole."""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from jobs import cli, database
from jobs.schema import Listener

pytestmark = pytest.mark.usefixtures("no_broker", "db")
URL = "https://hooks.example/in/hidden-path?key=hidden-key"


def rushes(*arguments: str, given: str = "") -> Result:
    result = CliRunner().invoke(cli.main, [*arguments], input=given)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def told(*arguments: str) -> Any:
    return json.loads(rushes(*arguments, "-o", "json").stdout)


def test_a_secret_is_shown_once_and_addresses_never_whole(db: database.Database) -> None:
    added = rushes("notify", "add", "ci", "-", "--owner", "ann", given=f"{URL}\n")
    assert added.exit_code == 0, added.output
    secret = added.stdout.strip()
    assert secret.startswith("whsec_")
    with db.reading() as session:
        assert session.query(Listener).one().url == URL
    listed = rushes("notify", "list").output + rushes("notify", "list", "-o", "json").output
    assert "https://hooks.example/..." in listed
    assert "hidden" not in listed
    assert secret not in listed
    assert "already" in rushes("notify", "add", "ci", URL).output


def test_what_cannot_be_told_is_refused_before_it_is_stored(db: database.Database) -> None:
    refused = rushes("notify", "add", "ci", "http://hooks.example/", "--event", "batch.began")
    assert refused.exit_code == 2
    assert "must be https" in refused.output
    assert "no batch.began" in refused.output
    assert told("notify", "list") == {"listeners": []}


def test_a_test_notice_says_why_it_was_not_taken(db: database.Database) -> None:
    assert rushes("notify", "add", "here", "https://127.0.0.1:1/").exit_code == 0
    answer = rushes("notify", "test", "here")
    assert answer.exit_code == 1
    assert "127.0.0.1 is not a public address" in answer.output
    assert told("notify", "log") == {"notices": []}
    assert told("notify", "remove", "here") == {"name": "here", "removed": True, "dropped": 0}
    assert rushes("notify", "test", "here").exit_code == 2


def test_a_notifier_that_never_ran_is_not_alive() -> None:
    answer = rushes("notify", "run", "--check")
    assert answer.exit_code == 1
    assert "no notifier has run here" in answer.output
