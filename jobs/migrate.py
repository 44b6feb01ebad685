"""Brings a database to the tables of this version."""

from collections.abc import Iterator
from contextlib import contextmanager

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text

import migrations
from jobs import database

LOCK = 7_305_114  # any number of migrators may start at once; one works, the others wait


def upgrade(db: database.Database, *, revision: str = "head") -> tuple[str | None, str | None]:
    """Apply what is missing; (revision before, revision after)."""
    return _run(db, revision, down=False)


def downgrade(db: database.Database, *, revision: str) -> tuple[str | None, str | None]:
    return _run(db, revision, down=True)


def current(db: database.Database) -> str | None:
    with db.reading() as session:
        return MigrationContext.configure(session.connection()).get_current_revision()


def head() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


def _run(db: database.Database, revision: str, *, down: bool) -> tuple[str | None, str | None]:
    config = _config()
    with (
        db.engine.connect() as connection,
        _foreign_keys_off(db, connection),
        connection.begin(),
    ):
        if not db.is_sqlite:
            database.wait_for_ever(connection)
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        config.attributes["connection"] = connection
        before = MigrationContext.configure(connection).get_current_revision()
        (command.downgrade if down else command.upgrade)(config, revision)
        after = MigrationContext.configure(connection).get_current_revision()
        if db.is_sqlite:
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            assert not broken, f"rows without their parents: {broken[:3]}"
    return before, after


@contextmanager
def _foreign_keys_off(db: database.Database, connection: Connection) -> Iterator[None]:
    """SQLite changes a table by making it anew, which its children's keys would not allow."""
    if not db.is_sqlite:
        yield
        return
    own = connection.connection.driver_connection
    assert own is not None
    own.execute("PRAGMA foreign_keys=OFF")  # has no effect inside a transaction
    try:
        yield
    finally:
        own.execute("PRAGMA foreign_keys=ON")


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations.FOLDER))
    return config
