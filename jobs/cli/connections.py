"""The database and the broker, as commands reach them."""

from pathlib import Path

import click

from jobs import broker, database, errors, logs, settings


def open_database(config: settings.Settings) -> database.Database:
    """For one command. DatabaseUnavailable instead of an empty SQLite file nobody asked for."""
    logs.configure(config, level="WARNING")
    db = database.connect(config)
    file = db.url.database
    if db.is_sqlite and file and file != ":memory:" and not Path(file).exists():
        raise database.DatabaseUnavailable(
            db.url,
            "there is no such file: start everything on this machine with `rushes up`, or create "
            "it with `rushes migrate`",
        )
    click.get_current_context().call_on_close(db.close)
    return db


def kick(config: settings.Settings) -> str | None:
    """Wake the dispatchers; None, or why they wake by themselves a little later."""
    try:
        connection = broker.Broker(config)
        if connection.kick():
            return None
        reason = str(broker.BrokerUnavailable(connection.url, "does not answer"))
    except (errors.RushesError, ValueError) as error:
        reason = str(error)
    return f"{reason}; the jobs are stored and start when it is back"
