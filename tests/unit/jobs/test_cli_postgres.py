"""The same command line on PostgreSQL."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from sqlalchemy import text

from jobs import cli, database
from jobs.cli import exits


def rushes(*arguments: str) -> Result:
    return CliRunner().invoke(cli.main, [*arguments])


@pytest.mark.timeout(120)
def test_a_batch_lives_in_postgresql(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DATABASE_URL", postgres_database_url)
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    for command in ("list", "show latest", "cancel 1", "workers"):
        unmigrated = rushes(*command.split())
        assert unmigrated.exit_code == exits.ERROR
        assert "run `rushes migrate`" in unmigrated.stderr
        assert len(unmigrated.stderr.splitlines()) == 1
    assert json.loads(rushes("migrate", "-o", "json").stdout)["before"] is None
    Path("p.txt").write_text("a cat\na dog\n")
    batch_id = rushes("submit", "p.txt", "--preset", "tiny", "-q").stdout.strip()
    assert json.loads(rushes("show", "latest", "-o", "json").stdout)["batch_id"] == batch_id
    for reference in ("99", "latest/nothing", "9" * 30, "a\tb", "Ä"):
        assert rushes("show", reference).exit_code == exits.USAGE
    assert rushes("wait", "latest", "--timeout", "0").exit_code == exits.TIMEOUT
    assert rushes("cancel", "latest").exit_code == 0
    assert rushes("wait", "latest").exit_code == exits.CANCELLED
    assert rushes("retry", "latest", "--cancelled").exit_code == 0
    assert rushes("logs", "latest").exit_code == 0
    assert rushes("download", "latest").exit_code == 0
    assert "ok    database: postgresql" in rushes("doctor").stdout


def test_a_database_that_takes_no_writes_is_told(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standby, or a managed one whose disk is full: it answers all that is asked."""
    monkeypatch.setenv("DATABASE_URL", postgres_database_url)
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    assert rushes("migrate").exit_code == 0
    assert "database writes" not in rushes("doctor").stdout
    db = database.Database(postgres_database_url)
    with db.transaction() as session:
        read_only = f"ALTER DATABASE {db.url.database} SET default_transaction_read_only = on"
        session.execute(text(read_only))
    db.close()
    Path("p.txt").write_text("a cat\n")
    result = rushes("submit", "p.txt", "--preset", "tiny", "-o", "json")
    assert result.exit_code == exits.ERROR
    error = json.loads(result.stdout)["error"]
    assert error["kind"] == "DatabaseUnavailable"
    assert "takes no writes" in error["message"]
    assert "fail  database writes: " in rushes("doctor").stdout
