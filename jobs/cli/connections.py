"""The database, as commands reach it."""

from collections.abc import Callable
from pathlib import Path

import click

from jobs import database, logs, settings


def open_database(
    config: settings.Settings,
    *,
    connect: Callable[[settings.Settings], database.Database] = database.connect,
) -> database.Database:
    """For one command. DatabaseUnavailable instead of an empty SQLite file nobody asked for."""
    logs.configure(config, level="WARNING")
    db = connect(config)
    file = db.url.database
    if db.is_sqlite and file and file != ":memory:" and not Path(file).exists():
        raise database.DatabaseUnavailable(
            db.url,
            "there is no such file: start everything on this machine with `rushes up`, or create "
            "it with `rushes migrate`",
        )
    click.get_current_context().call_on_close(db.close)
    return db
