"""The database, as commands reach it."""

from collections.abc import Callable

import click

from jobs import database, logs, settings


def open_database(
    config: settings.Settings,
    *,
    connect: Callable[[settings.Settings], database.Database] = database.connect,
) -> database.Database:
    """For one command. DatabaseUnavailable where SQLite would make an empty file."""
    logs.configure(config, level="WARNING")
    db = connect(config)
    db.require_file()
    click.get_current_context().call_on_close(db.close)
    return db
