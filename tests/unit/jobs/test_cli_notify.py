"""`rushes notify`: a secret is shown once, an address never whole."""

import json
from typing import Any

import pytest
from click.testing import CliRunner, Result

from jobs import cli, database, outbox
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


def test_the_log_tells_what_a_notice_is_of_and_finds_those_that_were_given_up(
    db: database.Database,
) -> None:
    assert rushes("notify", "add", "ci", URL).exit_code == 0
    data = [{"schedule": "night"}, {"batch_id": "b-1"}, {"batch_id": "b-2"}, {"batch_id": "b-3"}]
    with db.transaction() as session:
        listener = session.query(Listener).one()
        rows = [
            outbox.add(
                session,
                listener,
                outbox.BATCH_FINISHED if "batch_id" in about else outbox.SCHEDULE_FAILED,
                about,
            )
            for about in data
        ]
        for row in rows[:2]:
            row.given_up_at = database.now(session)
        rows[2].delivered_at = rows[2].created_at
        ids = [row.message_id for row in rows]

    def seen(*options: str) -> list[tuple[str | None, str | None, str]]:
        notices = told("notify", "log", *options)["notices"]
        return [(each["batch_id"], each["schedule"], each["state"]) for each in notices]

    given_up = [("b-1", None, "given up"), (None, "night", "given up")]
    assert seen() == [("b-3", None, "waits"), ("b-2", None, "delivered"), *given_up]
    assert seen("--state", "given-up") == given_up
    assert seen("--state", "delivered") == [("b-2", None, "delivered")]
    assert seen("--state", "waits") == [("b-3", None, "waits")]
    assert seen("--before", ids[1]) == given_up[1:]
    page = rushes("notify", "log", "--state", "given-up", "--limit", "1")
    assert page.stdout.splitlines()[1].split()[2:6] == ["batch.finished", "b-1", "ci", "given"]
    command = f"notify log --state given-up --before {ids[1]}"
    assert page.stderr == f"older ones: rushes {command}\n"
    assert "schedule.failed  night" in rushes(*command.split()).stdout
    assert "no such notices before that one" in rushes(*command.split()[:-1], ids[0]).stderr
    unknown = rushes("notify", "log", "--before", "msg_x")
    assert (unknown.exit_code, "no notice 'msg_x'" in unknown.stderr) == (2, True)
    assert "'given-up'" in rushes("notify", "log", "--state", "given").stderr


def test_a_notifier_that_never_ran_is_not_alive() -> None:
    answer = rushes("notify", "run", "--check")
    assert answer.exit_code == 1
    assert "no notifier has run here" in answer.output
