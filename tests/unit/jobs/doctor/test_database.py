"""The database: it answers, takes writes and has our tables."""

import sqlite3

import psycopg
import pytest
from sqlalchemy import text

from jobs import database, migrate, settings
from jobs.doctor import database as part
from tests.told import told_by


@pytest.mark.usefixtures("db")
def test_a_database_on_a_disk_that_is_read_only_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = database._use_wal

    def of_read_only(connection: sqlite3.Connection) -> None:
        prepare(connection)
        connection.execute("PRAGMA query_only=ON")

    monkeypatch.setattr(database, "_use_wal", of_read_only)
    found = told_by(part.check)
    assert (found["database"].status, found["database writes"].status) == ("ok", "fail")
    assert "readonly" in found["database writes"].seen


@pytest.mark.usefixtures("db")
def test_a_database_on_a_full_disk_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "LEAST_FREE_BYTES", 1 << 60)
    found = told_by(part.check)["database writes"]
    assert (found.status, "MiB are free for" in found.seen) == ("fail", True)
    assert "disk room" in found.advice


@pytest.mark.parametrize("is_pooled", [True, False])
def test_a_pooler_before_the_database_is_named(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch, *, is_pooled: bool
) -> None:
    monkeypatch.setenv("DATABASE_URL", postgres_database_url)
    if is_pooled:
        monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", property(lambda _: -1))
    found = told_by(part.check)["database"]
    assert (found.status, found.seen.endswith(", through a pooler")) == ("ok", is_pooled)


def test_old_tables_fail() -> None:
    db = database.connect(settings.load())
    db.engine.connect().close()
    assert told_by(part.check)["database tables"].status == "fail"
    migrate.upgrade(db)
    assert told_by(part.check)["database tables"].status == "ok"


def test_tables_of_a_newer_version_are_no_failure(db: database.Database) -> None:
    """`rushes migrate` would not change them."""
    with db.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    found = told_by(part.check)["database tables"]
    assert found.status == "warn"
    assert "rushes migrate" not in found.advice
