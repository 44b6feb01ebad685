"""The command line, as a person at a terminal and as a script meet it."""

import http.server
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from sqlalchemy import text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session

from jobs import (
    beat,
    cli,
    database,
    dispatch,
    errors,
    health,
    lifecycle,
    migrate,
    queries,
    reports,
    retries,
    settings,
    states,
    submission,
    watch,
    workers,
)
from jobs.cli import demo, display, exits, output, root, worker_commands
from jobs.schema import Batch, Worker
from tests.registrations import registration
from tests.waiting import until

GOOD = (
    '{"prompt": "a cat", "custom_id": "cat"}\n{"prompt": "a dog", "custom_id": "dog", "seed": 7}\n'
)

BAD = '{"prompt": "a cat"}\n{"promt": "x"}\n\n[1]\n'
pytestmark = pytest.mark.usefixtures("no_broker")
Rushes = Callable[..., Result]


@pytest.fixture
def rushes() -> Rushes:
    def run(*arguments: str, stdin: str | bytes | None = None) -> Result:
        result = CliRunner().invoke(cli.main, [*arguments], input=stdin)
        assert result.exception is None or isinstance(result.exception, SystemExit)
        assert "Traceback" not in result.output
        return result

    return run


@pytest.fixture
def prompts() -> str:
    Path("prompts.jsonl").write_text(GOOD)
    return "prompts.jsonl"


@dataclass
class Farm:
    """A batch of two jobs, and the moves that workers would make."""

    db: database.Database
    batch_id: str

    def claim(self, position: int) -> int:
        with self.db.reading() as session:
            job = queries.find_job(session, f"{self.batch_id}/{position}")
        claim = self.db.write(lifecycle.claim, job.id, worker="gpu0@host", lease_seconds=60)
        assert claim is not None
        return claim.attempt_id

    def succeed(self, position: int) -> None:
        video = lifecycle.StoredVideo(key="batches/x/video.mp4", size_bytes=5, sha256="0" * 64)
        self.db.write(lifecycle.succeed, self.claim(position), video=video)

    def fail(
        self,
        position: int,
        error: str = "the prompt is unusable",
        kind: states.FailureKind = states.FailureKind.INPUT,
    ) -> None:
        budgets = retries.Budgets(max_errors=1, max_crashes=1, retry_seconds=0)
        self.db.write(
            lifecycle.fail,
            self.claim(position),
            kind=kind,
            error=error,
            detail="line one of it\n  more",
            budgets=budgets,
        )

    def live_worker(self) -> None:
        row = registration(device="NVIDIA H200", memory_bytes=150_000_000_000)
        self.db.write(workers.register, row)


@pytest.fixture
def farm(db: database.Database, rushes: Rushes, prompts: str) -> Farm:
    result = rushes("submit", prompts, "--preset", "tiny", "-q")
    assert result.exit_code == 0, result.output
    return Farm(db, result.stdout.strip())


def parsed(result: Result) -> dict:
    return json.loads(result.stdout)


# The group.


