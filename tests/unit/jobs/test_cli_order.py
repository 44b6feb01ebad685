"""The commands that change the order and tell how long it takes."""

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import insert, select

from jobs import cli, database, lifecycle, queries, states, workers
from jobs.cli import exits
from jobs.schema import Attempt
from tests.registrations import registration

pytestmark = pytest.mark.usefixtures("no_broker", "db")


@pytest.fixture(autouse=True)
def _prompts() -> None:
    Path("p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "priority": 3}\n')


def rushes(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.main, [*arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def submit(*options: str) -> str:
    result = rushes("submit", "p.jsonl", "--preset", "tiny", "-q", *options)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def told(*arguments: str) -> Any:
    return json.loads(rushes(*arguments, "-o", "json").stdout)


def render(db: database.Database, job: str, *, seconds: float) -> None:
    with db.reading() as session:
        job_id = queries.find_job(session, job).id
    claim = db.write(lifecycle.claim, job_id, worker="w", lease_seconds=60)
    assert claim is not None
    db.write(
        lifecycle.rendered,
        claim.attempt_id,
        seconds={"denoise": seconds - 1, "decode": 1.0},
        peak_memory_bytes=None,
        lease_seconds=60,
    )
    video = lifecycle.StoredVideo(key="k", size_bytes=1, sha256="0" * 64)
    assert db.write(lifecycle.succeed, claim.attempt_id, video=video)


def register(db: database.Database, *names: str) -> None:
    for name in names:
        db.write(workers.register, registration(name, host="h"))


def test_pause_and_resume_tell_what_they_did(db: database.Database) -> None:
    batch_id = submit()
    assert f"batch {batch_id}: paused" in rushes("pause", "latest").stdout
    assert told("show", "latest")["state"] == "paused"
    of_batch = {"batch_id": batch_id, "job_id": None}
    assert told("pause", "latest") == {"paused": [of_batch | {"changed": False}]}
    assert f"batch {batch_id}: paused before" in rushes("pause", "latest").stdout
    assert told("resume", "latest") == {"resumed": [of_batch | {"changed": True}]}
    assert "not paused" in rushes("resume", "latest").stdout
    assert rushes("pause", "latest", "nothing").exit_code == exits.USAGE
    assert told("show", "latest")["paused_at"] is None
    rushes("cancel", "latest")
    assert f"batch {batch_id}: is finished" in rushes("pause", "latest").stdout


def test_a_single_job_is_paused_and_resumed(db: database.Database) -> None:
    submit()
    with db.reading() as session:
        job_id = queries.find_job(session, "latest/1").id
    assert f"job {job_id}: paused" in rushes("pause", "latest/1").stdout
    assert db.write(lifecycle.claim, job_id, worker="w", lease_seconds=60) is None
    assert f"job {job_id}: paused before" in rushes("pause", "latest/1").stdout
    assert "queued, paused" in rushes("show", "latest/1").stdout
    assert [told("show", f"latest/{number}")["is_paused"] for number in (0, 1)] == [False, True]
    assert told("show", "latest/1")["preset"] == "tiny"
    assert "queued, paused" in rushes("logs", "latest/1").stdout
    rushes("pause", "latest")
    rushes("resume", "latest")  # of the batch: not of a job that was paused by itself
    assert db.write(lifecycle.claim, job_id, worker="w", lease_seconds=60) is None
    (resumed,) = told("resume", "latest/1")["resumed"]
    assert (resumed["job_id"], resumed["changed"]) == (job_id, True)
    assert "not paused" in rushes("resume", "latest/1").stdout
    assert db.write(lifecycle.claim, job_id, worker="w", lease_seconds=60) is not None
    assert f"job {job_id}: does not wait: running" in rushes("pause", "latest/1").stdout


def test_prioritize_moves_batches_and_jobs(db: database.Database) -> None:
    first, second = submit(), submit("--priority", "1")
    assert f"batch {first}: priority 5" in rushes("prioritize", first, "--to", "5").stdout
    assert told("show", first)["priority"] == 5
    assert told("show", f"{first}/1")["priority"] == 8  # it had 3 of its own, the batch 0
    moved = told("prioritize", f"{second}/0", first, "--first")["prioritized"]
    assert [one["priority"] for one in moved] == [13, 9]
    assert told("show", f"{second}/0")["priority"] == 13
    rushes("cancel", second)
    assert "does not wait any more" in rushes("prioritize", f"{second}/0", "--first").stdout
    assert "is finished" in rushes("prioritize", second, "--to", "1").stdout


@pytest.mark.parametrize("options", [(), ("--to", "1", "--first"), ("--to", "101")])
def test_prioritize_needs_one_sound_wish(db: database.Database, options: tuple[str, ...]) -> None:
    submit()
    assert rushes("prioritize", "latest", *options).exit_code == exits.USAGE


def test_an_owner_is_the_option_the_setting_or_the_user(
    db: database.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told("show", submit("--owner", "ann"))["owner"] == "ann"
    monkeypatch.setenv("RUSHES_OWNER", "bob")
    assert told("show", submit())["owner"] == "bob"
    monkeypatch.delenv("RUSHES_OWNER")
    monkeypatch.setenv("LOGNAME", "carol")
    assert told("show", submit())["owner"] == "carol"


def test_blanks_around_an_owner_make_no_other_one(db: database.Database) -> None:
    assert told("show", submit("--owner", " ann "))["owner"] == "ann"
    for command in (
        ("submit", "p.jsonl", "--preset", "tiny"),
        ("schedule", "add", "nightly", "p.jsonl", "--cron", "0 2 * * *", "--preset", "tiny"),
        ("token", "create", "script"),
        ("notify", "add", "ci", "https://ci.example/x"),
    ):
        result = rushes(*command, "--owner", "  ")
        assert result.exit_code == exits.USAGE
        assert "'--owner': is blank" in result.stderr


def test_a_deadline_is_stored_and_told(db: database.Database) -> None:
    shown = told("show", submit("--deadline", "2h"))
    left = datetime.fromisoformat(shown["deadline_at"]) - datetime.now(UTC)
    assert timedelta(minutes=119) < left <= timedelta(hours=2)
    assert "deadline" in rushes("show", "latest").stdout
    result = rushes("submit", "p.jsonl", "--preset", "tiny", "--deadline", "yesterday")
    assert result.exit_code == exits.USAGE
    assert "--deadline: give a time such as 06:00" in result.stderr


def test_a_quota_refuses_a_submit_in_one_line(
    db: database.Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUSHES_MAX_QUEUED_PER_OWNER", "3")
    submit("--owner", "ann")
    result = rushes("submit", "p.jsonl", "--preset", "tiny", "--owner", "ann")
    assert result.exit_code == exits.USAGE
    assert "ann has 2 jobs queued and this would add 2 or more: at most 3" in result.stderr


def test_an_estimate_comes_from_what_the_same_look_took(db: database.Database) -> None:
    batch_id = submit()
    register(db, "gpu0@h", "gpu1@h")
    render(db, f"{batch_id}/0", seconds=10)
    render(db, f"{batch_id}/1", seconds=20)
    found = told("estimate", "p.jsonl", "--preset", "tiny", "--repeat", "8")
    assert found["jobs"] == 16
    assert found["gpu_hours"] == pytest.approx(16 * 15 / 3600, abs=1e-3)
    assert (found["workers"], found["seconds_left"]) == (2, 120.0)
    assert found["looks"][0]["measured"] == 2
    left = told("estimate", submit())
    assert (left["jobs"], left["seconds_left"]) == (2, 15.0)
    assert (
        "about 2 min 00 s"
        in rushes("estimate", "p.jsonl", "--preset", "tiny", "--repeat", "8").stdout
    )
    assert len(told("list")["batches"]) == 2  # nothing was stored by asking


def test_an_estimate_is_no_shorter_than_one_job(db: database.Database) -> None:
    register(db, "gpu0@h", "gpu1@h", "gpu2@h", "gpu3@h")
    render(db, f"{submit()}/0", seconds=20)
    assert told("estimate", submit())["seconds_left"] == 20.0


def test_an_estimate_finds_a_look_of_which_nothing_was_rendered_for_long(
    db: database.Database,
) -> None:
    render(db, f"{submit()}/0", seconds=20)
    with db.transaction() as session:
        one = session.scalars(select(Attempt)).one()
        attempt = {
            "job_id": one.job_id,
            "number": 2,
            "state": states.AttemptState.FAILED,
            "worker": "w",
            **dict.fromkeys(("started_at", "lease_until", "heartbeat_at"), one.started_at),
        }
        later = [{"id": one.id + number, **attempt} for number in range(1, 20_002)]
        session.execute(insert(Attempt), later)
    assert told("estimate", submit())["looks"][0]["mean_seconds"] == 20.0


def test_an_estimate_without_a_measurement_says_so(db: database.Database) -> None:
    submit()
    register(db, "gpu0@h")
    result = rushes("estimate", "latest")
    assert result.exit_code == 0
    assert "2 jobs of looks without a measured job here" in result.stderr
    assert "GPU hours" not in result.stdout
    found = told("estimate", "latest")
    assert (found["unmeasured_jobs"], found["seconds_left"], found["gpu_hours"]) == (2, None, 0)


def test_an_estimate_without_workers_knows_the_work_but_not_the_time(
    db: database.Database,
) -> None:
    batch_id = submit()
    render(db, f"{batch_id}/0", seconds=36)
    found = told("estimate", "latest")
    assert (found["gpu_hours"], found["workers"], found["seconds_left"]) == (0.01, 0, None)
