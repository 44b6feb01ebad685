"""Brings a database to the tables of this version."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager

import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import OperationalError

import migrations
from jobs import database, errors
from jobs.schema import Base

log = structlog.get_logger()

LOCK = 7_305_114  # any number of migrators may start at once; one works, the others wait
LOCK_SECONDS = 2.0  # for a table that somebody uses; leases last much longer
GIVES_WAY = (database.LOCK_NOT_AVAILABLE, "40P01")  # which is a deadlock, ended by PostgreSQL
TRIES = 15  # about a minute
LONGEST_PAUSE_SECONDS = 5.0


class TablesBusy(errors.RushesError):
    """A migration got no hold of a table that somebody uses all the time. Nothing was changed."""

    def __init__(self, reason: str, *, tries: int) -> None:
        super().__init__(
            f"the tables were in use at each of {tries} tries ({reason}); nothing was changed. Try "
            "again, or end the transaction that holds them: pg_stat_activity has its xact_start"
        )


class TablesUnknown(errors.RushesError):
    """At a revision that this version does not know, and without tables that it needs."""

    def __init__(self, revision: str, *, missing: str) -> None:
        super().__init__(
            f"the database is at revision {revision}, which this version of rushes does not know, "
            f"and has no table {missing}: correct DATABASE_URL, or install the version that made it"
        )


def upgrade(db: database.Database, *, revision: str = "head") -> tuple[str | None, str | None]:
    """Apply what is missing; (revision before, revision after). Tables of a newer version stay."""
    return _run(db, revision, down=False)


def downgrade(db: database.Database, *, revision: str) -> tuple[str | None, str | None]:
    return _run(db, revision, down=True)


def current(db: database.Database) -> str | None:
    with db.reading() as session:
        return MigrationContext.configure(session.connection()).get_current_revision()


def head() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


def is_newer(revision: str | None) -> bool:
    """Of a version after this one: migrations only add, so that this one works on its tables."""
    scripts = ScriptDirectory.from_config(_config()).walk_revisions()
    return revision is not None and revision not in {script.revision for script in scripts}


def _run(db: database.Database, revision: str, *, down: bool) -> tuple[str | None, str | None]:
    """While others work: whoever holds a table is waited for briefly, and asked again later.

    Whoever comes after us for a table that we wait for waits too, so that patience would stop them.
    """
    for tries in range(1, TRIES + 1):
        try:
            return _try(db, revision, down=down)
        except OperationalError as error:
            if database.sqlstate(error.orig) not in GIVES_WAY:
                raise
            if tries == TRIES:
                raise TablesBusy(str(error.orig).strip(), tries=TRIES) from error
            log.warning("migrate.gives_way", tries=tries, error=str(error.orig).strip()[:200])
            time.sleep(random.uniform(0.5, 1) * min(tries, LONGEST_PAUSE_SECONDS))  # noqa: S311
    raise AssertionError("unreachable: the last try returns or raises")


def _try(db: database.Database, revision: str, *, down: bool) -> tuple[str | None, str | None]:
    config = _config()
    with (
        db.engine.connect() as connection,
        _foreign_keys_off(db, connection),
        connection.begin(),
    ):
        if not db.is_sqlite:
            database.wait_for_ever(connection)
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
            database.wait_briefly(connection, LOCK_SECONDS)
        config.attributes["connection"] = connection
        before = MigrationContext.configure(connection).get_current_revision()
        if before is not None and revision == "head" and is_newer(before):
            _leave_alone(connection, before)
            return before, before
        (command.downgrade if down else command.upgrade)(config, revision)
        after = MigrationContext.configure(connection).get_current_revision()
        if db.is_sqlite:
            broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
            assert not broken, f"rows without their parents: {broken[:3]}"
    return before, after


def _leave_alone(connection: Connection, revision: str) -> None:
    missing = sorted(set(Base.metadata.tables) - set(inspect(connection).get_table_names()))
    if missing:
        raise TablesUnknown(revision, missing=missing[0])
    log.warning("migrate.newer_tables", revision=revision, own=head())


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