def test_the_command_line_starts_without_heavy_libraries() -> None:
    heavy = "torch sqlalchemy celery boto3 rich pydantic alembic structlog redis"
    code = (
        "import sys; import jobs.cli; from click.testing import CliRunner; "
        "assert CliRunner().invoke(jobs.cli.main, ['--help']).exit_code == 0; "
        f"print([name for name in {heavy.split()} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_command_loads_torch() -> None:
    code = (
        "import sys; from jobs.cli import root; "
        "[root.main.get_command(None, name) for name in root.COMMANDS]; "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", root.COMMANDS)
def test_each_command_has_help_that_begins_like_its_summary(rushes: Rushes, name: str) -> None:
    result = rushes(name, "--help")
    assert result.exit_code == 0
    assert root.COMMANDS[name].summary.rstrip(".") in " ".join(result.stdout.split())


def test_help_lists_every_command(rushes: Rushes) -> None:
    listed = rushes("--help").stdout
    assert all(f"  {name} " in listed for name in root.COMMANDS)


def test_version_is_printed(rushes: Rushes) -> None:
    assert rushes("--version").stdout.startswith("rushes ")


@pytest.mark.parametrize(
    ("typed", "meant"), [("lst", "list"), ("sumbit", "submit"), ("status", "show"), ("ls", "list")]
)
def test_a_mistyped_command_is_answered_with_the_right_one(
    rushes: Rushes, typed: str, meant: str
) -> None:
    result = rushes(typed)
    assert result.exit_code == exits.USAGE
    assert f"id you mean '{meant}'?" in result.stderr


def test_a_usage_error_is_json_where_json_is_asked_for(rushes: Rushes) -> None:
    result = rushes("list", "-o", "json", "--nonsense")
    assert result.exit_code == exits.USAGE
    assert parsed(result)["error"]["exit_code"] == exits.USAGE


def test_without_a_database_the_first_step_is_named(rushes: Rushes) -> None:
    result = rushes("list")
    assert result.exit_code == exits.ERROR
    assert "rushes up" in result.stderr
    assert "rushes migrate" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not settings.load().home.exists()


@pytest.mark.parametrize(
    "command", ["list", "show latest", "wait latest", "cancel latest", "workers", "logs 1"]
)
def test_an_empty_database_is_one_line(rushes: Rushes, command: str) -> None:
    home = settings.load().home
    home.mkdir(parents=True)
    (home / "rushes.db").touch()
    result = rushes(*command.split())
    assert result.exit_code == exits.ERROR
    assert "run `rushes migrate`" in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_of_tables_of_an_older_version_gc_says_what_to_do(
    db: database.Database, rushes: Rushes
) -> None:
    migrate.downgrade(db, revision="0009")
    result = rushes("gc", "--only", "notices")
    assert result.exit_code == exits.ERROR
    (told,) = [line for line in result.stderr.splitlines() if line.startswith("notices: ")]
    assert "no such table: notices: its tables are missing or older" in told
    assert "run `rushes migrate`" in told


@pytest.mark.parametrize("pragma", ["query_only = ON", "max_page_count = 1"])
def test_a_disk_that_is_full_or_read_only_is_told(
    db: database.Database, rushes: Rushes, monkeypatch: pytest.MonkeyPatch, pragma: str
) -> None:
    prepare = database._use_wal

    def limited(connection: sqlite3.Connection) -> None:
        prepare(connection)
        connection.execute(f"PRAGMA {pragma}")

    monkeypatch.setattr(database, "_use_wal", limited)
    Path("many.txt").write_text("a cat\n" * 5000)
    result = rushes("submit", "many.txt", "--preset", "tiny")
    assert result.exit_code == exits.ERROR
    assert "is its disk full or read-only?" in result.stderr


def test_a_file_that_is_no_database_is_one_line(rushes: Rushes) -> None:
    home = settings.load().home
    home.mkdir(parents=True)
    (home / "rushes.db").write_text("no database, only prose\n" * 100)
    result = rushes("list", "-o", "json")
    assert result.exit_code == exits.ERROR
    assert parsed(result)["error"]["kind"] == "DatabaseUnavailable"


def test_a_server_that_is_down_is_one_line_without_password(
    rushes: Rushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://me:secret@127.0.0.1:1/rushes")
    result = rushes("list")
    assert result.exit_code == exits.ERROR
    assert "DATABASE_URL" in result.stderr
    assert "secret" not in result.output
    assert len(result.stderr.splitlines()) == 1


def test_a_wrong_setting_is_told_by_its_name(
    rushes: Rushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUSHES_WINDOW", "none")
    result = rushes("list")
    assert result.exit_code == exits.USAGE
    assert "RUSHES_WINDOW" in result.stderr


def test_a_defect_is_one_line_that_says_so(
    db: database.Database, rushes: Rushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise KeyError("lost")

    monkeypatch.setattr(queries, "batches", broken)
    result = rushes("list")
    assert result.exit_code == exits.ERROR
    assert "KeyError: 'lost' (this is a defect in rushes; RUSHES_DEBUG=1" in result.stderr


def test_a_closed_pipe_is_quiet(farm: Farm) -> None:
    command = f"{sys.executable} -m jobs show latest -o json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("shell", "code"),
    [
        ("presets -o json > /dev/full", exits.ERROR),
        ("presets > /dev/full", exits.ERROR),
        ("list --nonsense -o json > /dev/full", exits.USAGE),
        ("list --nonsense -o json | true; exit ${PIPESTATUS[0]}", exits.USAGE),
        ("list --nonsense 2> /dev/full", exits.USAGE),
        ("list --nonsense -o json >&- 2>&-", exits.USAGE),
        ("presets -o json >&-", exits.OK),
    ],
)
def test_the_exit_code_is_right_where_nothing_can_be_written(shell: str, code: int) -> None:
    command = ["bash", "-c", f"{sys.executable} -m jobs {shell}"]
    environment = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == code, done.stderr
    assert len(done.stderr.splitlines()) <= 1, done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("submit p.txt --preset", "Option '--preset' requires an argument. See `rushes submit"),
        ("schedule add x --cron", "Option '--cron' requires an argument. See `rushes schedule"),
        ("-o json list", "-o goes after the command: `rushes COMMAND -o json`"),
        ("--output=json list", "--output goes after the command: `rushes COMMAND -o json`"),
        ("schedule -o json list", "-o goes after the command: `rushes schedule COMMAND -o json`"),
        ("wait latest --timeout abc", "'abc' is not a valid number of seconds."),
        ("list --limit abc", "'abc' is not a valid whole number."),
    ],
)
def test_what_is_told_of_wrong_arguments(rushes: Rushes, arguments: str, told: str) -> None:
    result = rushes(*arguments.split())
    assert (result.exit_code, told in result.stderr) == (exits.USAGE, True), result.stderr


@pytest.mark.parametrize("buffering", [{}, {"PYTHONUNBUFFERED": "1"}])
def test_a_full_disk_is_told_as_that_of_the_output(buffering: dict[str, str]) -> None:
    command = ["bash", "-c", f"{sys.executable} -m jobs presets > /dev/full"]
    usual = {name: os.environ[name] for name in os.environ if name != "PYTHONUNBUFFERED"}
    environment = usual | buffering
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.stderr == "error: standard output: No space left on device\n"


# submit


def test_submit_stores_a_batch_while_redis_is_down(
    db: database.Database, rushes: Rushes, prompts: str
) -> None:
    result = rushes("submit", prompts, "--preset", "tiny", "--name", "night")
    assert result.exit_code == 0
    assert ": 2 jobs queued" in result.stdout
    assert "Connection refused; the jobs are stored" in result.stderr
    assert "no live worker takes from rushes.render.tiny" in result.stderr
    assert "RUSHES_PRESETS_DIR" not in result.stderr
    with db.reading() as session:
        assert queries.find_batch(session, "latest").name == "night"


def test_a_model_at_a_path_of_its_own_is_found_by_a_preset_alone(
    db: database.Database, rushes: Rushes, prompts: str, tmp_path: Path
) -> None:
    preset = tmp_path / "mine.json"
    preset.write_text(json.dumps({"model_path": str(tmp_path / "elsewhere" / "tiny")}))
    result = rushes("submit", prompts, "--preset", str(preset))
    assert result.exit_code == 0
    assert "that have a preset naming it in RUSHES_PRESETS_DIR" in result.stderr


def test_a_stored_batch_is_told_though_the_database_goes_away(
    db: database.Database, rushes: Rushes, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OperationalError("SELECT 1", {}, Exception("server closed the connection"))

    monkeypatch.setattr(queries, "queues_without_workers", away)
    result = rushes("submit", prompts, "--preset", "tiny", "-o", "json")
    assert result.exit_code == 0
    told = parsed(result)
    assert "then the database went away (server closed the connection)" in told["notes"][-1]
    with db.reading() as session:
        assert queries.find_batch(session, told["batch_id"]).total == 2


def test_a_submit_of_which_nothing_is_known_says_how_to_find_out(
    rushes: Rushes, db: database.Database, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(db: database.Database, batch_id: str, _: object) -> None:
        raise submission.AnswerLost(db.url, batch_id)

    def broken(_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    arm = submission._transaction

    def armed(session: Session) -> str:
        monkeypatch.setattr(session.get_bind().dialect, "do_commit", broken)
        return arm(session)

    monkeypatch.setattr(submission, "_is_stored", lost)
    monkeypatch.setattr(submission, "_transaction", armed)
    result = rushes("submit", prompts, "--preset", "tiny", "-o", "json")
    assert result.exit_code == exits.ERROR
    error = parsed(result)["error"]
    assert error["kind"] == "AnswerLost"
    assert f"`rushes show {error['batch_id']}` tells" in error["message"]


def test_submit_prints_the_id_alone_when_quiet(farm: Farm) -> None:
    with farm.db.reading() as session:
        assert queries.find_batch(session, "latest").id == farm.batch_id


def test_submit_as_json(db: database.Database, rushes: Rushes, prompts: str) -> None:
    told = parsed(rushes("submit", prompts, "--preset", "tiny", "--repeat", "3", "-o", "json"))
    assert (told["prompts"], told["jobs"], told["is_new"]) == (2, 6, True)
    assert list(told["looks"].values()) == [6]
    assert any("no live worker" in note for note in told["notes"])


def test_a_time_zone_that_no_clock_can_have_is_named(db: database.Database, rushes: Rushes) -> None:
    assert rushes("submit", "-", "--preset", "tiny", stdin=GOOD).exit_code == exits.OK
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "list"],
        env={**os.environ, "TZ": "UTC+25:61"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == exits.USAGE
    assert "TZ=UTC+25:61 is a day or more from UTC" in done.stderr
    assert "defect" not in done.stderr


def test_submit_reads_stdin(db: database.Database, rushes: Rushes) -> None:
    result = rushes("submit", "-", "--preset", "tiny", stdin=GOOD)
    assert ": 2 jobs queued" in result.stdout


@pytest.mark.parametrize("command", ["submit - --preset tiny", "notify add ops -"])
def test_a_closed_stdin_is_told(db: database.Database, command: str) -> None:
    line = f"{sys.executable} -m jobs {command} <&-"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.returncode, "defect" in done.stderr) == (2, False), done.stderr


def test_submit_reads_a_pipe_that_cannot_be_read_twice(db: database.Database) -> None:
    command = f"{sys.executable} -m jobs submit <(printf 'a cat\\na dog\\n') --preset tiny -q"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    with db.reading() as session:
        assert queries.find_batch(session, done.stdout.strip()).total == 2


def test_submit_tells_every_bad_line_and_stores_nothing(
    db: database.Database, rushes: Rushes
) -> None:
    Path("bad.jsonl").write_text(BAD)
    result = rushes("submit", "bad.jsonl", "--preset", "tiny")
    assert result.exit_code == exits.USAGE
    lines = result.stderr.splitlines()
    assert [line.split(": ")[0] for line in lines] == ["bad.jsonl:2", "bad.jsonl:4", "error"]
    assert lines[-1] == "error: 2 problems in bad.jsonl: nothing was done"
    assert parsed(rushes("list", "-o", "json")) == {"batches": []}


def test_bad_lines_as_json(db: database.Database, rushes: Rushes) -> None:
    Path("bad.jsonl").write_text(BAD)
    result = rushes("submit", "bad.jsonl", "--preset", "tiny", "--output", "json")
    assert result.exit_code == exits.USAGE
    problems = parsed(result)["error"]["problems"]
    assert [problem["line"] for problem in problems] == [2, 4]


def test_submit_leaves_bad_lines_out_when_asked_to(db: database.Database, rushes: Rushes) -> None:
    Path("bad.jsonl").write_text(BAD)
    result = rushes("submit", "bad.jsonl", "--preset", "tiny", "--skip-invalid")
    assert result.exit_code == 0
    assert ": 1 job queued" in result.stdout
    assert "bad.jsonl:4: must be an object" in result.stderr
    tried = rushes("submit", "bad.jsonl", "--preset", "tiny", "--skip-invalid", "--dry-run").stdout
    assert tried.startswith("bad.jsonl is good but for 2 bad lines: 1 prompt, 1 job, ")


def test_a_missing_preset_lists_what_there_is(rushes: Rushes, prompts: str) -> None:
    result = rushes("submit", prompts)
    assert result.exit_code == exits.USAGE
    assert "tiny" in result.stderr
    assert "wan_t2v_distill_4step_cfg" in result.stderr


def test_a_missing_preset_lists_no_broken_ones(
    rushes: Rushes, prompts: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine").mkdir()
    Path("mine/wrong.json").write_text('{"stps": 4}')
    monkeypatch.setenv("RUSHES_PRESETS_DIR", "mine")
    assert "wrong" not in rushes("submit", prompts).stderr


def test_a_mistyped_preset_is_answered_with_the_right_one(rushes: Rushes, prompts: str) -> None:
    result = rushes("submit", prompts, "--preset", "tinny")
    assert result.exit_code == exits.USAGE
    assert "did you mean 'tiny'?" in result.stderr


@pytest.mark.parametrize(
    ("file", "said"),
    [
        (".", "is a folder"),
        ("/dev/zero", "is a device"),
        ("none.jsonl", "there is no such file"),
        ("a\0b", "cannot be read"),
        ("prompts.jsonl/x", "cannot be read"),
        ("x" * 5000, "cannot be read"),
    ],
)
def test_a_bad_path_is_one_line(rushes: Rushes, prompts: str, file: str, said: str) -> None:
    result = rushes("submit", file, "--preset", "tiny")
    assert result.exit_code == exits.USAGE
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_one_line(rushes: Rushes, prompts: str) -> None:
    Path(prompts).chmod(0)
    result = rushes("submit", prompts, "--preset", "tiny")
    assert result.exit_code == exits.USAGE
    assert "Permission denied" in result.stderr


@pytest.mark.parametrize("name", ["empty.jsonl", "empty.csv", "empty.txt"])
def test_an_empty_file_is_refused(db: database.Database, rushes: Rushes, name: str) -> None:
    Path(name).touch()
    result = rushes("submit", name, "--preset", "tiny")
    assert result.exit_code == exits.USAGE
    assert "no prompts" in result.stderr


def test_a_dry_run_stores_nothing_and_needs_no_database(rushes: Rushes, prompts: str) -> None:
    result = rushes("submit", prompts, "--preset", "tiny", "--dry-run")
    assert result.exit_code == 0
    assert "2 prompts, 2 jobs" in result.stdout
    told = parsed(rushes("submit", prompts, "--preset", "tiny", "--dry-run", "-o", "json"))
    assert told["dry_run"] is True
    assert told["batch_id"] is None
    assert not settings.load().home.exists()


def test_submitting_again_with_the_same_key_gives_the_same_batch(
    db: database.Database, rushes: Rushes, prompts: str
) -> None:
    arguments = ("submit", prompts, "--preset", "tiny", "--idempotency-key", "k", "-o", "json")
    first, second = parsed(rushes(*arguments)), parsed(rushes(*arguments))
    assert first["batch_id"] == second["batch_id"]
    assert (first["is_new"], second["is_new"]) == (True, False)
    Path(prompts).write_text(GOOD + '{"prompt": "a cow"}\n')
    conflict = rushes(*arguments)
    assert conflict.exit_code == exits.USAGE
    assert parsed(conflict)["error"]["kind"] == "IdempotencyConflict"


def test_submit_says_that_a_negative_prompt_has_no_effect(
    db: database.Database, rushes: Rushes
) -> None:
    Path("p.jsonl").write_text('{"prompt": "a cat", "negative_prompt": "blur"}\n')
    result = rushes("submit", "p.jsonl", "--preset", "tiny", "-q")
    assert "has no effect" in result.stderr
    assert len(result.stdout.split()) == 1


def test_submit_and_wait_ends_with_124_in_time(
    db: database.Database, rushes: Rushes, prompts: str
) -> None:
    result = rushes("submit", prompts, "--preset", "tiny", "--wait", "--timeout", "0.1")
    assert result.exit_code == exits.TIMEOUT
    assert "it goes on" in result.stderr


def test_who_waits_for_json_knows_the_batch_whatever_ends_the_wait(
    db: database.Database, rushes: Rushes, prompts: str
) -> None:
    given = ("submit", prompts, "--preset", "tiny", "--wait", "--timeout", "0.1")
    result = rushes(*given, "-qojson")
    batch_id = parsed(result)["error"]["batch_id"]
    assert f"batch {batch_id}: 2 jobs queued" in result.stderr.splitlines()
    with db.reading() as session:
        assert queries.find_batch(session, "latest").id == batch_id


@pytest.mark.parametrize("options", ["--timeout 1", "--dry-run --wait", "--dry-run --timeout 1"])
def test_a_wait_for_nothing_is_refused(rushes: Rushes, prompts: str, options: str) -> None:
    result = rushes("submit", prompts, "--preset", "tiny", *options.split())
    assert result.exit_code == exits.USAGE


@pytest.mark.parametrize(
    "command",
    [
        *("doctor --preset=", "migrate --revision=", "distill "),
        *("quantize ", "quantize --to= tiny", "render --to= prompts.jsonl --preset tiny"),
    ],
)
def test_an_empty_value_is_refused(rushes: Rushes, prompts: str, command: str) -> None:
    result = rushes(*command.split(" "))
    assert result.exit_code == exits.USAGE
    assert "is empty" in result.stderr


# list, show, logs


def test_list_is_newest_first_and_pages(
    db: database.Database, rushes: Rushes, prompts: str
) -> None:
    ids = [rushes("submit", prompts, "--preset", "tiny", "-q").stdout.strip() for _ in range(3)]
    told = parsed(rushes("list", "--limit", "2", "-o", "json"))["batches"]
    assert [batch["batch_id"] for batch in told] == ids[:0:-1]
    older = parsed(rushes("list", "--before", ids[1], "-o", "json"))["batches"]
    assert [batch["batch_id"] for batch in older] == [ids[0]]
    assert ids[2] in rushes("list").stdout


def listed(rushes: Rushes, *options: str) -> list[str]:
    return [batch["name"] for batch in parsed(rushes("list", *options, "-o", "json"))["batches"]]


def test_list_chooses_by_state_owner_and_time(
    db: database.Database, rushes: Rushes, prompts: str
) -> None:
    for name, owner in (("one", "ann"), ("two", "ben"), ("three", "ben")):
        assert not rushes(
            "submit", prompts, "--preset", "tiny", "--name", name, "--owner", owner
        ).exit_code
    assert "OWNER" in rushes("list").stdout
    assert rushes("cancel", "latest").exit_code == 0
    assert listed(rushes, "--state", "cancelled") == ["three"]
    assert listed(rushes, "--state", "cancelled", "--state", "queued") == ["three", "two", "one"]
    assert listed(rushes, "--owner", "ben", "--state", "queued") == ["two"]
    with db.transaction() as session:
        session.execute(
            update(Batch).where(Batch.name == "one").values(created_at=Batch.created_at)
        )
        one = session.query(Batch).filter_by(name="one").one()
        one.created_at -= timedelta(days=2)
    assert listed(rushes, "--since", "1d") == ["three", "two"]
    assert listed(rushes, "--since", "3d") == ["three", "two", "one"]
    page = rushes("list", "--owner", "ben", "--since", "1d", "--limit", "1")
    assert "OWNER" not in page.stdout
    assert page.stdout.splitlines()[0].split()[2:6] == ["JOBS", "DONE", "FAILED", "CANCELLED"]
    assert page.stdout.splitlines()[1].split()[2:6] == ["2", "0", "0", "2"]
    following = page.stderr.partition("older ones: rushes ")[2].split()
    assert following[:5] == ["list", "--owner", "ben", "--since", "1d"]
    assert listed(rushes, *following[1:]) == ["two"]
    assert "no such batches" in rushes("list", "--owner", "cem").stderr


@pytest.mark.parametrize(
    ("option", "told"),
    [
        (("--state", "done"), "'succeeded', 'partially_failed'"),
        (("--since", "lately"), "12h or 3d"),
    ],
)
def test_list_refuses_what_chooses_nothing_with_what_would_do(
    db: database.Database, rushes: Rushes, option: tuple[str, str], told: str
) -> None:
    result = rushes("list", *option)
    assert result.exit_code == exits.USAGE
    assert told in " ".join(result.stderr.split())


def test_a_custom_id_without_its_batch_is_told_how_to_name_it(farm: Farm, rushes: Rushes) -> None:
    for command in ("show", "logs", "cancel", "retry"):
        result = rushes(command, "cat")
        assert result.exit_code == exits.USAGE
        assert f"no batch 'cat'; the job of this custom_id: {farm.batch_id}/cat" in result.stderr
    assert rushes("show", f"{farm.batch_id}/cat").exit_code == 0
    assert "`rushes list` shows what there is" in rushes("show", "cow").stderr


def test_list_without_batches_says_so_beside_the_output(
    db: database.Database, rushes: Rushes
) -> None:
    result = rushes("list")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "no batches yet" in result.stderr


def test_show_tells_a_batch_and_what_failed(farm: Farm, rushes: Rushes) -> None:
    farm.claim(0)
    farm.fail(1)
    result = rushes("show", farm.batch_id)
    assert result.exit_code == 0
    assert "gpu0@host" in result.stdout
    assert "the prompt is unusable" in result.stdout
    told = parsed(rushes("show", "latest", "-o", "json"))
    assert told["counts"]["failed"] == 1
    assert told["running"][0]["custom_id"] == "cat"
    assert told["failed"][0]["error"]["kind"] == "input"
    assert told["failed"][0]["worker"] == "gpu0@host"
    assert told["failed"][0]["finished_at"]


def test_show_names_failed_jobs_of_a_kind(farm: Farm, rushes: Rushes) -> None:
    farm.fail(0)
    farm.fail(1, "Xid 79", states.FailureKind.DEVICE)
    told = parsed(rushes("show", "latest", "--kind", "device", "-o", "json"))
    assert [job["custom_id"] for job in told["failed"]] == ["dog"]
    assert len(told["failures"]) == 2
    assert "more failed" not in rushes("show", "latest", "--kind", "device").stdout
    both = rushes("show", "latest", "--kind", "device", "--kind", "input", "--limit", "1")
    assert "and 1 more failed: --limit 2" in both.stdout
    result = rushes("show", "latest/dog", "--kind", "device")
    assert result.exit_code == exits.USAGE
    assert "give it a BATCH" in result.stderr


def test_show_tells_what_failures_have_in_common_and_which_a_retry_may_help(
    farm: Farm, rushes: Rushes
) -> None:
    farm.fail(0)
    farm.fail(1, "Xid 79", states.FailureKind.DEVICE)
    result = rushes("show", "latest", "--limit", "0")
    table = result.stdout.partition("why jobs failed:\n")[2].splitlines()
    assert [line.split() for line in table[1:3]] == [
        ["1", "device", "may", "help", "1", "on", "gpu0@host", "Xid", "79"],
        ["1", "input", "no", "use", "on", "1", "worker", "the", "prompt", "is", "unusable"],
    ]
    assert "and 2 more failed: --limit 2" in result.stdout
    command = f"rushes retry {farm.batch_id} --kind device"
    assert f"a retry may help 1 failed job: {command}\n" in result.stderr
    told = parsed(rushes("show", "latest", "-o", "json"))["failures"]
    assert [(group["kind"], group["may_go_well"]) for group in told] == [
        ("device", True),
        ("input", False),
    ]
    assert parsed(rushes(*command.split()[1:], "-o", "json"))["retried"] == 1
    assert "a retry may help" not in rushes("show", "latest").stderr


def test_show_names_as_many_running_jobs_as_failed_ones(farm: Farm, rushes: Rushes) -> None:
    farm.claim(0)
    farm.claim(1)
    told = rushes("show", "latest", "--limit", "1").stdout
    assert told.count("gpu0@host") == 1
    assert "and 1 more running: --limit 2" in told
    assert "running:\n" not in rushes("show", "latest", "--limit", "0").stdout
    assert len(parsed(rushes("show", "latest", "--limit", "1", "-o", "json"))["running"]) == 2
    assert rushes("show", "latest", "--limit", "20000").exit_code == 0


def test_show_hints_at_a_queue_without_worker(farm: Farm, rushes: Rushes) -> None:
    assert "no live worker" in rushes("show", "latest").stderr
    farm.live_worker()
    assert rushes("show", "latest").stderr == ""


def test_show_tells_a_job(farm: Farm, rushes: Rushes) -> None:
    farm.succeed(1)
    told = parsed(rushes("show", f"{farm.batch_id}/dog", "-o", "json"))
    assert (told["seed"], told["state"]) == (7, "succeeded")
    assert told["video"]["url"].endswith("batches/x/video.mp4")
    assert told["attempts"][0]["worker"] == "gpu0@host"
    assert rushes("show", str(told["job_id"])).stdout.count("a dog") == 1


@pytest.mark.parametrize("command", ["show", "logs", "cancel", "retry"])
@pytest.mark.parametrize("reference", ["nothing", "99", "latest/nothing", "", "26", "%"])
def test_an_unknown_reference_is_a_line_and_code_2(
    farm: Farm, rushes: Rushes, command: str, reference: str
) -> None:
    result = rushes(command, reference)
    assert result.exit_code == exits.USAGE
    assert len(result.stderr.splitlines()) == 1
    as_json = rushes(command, reference, "-o", "json")
    assert parsed(as_json)["error"]["kind"] == "NotFound"


@pytest.mark.parametrize("command", ["watch", "wait", "download"])
def test_an_unknown_batch_is_a_line_and_code_2(farm: Farm, rushes: Rushes, command: str) -> None:
    result = rushes(command, "nothing")
    assert result.exit_code == exits.USAGE
    assert "rushes list" in result.stderr


def test_what_a_submitter_wrote_cannot_command_the_terminal(
    db: database.Database, rushes: Rushes
) -> None:
    Path("p.jsonl").write_text(json.dumps({"prompt": "red \x1b[31m\ntwo ‮"}) + "\n")
    rushes("submit", "p.jsonl", "--preset", "tiny")
    for command in ("show latest/0", "show latest", "logs latest/0"):
        shown = rushes(*command.split()).stdout
        assert "\x1b" not in shown
        assert "‮" not in shown


def test_logs_tell_the_story_of_a_job(farm: Farm, rushes: Rushes) -> None:
    farm.fail(0)
    told = rushes("logs", f"{farm.batch_id}/cat").stdout
    assert "attempt 1 on gpu0@host: failed" in told
    assert "input: the prompt is unusable" in told
    assert "| line one of it" in told


def test_a_list_is_printed_as_a_whole_document(capsys: pytest.CaptureFixture[str]) -> None:
    head: dict[str, object] = {"batch_id": "b", "null": None}
    for values in ([], [1], [{"a": [], "b": "x\n"}, None, [2]]):
        output.emit_list(head, "attempts", iter(values))
        found = capsys.readouterr().out
        output.emit(head | {"attempts": values})
        assert found == capsys.readouterr().out


def test_a_list_that_breaks_off_is_closed(capsys: pytest.CaptureFixture[str]) -> None:
    def values(number: int) -> Iterator[int]:
        yield from range(number)
        raise LookupError

    for number, printed in ((0, None), (2, {"a": 1, "values": [0, 1]})):
        with pytest.raises(LookupError):
            output.emit_list({"a": 1}, "values", values(number))
        out = capsys.readouterr().out
        assert (json.loads(out) if out else None) == printed


def test_logs_of_a_batch_are_in_order_and_can_be_filtered(farm: Farm, rushes: Rushes) -> None:
    farm.succeed(0)
    farm.fail(1)
    told = parsed(rushes("logs", "latest", "-o", "json"))["attempts"]
    assert [attempt["custom_id"] for attempt in told] == ["cat", "dog"]
    wrong = parsed(rushes("logs", "latest", "--failed-only", "-o", "json"))["attempts"]
    assert [attempt["custom_id"] for attempt in wrong] == ["dog"]
    assert "| line one" not in rushes("logs", "latest").stdout
    assert "| line one" in rushes("logs", "latest", "--detail").stdout


# wait, watch


def test_wait_tells_success_by_its_exit_code(farm: Farm, rushes: Rushes) -> None:
    farm.succeed(0)
    farm.succeed(1)
    result = rushes("wait", "latest")
    assert result.exit_code == exits.OK
    assert "2 of 2 succeeded" in result.stdout
    assert parsed(rushes("wait", "latest", "-o", "json"))["state"] == "succeeded"


def test_wait_tells_failures_by_its_exit_code(farm: Farm, rushes: Rushes) -> None:
    farm.succeed(0)
    farm.fail(1)
    assert rushes("wait", "latest").exit_code == exits.FINISHED_WITH_FAILURES


def test_wait_tells_cancellation_by_its_exit_code(farm: Farm, rushes: Rushes) -> None:
    rushes("cancel", "latest")
    assert rushes("wait", "latest").exit_code == exits.CANCELLED


def test_wait_ends_with_124_in_time(farm: Farm, rushes: Rushes) -> None:
    began = time.monotonic()
    result = rushes("wait", "latest", "--timeout", "0.3")
    assert result.exit_code == exits.TIMEOUT
    assert time.monotonic() - began < 3
    as_json = rushes("wait", "latest", "--timeout", "0", "-o", "json")
    assert parsed(as_json)["error"]["kind"] == "WaitTimeout"


@pytest.mark.parametrize("option", ["--timeout", "--interval"])
@pytest.mark.parametrize("seconds", ["nan", "inf"])
def test_waiting_for_no_number_of_seconds_is_refused(
    farm: Farm, rushes: Rushes, option: str, seconds: str
) -> None:
    result = rushes("wait", "latest", option, seconds)
    assert result.exit_code == exits.USAGE
    assert "not a number of seconds" in result.stderr


def test_watch_writes_plain_lines_where_there_is_no_terminal(farm: Farm, rushes: Rushes) -> None:
    farm.succeed(0)
    farm.fail(1)
    result = rushes("watch", "latest")
    assert result.exit_code == exits.FINISHED_WITH_FAILURES
    assert len(result.stdout.splitlines()) == 1
    assert "1 of 2 succeeded, 1 failed" in result.stdout
    assert "\x1b" not in result.stdout


def test_watch_as_json_is_a_line_per_change(farm: Farm) -> None:
    command = [sys.executable, "-m", "jobs", "watch", "latest", "-o", "json", "--interval", "0.05"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        first = json.loads(process.stdout.readline())
        farm.succeed(0)
        farm.succeed(1)
        last = [json.loads(line) for line in process.stdout][-1]
    assert (first["state"], last["state"]) == ("queued", "succeeded")
    assert process.returncode == exits.OK


@pytest.mark.parametrize("reference", ["latest", "nothing"])
def test_watch_as_json_ends_with_an_error_in_one_line(
    farm: Farm, rushes: Rushes, reference: str
) -> None:
    result = rushes("watch", reference, "-o", "json", "--timeout", "0.1")
    assert "error" in [json.loads(line) for line in result.stdout.splitlines()][-1]


def test_watch_is_drawn_in_place_on_a_terminal(farm: Farm) -> None:
    farm.succeed(0)
    attempt_id = farm.claim(1)
    farm.db.write(
        lifecycle.heartbeat, attempt_id, lease_seconds=60, stage="denoise", step=3, steps=4
    )
    reader, terminal = os.openpty()
    command = [sys.executable, "-m", "jobs", "watch", "latest", "--timeout", "0.5"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    done = subprocess.run(
        command, stdout=terminal, stderr=subprocess.PIPE, env=environment, check=False
    )
    os.close(terminal)
    drawn = os.read(reader, 100_000).decode()
    os.close(reader)
    assert done.returncode == exits.TIMEOUT
    assert "1 of 2 succeeded, 1 running" in drawn
    assert "3/4" in drawn
    assert "gpu0@host" in drawn


def test_submit_and_wait_tells_the_end(db: database.Database, prompts: str) -> None:
    arguments = ["submit", prompts, "--preset", "tiny", "--wait", "-o", "json"]
    with subprocess.Popen([sys.executable, "-m", "jobs", *arguments], stdout=-1) as process:
        deadline = time.monotonic() + 20
        batch_id = None
        while batch_id is None:
            assert time.monotonic() < deadline
            with db.reading() as session:
                batch_id = next((row.id for row in queries.batches(session, limit=1)), None)
        farm = Farm(db, batch_id)
        farm.succeed(0)
        farm.fail(1)
        told = json.loads(process.communicate(timeout=20)[0])
    assert process.returncode == exits.FINISHED_WITH_FAILURES
    assert told["batch"]["state"] == "partially_failed"


def test_a_wait_outlasts_a_restart_of_the_database(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, looks = watch.look, []

    def look(db: database.Database, batch_id: str) -> watch.Snapshot:
        looks.append(batch_id)
        if len(looks) == 2:
            farm.succeed(0)
            farm.succeed(1)
            raise OperationalError("SELECT 1", {}, Exception("server closed the connection"))
        return real(db, batch_id)

    monkeypatch.setattr(watch, "look", look)
    seen = list(watch.until_finished(farm.db, farm.batch_id, interval_seconds=0.01))
    assert [snapshot.is_finished for snapshot in seen] == [False, True]
    assert len(looks) == 3


def test_ctrl_c_ends_a_wait_with_130_and_a_word(farm: Farm) -> None:
    command = [sys.executable, "-m", "jobs", "watch", "latest"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=20)
    assert process.returncode == exits.INTERRUPTED
    assert said.strip().endswith("interrupted")
    assert "Traceback" not in said


# cancel, retry


def test_cancel_tells_what_it_did(farm: Farm, rushes: Rushes) -> None:
    farm.claim(0)
    result = rushes("cancel", "latest")
    assert result.exit_code == 0
    assert "1 job cancelled, 1 running: asked to stop" in result.stdout
    assert "nothing to cancel" in rushes("cancel", "latest/1").stdout


def test_cancel_touches_nothing_when_one_reference_is_wrong(farm: Farm, rushes: Rushes) -> None:
    assert rushes("cancel", "latest", "nothing").exit_code == exits.USAGE
    assert parsed(rushes("show", "latest", "-o", "json"))["counts"]["queued"] == 2


def test_cancel_of_jobs_as_json(farm: Farm, rushes: Rushes) -> None:
    told = parsed(rushes("cancel", "latest/cat", "latest/dog", "-o", "json"))["cancelled"]
    assert [outcome["cancelled"] for outcome in told] == [1, 1]
    assert parsed(rushes("show", "latest", "-o", "json"))["state"] == "cancelled"


def test_a_job_that_is_named_twice_is_cancelled_once(farm: Farm, rushes: Rushes) -> None:
    farm.claim(1)
    given = ("latest/cat", "latest/cat", "latest/dog", "latest", "latest/dog", "latest/cat")
    told = parsed(rushes("cancel", *given, "-o", "json"))["cancelled"]
    assert sum(outcome["cancelled"] for outcome in told) == 1
    jobs = [outcome["stopping"] for outcome in told if outcome["job_id"]]
    assert sum(jobs) == 1


def test_retry_takes_the_failed_jobs_alone(farm: Farm, rushes: Rushes) -> None:
    farm.fail(0)
    rushes("cancel", "latest/dog")
    assert parsed(rushes("retry", "latest", "-o", "json"))["retried"] == 1
    assert parsed(rushes("retry", "latest", "-o", "json"))["retried"] == 0
    assert parsed(rushes("retry", "latest", "--cancelled", "-o", "json"))["retried"] == 1
    assert parsed(rushes("show", "latest", "-o", "json"))["counts"]["queued"] == 2


def test_retry_of_a_job(farm: Farm, rushes: Rushes) -> None:
    farm.fail(0)
    assert "queued again" in rushes("retry", "latest/cat").stdout
    result = rushes("retry", "latest/cat")
    assert result.exit_code == 0
    assert "is queued: nothing to retry" in result.stdout


def test_retry_of_a_job_that_is_not_as_asked_for_does_nothing(farm: Farm, rushes: Rushes) -> None:
    farm.fail(0)
    rushes("cancel", "latest/dog")
    assert "is cancelled, not failed" in rushes("retry", "latest/dog", "--failed-only").stdout
    assert "is failed, not cancelled" in rushes("retry", "latest/cat", "--cancelled").stdout
    assert "queued again" in rushes("retry", "latest/cat", "--failed-only").stdout
    both = ("--failed-only", "--cancelled")
    assert "queued again" in rushes("retry", "latest/dog", *both).stdout


def test_retry_takes_several_names_and_none_of_them_when_one_is_wrong(
    farm: Farm, rushes: Rushes
) -> None:
    farm.fail(0)
    farm.fail(1)
    assert rushes("retry", "latest/cat", "latest/bird").exit_code == exits.USAGE
    told = parsed(rushes("retry", "latest/cat", "latest/dog", "latest/cat", "-o", "json"))
    assert (told["batch_id"], told["retried"]) == (farm.batch_id, 2)
    assert [outcome["retried"] for outcome in told["outcomes"]] == [1, 1, 0]
    assert all(outcome["job_id"] for outcome in told["outcomes"])


def test_retry_of_batches_tells_each(farm: Farm, rushes: Rushes, prompts: str) -> None:
    other = rushes("submit", prompts, "--preset", "tiny", "-q", "--repeat", "2").stdout.strip()
    farm.fail(0)
    assert rushes("retry", farm.batch_id, other).stdout.splitlines() == [
        f"batch {farm.batch_id}: 1 job queued again; will probably fail as before: 1 input",
        f"batch {other}: no failed jobs",
    ]
    told = parsed(rushes("retry", farm.batch_id, other, "-o", "json"))
    assert (told["batch_id"], told["retried"]) == (None, 0)


def test_retry_takes_the_kinds_that_are_worth_it(farm: Farm, rushes: Rushes) -> None:
    farm.fail(0)
    farm.fail(1, "it fell silent", states.FailureKind.WORKER_LOST)
    wrong = rushes("retry", "latest", "--kind", "devise")
    assert wrong.exit_code == exits.USAGE
    assert "'out_of_memory'" in wrong.stderr
    some = ("--kind", "worker_lost", "--kind", "device", "--no-quarantined")
    assert "no such failed jobs" in rushes("retry", "latest", *some).stdout
    assert "is failed, worker_lost (quarantined): nothing to retry" in (
        rushes("retry", "latest/dog", "--no-quarantined").stdout
    )
    told = parsed(rushes("retry", "latest", *some[:4], "-o", "json"))["outcomes"][0]
    assert (told["retried"], told["doubtful"]) == (1, {"quarantined": 1})
    assert rushes("retry", "latest", "--quarantined").stdout.endswith("no such failed jobs\n")


def test_retry_of_what_is_paused_says_how_it_goes_on(farm: Farm, rushes: Rushes) -> None:
    farm.fail(0)
    rushes("pause", "latest")
    told = rushes("retry", "latest/cat").stdout
    assert f"the batch is paused, `rushes resume {farm.batch_id}` lets it go on" in told
    assert "paused" not in rushes("retry", "latest").stdout


def test_retry_of_a_batch_whose_results_are_gone_advises_nothing(
    farm: Farm, rushes: Rushes
) -> None:
    rushes("cancel", "latest")
    with farm.db.transaction() as session:
        session.execute(update(Batch).values(results_expired_at=database.now(session)))
    result = rushes("retry", "latest")
    assert result.exit_code == exits.USAGE
    assert "results were deleted as old" in result.stderr


# presets, workers, migrate, processes


def test_presets_are_listed_and_shown(rushes: Rushes) -> None:
    assert "832x480" in rushes("presets").stdout
    names = [preset["name"] for preset in parsed(rushes("presets", "-o", "json"))["presets"]]
    assert {"tiny", "wan_t2v_distill_4step_cfg", "wan_i2v_distill_4step_cfg_lora"} <= set(names)
    assert parsed(rushes("presets", "-o", "json", "list")) == parsed(
        rushes("presets", "list", "-o", "json")
    )
    shown = rushes("presets", "show", "wan_t2v_distill_4step_cfg").stdout
    assert "sample_guide_scale  distilled models render without CFG" in shown
    told = parsed(rushes("presets", "show", "tiny", "-o", "json"))
    assert told["look"]["width"] == 48


def test_a_broken_preset_is_told_and_fails_the_list(
    rushes: Rushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine").mkdir()
    Path("mine/wrong.json").write_text('{"stps": 4}')
    monkeypatch.setenv("RUSHES_PRESETS_DIR", "mine")
    result = rushes("presets", "-o", "json")
    assert result.exit_code == exits.ERROR
    assert parsed(result)["broken"][0]["name"] == "wrong"
    assert rushes("presets", "show", "wrong").exit_code == exits.USAGE


@pytest.mark.parametrize(
    "command", ["presets", "presets show tiny", "submit prompts.jsonl --preset tiny"]
)
def test_own_presets_that_are_not_there_are_told(
    db: database.Database,
    rushes: Rushes,
    prompts: str,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
) -> None:
    """A shipped preset of the same name would be taken for them."""
    monkeypatch.setenv("RUSHES_PRESETS_DIR", "elsewhere")
    result = rushes(*command.split())
    assert result.exit_code == exits.USAGE
    assert f"RUSHES_PRESETS_DIR: there is no folder {Path.cwd()}/elsewhere" in result.stderr


def test_workers_tell_what_they_hold_and_what_they_refuse(rushes: Rushes, farm: Farm) -> None:
    farm.live_worker()
    model = reports.Resident(
        model="/models/tiny", loras=("a",), memory="resident", device_bytes=5, host_bytes=7
    )
    told = reports.Report(
        renders=40,
        loads=3,
        lora_switches=2,
        resident=(model,),
        device_used_bytes=60_000_000_000,
        host_used_bytes=8,
    )
    farm.db.write(workers.report, "gpu0@host", told)
    said = rushes("workers").stdout
    for part in ("60.0 GB / 150.0 GB", "tiny + 1 LoRA", " 40 ", "alive"):
        assert part in said
    farm.db.write(
        workers.refuse,
        "gpu0@host",
        queue="rushes.render.tiny",
        kind=states.FailureKind.WEIGHTS,
        reason="/models/tiny: gone",
    )
    result = rushes("workers")
    assert "refuses" in result.stdout
    assert "no jobs of tiny: gpu0@host until" in result.stderr
    assert "/models/tiny: gone" in result.stderr
    (row,) = parsed(rushes("workers", "-o", "json"))["workers"]
    assert (row["renders"], row["loads"], row["lora_switches"]) == (40, 3, 2)
    assert row["resident"] == [
        {
            "model": "/models/tiny",
            "loras": ["a"],
            "memory": "resident",
            "device_bytes": 5,
            "host_bytes": 7,
        }
    ]
    assert (row["memory_used_bytes"], row["takes"]) == (60_000_000_000, [])
    assert row["refuses"][0]["reason"] == "/models/tiny: gone"
    assert "/models/tiny: gone" in rushes("show", "latest").stderr


def test_a_worker_whose_host_has_no_models_is_told(rushes: Rushes, farm: Farm) -> None:
    farm.live_worker()
    assert "takes nothing" not in rushes("workers").stderr
    farm.db.write(workers.register, registration("gpu0@bare", queues=()))
    assert "gpu0@bare takes nothing: its host has no models" in rushes("workers").stderr


def take_out(farm: Farm, name: str = "gpu0@host") -> None:
    """Three jobs fail on it."""
    for number in range(3):
        farm.db.write(
            health.suspect, name, job_id=number, kind=states.FailureKind.DEVICE, error="Xid 79"
        )


def test_a_worker_that_was_taken_out_is_told_with_the_reason(rushes: Rushes, farm: Farm) -> None:
    farm.live_worker()
    take_out(farm)
    result = rushes("workers")
    assert " out " in result.stdout
    assert "until its self-test passes" in result.stderr
    assert "Xid 79 (jobs 0, 1, 2)" in result.stderr
    (row,) = parsed(rushes("workers", "-o", "json"))["workers"]
    assert (row["suspects"], row["test"], row["takes"]) == ([0, 1, 2], None, [])
    assert row["refuses"][0]["needs_test"] is True
    farm.db.write(health.tested, "gpu0@host", failure="NaN")
    (row,) = parsed(rushes("workers", "-o", "json"))["workers"]
    assert row["test"]["failure"] == "NaN"
    assert "self-test failed: NaN" in rushes("workers").stderr


def test_readmit_brings_a_worker_back_without_a_test(rushes: Rushes, farm: Farm) -> None:
    farm.live_worker()
    take_out(farm)
    assert "takes jobs again" in rushes("workers", "readmit", "gpu0@host").stdout
    assert " alive " in rushes("workers").stdout
    told = parsed(rushes("workers", "readmit", "gpu0@host", "-o", "json"))
    assert told == {"worker": "gpu0@host", "changed": False}


def test_readmit_lets_a_worker_that_refuses_try_at_once(rushes: Rushes, farm: Farm) -> None:
    farm.live_worker()
    told = {"queue": workers.ALL_QUEUES, "kind": states.FailureKind.DISK, "reason": "full"}
    farm.db.write(workers.refuse, "gpu0@host", **told)
    assert "takes jobs again" in rushes("workers", "readmit", "gpu0@host").stdout
    assert "takes jobs as it is" in rushes("workers", "readmit", "gpu0@host").stdout


def test_watching_tells_when_the_last_worker_refuses(
    rushes: Rushes, farm: Farm, capsys: pytest.CaptureFixture[str]
) -> None:
    """The counts stand still, which says nothing of the reason."""
    farm.live_worker()

    def looks() -> Iterator[watch.Snapshot]:
        for number in range(4):
            if number == 2:
                told = {"kind": states.FailureKind.DISK, "reason": "no room"}
                farm.db.write(workers.refuse, "gpu0@host", queue=workers.ALL_QUEUES, **told)
            yield watch.look(farm.db, farm.batch_id)

    display.as_lines(looks())
    told = capsys.readouterr()
    assert len(told.out.splitlines()) == 2
    assert told.err.count("no room") == 1
    with farm.db.transaction() as session:
        workers.ask_again(session, "gpu0@host")
    display.as_json_lines(looks())
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["queues_without_workers"] == first["refused_by"] == []
    assert second["queues_without_workers"] == ["rushes.render.tiny"]
    (why,) = second["refused_by"]
    assert (why["worker"], why["kind"], why["reason"]) == ("gpu0@host", "disk", "no room")


def test_a_file_is_no_batch_to_estimate(rushes: Rushes) -> None:
    Path("p.txt").write_text("a cat\n")
    result = rushes("estimate", "p.txt")
    assert (result.exit_code, "is a file: give --preset" in result.stderr) == (2, True)


def test_a_batch_to_estimate_is_not_repeated(farm: Farm, rushes: Rushes) -> None:
    result = rushes("estimate", "latest", "--repeat", "5")
    assert (result.exit_code, "--repeat is for a FILE" in result.stderr) == (2, True)


def test_a_script_is_no_prompt_file(rushes: Rushes) -> None:
    Path("run").write_text("#!/bin/sh\necho hello\n")
    result = rushes("submit", "run", "--preset", "tiny")
    assert (result.exit_code, "is a script" in result.stderr) == (2, True)


@pytest.mark.parametrize(("failure", "code"), [(None, exits.OK), ("NaN", exits.ERROR)])
def test_a_test_is_asked_for_and_its_verdict_waited_for(
    rushes: Rushes, farm: Farm, monkeypatch: pytest.MonkeyPatch, failure: str | None, code: int
) -> None:
    farm.live_worker()

    def launcher_has_tested(_seconds: float) -> None:
        with farm.db.reading() as session:
            assert health.is_due_for_test(session, "gpu0@host")
        farm.db.write(health.tested, "gpu0@host", failure=failure)

    monkeypatch.setattr(worker_commands.time, "sleep", launcher_has_tested)
    result = rushes("workers", "test", "gpu0@host")
    assert result.exit_code == code
    assert (failure or "passed") in result.stdout


def test_a_test_that_nobody_runs_is_waited_for_no_longer_than_asked(
    rushes: Rushes, farm: Farm
) -> None:
    farm.live_worker()
    result = rushes("workers", "test", "gpu0@host", "--timeout", "0.1")
    assert result.exit_code == exits.ERROR
    assert "no result of its self-test" in result.stderr
    assert "when its job is done" in rushes("workers", "test", "gpu0@host", "--no-wait").stdout
    both = rushes("workers", "test", "gpu0@host", "--no-wait", "--timeout", "3")
    assert (both.exit_code, "--timeout is for a wait" in both.stderr) == (exits.USAGE, True)


def test_a_silent_worker_is_forgotten_and_no_other(rushes: Rushes, farm: Farm) -> None:
    farm.live_worker()
    attempt_id = farm.claim(0)
    result = rushes("workers", "forget", "gpu0@host")
    assert (result.exit_code, "only silent ones" in result.stderr) == (exits.ERROR, True)
    with farm.db.transaction() as session:
        long_ago = database.now(session) - timedelta(hours=1)
        session.execute(update(Worker).values(heartbeat_at=long_ago))
    result = rushes("workers", "forget", "gpu0@host")
    assert (result.exit_code, "still holds jobs (1)" in result.stderr) == (exits.ERROR, True)
    farm.db.write(lifecycle.release, attempt_id, reason="it was stopped")
    told = parsed(rushes("workers", "forget", "gpu0@host", "-o", "json"))
    assert told == {"worker": "gpu0@host", "changed": True}
    assert "no workers" in rushes("workers").stderr
    assert not farm.db.write(workers.forget, "gpu0@host")
    farm.live_worker()
    assert " alive " in rushes("workers").stdout


@pytest.mark.parametrize("command", ["test", "readmit", "forget"])
def test_a_worker_that_is_not_there_is_told_with_those_that_are(
    rushes: Rushes, farm: Farm, command: str
) -> None:
    farm.live_worker()
    result = rushes("workers", command, "gpu9@host")
    assert result.exit_code == exits.USAGE
    assert "there are: gpu0@host" in result.stderr


def test_workers_are_listed_with_what_they_render(farm: Farm, rushes: Rushes) -> None:
    assert "no workers" in rushes("workers").stderr
    farm.live_worker()
    attempt_id = farm.claim(0)
    farm.db.write(
        lifecycle.heartbeat, attempt_id, lease_seconds=60, stage="denoise", step=2, steps=4
    )
    assert "denoise 2/4" in rushes("workers").stdout
    told = parsed(rushes("workers", "-o", "json"))["workers"][0]
    assert told["is_alive"] is True
    assert told["rendering"]["step"] == 2


def test_migrate_makes_the_tables_once(rushes: Rushes) -> None:
    told = parsed(rushes("migrate", "-o", "json"))
    assert told == {"before": None, "after": migrate.head()}
    assert "already" in rushes("migrate").stdout
    assert rushes("list").exit_code == 0
    assert rushes("migrate", "--revision", "none").exit_code == exits.USAGE


def test_migrate_leaves_the_tables_of_a_newer_version_alone(
    db: database.Database, rushes: Rushes
) -> None:
    with db.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    result = rushes("migrate")
    assert (result.exit_code, "of a newer version" in result.stdout) == (0, True)
    assert rushes("list").exit_code == 0


def test_a_dispatcher_stops_on_sigterm_and_leaves_a_sign_of_life(
    db: database.Database, rushes: Rushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert rushes("dispatcher", "--check").exit_code == exits.ERROR
    monkeypatch.setenv("RUSHES_TICK_SECONDS", "0.1")
    with subprocess.Popen([sys.executable, "-m", "jobs", "dispatcher"]) as process:
        until((settings.load().home / "dispatcher.beat").exists, seconds=20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert rushes("dispatcher", "--check").exit_code == exits.OK
    old = time.time() - 3600
    os.utime(settings.load().home / "dispatcher.beat", (old, old))
    assert rushes("dispatcher", "--check").exit_code == exits.ERROR


def test_a_dispatcher_gives_a_sign_of_life_also_while_the_database_is_away() -> None:
    config = settings.load(database_url="postgresql://x@127.0.0.1:1/y")
    away = database.connect(config)
    stop = threading.Event()
    stop.wait = lambda _seconds: stop.set()  # once its first look has failed
    dispatch.Dispatcher(config, db=away, after_look=pytest.fail).run(stop)
    assert stop.is_set()
    assert beat.of_dispatcher(config).is_alive()


@pytest.fixture
def signals_as_before() -> Iterator[None]:
    """A service that runs in the test takes them."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("command", ["dispatcher", "notify run", "worker"])
def test_a_service_begins_while_the_database_is_away(
    rushes: Rushes, monkeypatch: pytest.MonkeyPatch, signals_as_before: None, command: str
) -> None:
    """Whoever started it would start it again and again, with growing pauses."""
    touch = beat.Beat.touch

    def touch_and_end(sign: beat.Beat) -> None:
        touch(sign)
        if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setenv("DATABASE_URL", "postgresql://me:secret@127.0.0.1:1/rushes")
    assert rushes(*command.split(), "--check").exit_code == exits.ERROR
    monkeypatch.setattr(beat.Beat, "touch", touch_and_end)
    result = rushes(*command.split())
    assert result.exit_code == exits.OK
    assert "database.awaited" in result.stderr
    assert rushes(*command.split(), "--check").exit_code == exits.OK


@pytest.mark.parametrize("command", ["dispatcher", "worker"])
def test_a_service_with_a_cluster_ends_with_a_line(
    db: database.Database,
    rushes: Rushes,
    redis_cluster_url: str,
    monkeypatch: pytest.MonkeyPatch,
    signals_as_before: None,
    command: str,
) -> None:
    """Else each process of Celery would end at its start, again and again."""
    monkeypatch.setenv("CELERY_BROKER_URL", redis_cluster_url)
    result = rushes(command)
    assert result.exit_code == exits.USAGE
    assert "CELERY_BROKER_URL names a Cluster" in result.stderr


@pytest.mark.parametrize("command", ["dispatcher", "notify run", "worker"])
@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("mysql://me@127.0.0.1/db", "no driver"),
        ("postgresql://me:a@b@127.0.0.1/db", "an @ too many"),
        ("sqlite:///elsewhere.db", "there is no such file"),
        ("sqlite:///empty.db", "run `rushes migrate`"),
    ],
)
def test_a_service_with_a_wrong_database_ends_with_a_line(
    rushes: Rushes,
    monkeypatch: pytest.MonkeyPatch,
    signals_as_before: None,
    command: str,
    url: str,
    why: str,
) -> None:
    Path("empty.db").touch()
    monkeypatch.setenv("DATABASE_URL", url)
    result = rushes(*command.split())
    assert result.exit_code != exits.OK
    assert why in result.stderr.splitlines()[-1]
    assert not Path("elsewhere.db").exists()


def test_a_command_in_another_folder_than_that_of_up_is_told_where_to_go(rushes: Rushes) -> None:
    """An empty database of its own would queue jobs that nobody renders."""
    told = rushes("list").stderr
    assert "rushes.db: there is no such file: run this in the folder of `rushes up`" in told
    assert told.index("RUSHES_HOME") < told.index("rushes migrate")


def test_worker_refuses_devices_that_are_not_there(db: database.Database, rushes: Rushes) -> None:
    result = rushes("worker", "--devices", "gpu")
    assert result.exit_code == exits.USAGE
    assert "--devices" in result.stderr


@pytest.mark.parametrize("command", ["worker", "up", "demo"])
def test_a_bad_setting_of_rendering_is_told_before_anything_starts(
    db: database.Database, rushes: Rushes, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    """Else children that cannot begin would be started again and again."""
    monkeypatch.setenv("RUSHES_X264_CRF", "99")
    result = rushes(command, "--devices", "cpu")
    assert result.exit_code == exits.USAGE
    assert "RUSHES_X264_CRF: Input should be less than" in result.stderr
    assert not list(Path().rglob("up.json"))


@pytest.mark.parametrize("devices", ["gpu", "sim:1"])
def test_demo_refuses_devices_that_would_render_nothing(
    rushes: Rushes, monkeypatch: pytest.MonkeyPatch, devices: str
) -> None:
    """Also where `rushes up` runs, whose devices it would use."""
    monkeypatch.setattr(settings, "read_up_file", lambda _home: {"DATABASE_URL": "sqlite:///x.db"})
    result = rushes("demo", "--devices", devices)
    assert result.exit_code == exits.USAGE
    assert result.stderr.startswith("--devices: ")
    assert result.stdout == ""


@pytest.fixture
def broken_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho version mismatch\nexit 18\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)


@pytest.mark.usefixtures("broken_driver")
@pytest.mark.parametrize("command", ["worker", "up"])
def test_a_driver_that_fails_is_told_before_anything_starts(
    db: database.Database, rushes: Rushes, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    for begin in ("jobs.standalone.running", "worker.launch._each_only_once"):
        monkeypatch.setattr(begin, lambda *_, **__: pytest.fail("it begins"))
    result = rushes(command)
    assert result.exit_code == exits.ERROR
    assert "nvidia-smi is here and fails (exit status 18, version mismatch)" in result.stderr


@pytest.mark.usefixtures("broken_driver")
def test_demo_goes_on_on_the_cpu_where_the_driver_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Unless a GPU was asked for, or `rushes up` runs, whose devices it uses."""
    config = settings.load()
    assert demo._usable(config, "auto") == "cpu"
    told = capsys.readouterr().err
    assert "version mismatch" in told
    assert "rendered on the CPU" in told
    with pytest.raises(errors.GpusUnknown):
        demo._usable(config, "0")
    monkeypatch.setattr(settings, "read_up_file", lambda _home: {"DATABASE_URL": "sqlite:///x.db"})
    assert demo._usable(config, "auto") == "auto"
    assert capsys.readouterr().err == ""


def test_demo_says_that_devices_have_no_effect_beside_rushes_up(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(settings, "read_up_file", lambda _home: {"DATABASE_URL": "sqlite:///x.db"})
    for devices, is_told in (("auto", False), ("cpu:2", True)):
        with demo._farm(settings.load(), devices):
            assert ("is ignored" in capsys.readouterr().err) == is_told


def test_the_web_service_is_asked_at_its_own_address(
    rushes: Rushes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    answers = http.server.BaseHTTPRequestHandler
    monkeypatch.setattr(answers, "do_GET", lambda self: self.send_error(200), raising=False)
    with http.server.ThreadingHTTPServer(("127.0.0.2", 0), answers) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        port = str(server.server_port)
        asked = rushes("web", "--host", "127.0.0.2", "--port", port, "--check")
        assert asked.exit_code == exits.OK, asked.stderr
        assert asked.stdout == f"http://127.0.0.2:{port} answers\n"
        for host in ("0.0.0.0", "127.0.0.1", "::1"):
            asked = rushes("web", "--host", host, "--port", port, "--check")
            assert asked.exit_code == exits.ERROR
        server.shutdown()


@pytest.mark.parametrize("is_given", [False, True], ids=["of rushes up", "of an option"])
def test_the_web_service_of_rushes_up_is_asked_where_it_listens(
    rushes: Rushes, monkeypatch: pytest.MonkeyPatch, is_given: bool
) -> None:
    """Its port is another than that of the settings where this is taken."""
    up = {"RUSHES_WEB_HOST": "127.0.0.2", "RUSHES_WEB_PORT": "3"}
    monkeypatch.setattr(settings, "read_up_file", lambda _home: up)
    monkeypatch.setenv("RUSHES_WEB_PORT", "2")
    asked = rushes("web", "--check", *(["--port", "1"] if is_given else []))
    assert ("127.0.0.2:3" in asked.stderr, ":1:" in asked.stderr) == (not is_given, is_given)


@pytest.mark.parametrize("command", ["up", "worker", "web"])
def test_what_keeps_running_warns_of_a_name_that_is_no_setting(
    rushes: Rushes, db: database.Database, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    del db  # it is there
    monkeypatch.setattr("jobs.standalone.up", lambda *_, **__: exits.OK)
    monkeypatch.setattr("worker.launch.run", lambda *_, **__: exits.OK)
    monkeypatch.setenv("RUSHES_LEASE_SECOND", "50")
    options = ["--host", "0.0.0.0"] if command == "web" else []  # refused: there is no token
    warned = json.loads(rushes(command, *options).stderr.splitlines()[0])
    assert (warned["event"], warned["name"]) == ("setting.unknown", "RUSHES_LEASE_SECOND")
    assert (warned["nearest"], warned["place"]) == ("RUSHES_LEASE_SECONDS", "environment")


# Color.


@pytest.mark.parametrize("how", ["variable", "option", "option of the group"])
def test_color_can_be_turned_off(farm: Farm, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    colored = CliRunner().invoke(cli.main, ["list"], color=True)
    assert "\x1b[" in colored.stdout or "queued" in colored.stdout
    CliRunner().invoke(cli.main, ["cancel", "latest"])
    assert "\x1b[" in CliRunner().invoke(cli.main, ["list"], color=True).stdout
    arguments = ["list"]
    if how == "variable":
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        arguments = ["list", "--no-color"] if how == "option" else ["--no-color", "list"]
    plain = CliRunner().invoke(cli.main, arguments, color=True)
    assert "\x1b[" not in plain.stdout


def test_a_narrow_terminal_encoding_is_no_error(farm: Farm) -> None:
    Path("p.jsonl").write_text(json.dumps({"prompt": "日本語 🐕"}, ensure_ascii=False))
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}

    def run(*arguments: str) -> str:
        return subprocess.run(
            [sys.executable, "-m", "jobs", *arguments],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout

    run("submit", "p.jsonl", "--preset", "tiny")
    assert "\\u65e5" in run("show", "latest/0")
    assert json.loads(run("show", "latest/0", "-o", "json"))["prompt"] == "日本語 🐕"


def test_json_obeys_no_terminal_either(farm: Farm, rushes: Rushes) -> None:
    prompt = "a\x7f\x9b31m\u202e日本"
    Path("p.jsonl").write_text(json.dumps({"prompt": prompt}))
    rushes("submit", "p.jsonl", "--preset", "tiny")
    printed = rushes("show", "latest/0", "-o", "json").stdout
    assert json.loads(printed)["prompt"] == prompt
    assert "a\\u007f\\u009b31m\\u202e日本" in printed


# Documentation.

DOCS = Path(__file__).resolve().parents[3] / "docs" / "cli.md"


def _commands() -> Iterator[tuple[str, click.Command]]:
    for name in root.COMMANDS:
        command = root.main.get_command(click.Context(root.main), name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", inner) for sub, inner in command.commands.items())


def test_the_documentation_names_every_command_and_option() -> None:
    text = DOCS.read_text()
    for name, command in _commands():
        heading = f"\n### `rushes {name}"
        assert heading in text, name
        section = text.split(heading, 1)[1].split("\n### ", 1)[0]
        for parameter in command.params:
            if not isinstance(parameter, click.Option) or parameter.name == "help":
                continue
            for option in (*parameter.opts, *parameter.secondary_opts):
                shared = option in ("-o", "--output", "--no-color")
                assert f"`{option}" in (text if shared else section), f"{name} {option}"


def test_the_documentation_names_no_option_that_is_gone() -> None:
    parameters = [parameter for _, command in _commands() for parameter in command.params]
    there = {option for p in parameters for option in (*p.opts, *p.secondary_opts)}
    there |= {"--version", "--help", "-h"}
    named = set(re.findall(r"`(--?[a-z][a-z-]*)", DOCS.read_text()))
    assert named <= there


def test_the_documentation_names_every_exit_code() -> None:
    text = DOCS.read_text()
    codes = [value for name, value in vars(exits).items() if name.isupper()]
    assert all(f"| {code} |" in text for code in codes)


def test_the_documentation_names_every_json_key(farm: Farm, rushes: Rushes) -> None:
    farm.live_worker()
    farm.claim(0)
    farm.fail(1)
    text = DOCS.read_text()
    commands = (
        "list",
        "show latest",
        "show latest/dog",
        "logs latest",
        "workers",
        "presets",
        "estimate latest",
        "prioritize latest --first",
        "pause latest",
        "resume latest",
        "retry latest",
        "cancel latest",
        "migrate",
        "download latest",
        "gc",
    )
    for command in commands:
        told = parsed(rushes(*command.split(), "-o", "json"))
        for key in _keys(told):
            assert f"`{key}`" in text, f"{command}: {key}"


def _keys(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key not in ("look", "metadata", "keys_without_effect", "looks"):
                yield from _keys(inner)
            yield key
    elif isinstance(value, list):
        for inner in value:
            yield from _keys(inner)
