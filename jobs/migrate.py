"""Brings a database to the tables of this version."""

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

import migrations
from jobs import database

LOCK = 7_305_114  # any number of migrators may start at once; one works, the others wait


def upgrade(db: database.Database, *, revision: str = "head") -> tuple[str | None, str | None]:
    """Apply what is missing; (revision before, revision after)."""
    return _run(db, revision, down=False)


def downgrade(db: database.Database, *, revision: str) -> tuple[str | None, str | None]:
    return _run(db, revision, down=True)


def current(db: database.Database) -> str | None:
    with db.engine.connect() as connection:
        return MigrationContext.configure(connection).get_current_revision()


def head() -> str | None:
    return ScriptDirectory.from_config(_config()).get_current_head()


def _run(db: database.Database, revision: str, *, down: bool) -> tuple[str | None, str | None]:
    config = _config()
    with db.engine.begin() as connection:
        if not db.is_sqlite:
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": LOCK})
        config.attributes["connection"] = connection
        before = MigrationContext.configure(connection).get_current_revision()
        (command.downgrade if down else command.upgrade)(config, revision)
        after = MigrationContext.configure(connection).get_current_revision()
    return before, after


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(migrations.FOLDER))
    return config
