"""`rushes watch` and `rushes wait`."""

import collections
import sys
from collections.abc import Iterable

import click

from jobs import database, queries, settings, shapes, watch
from jobs.cli import connections, display, exits, options, output

_timeout = click.option(
    "--timeout",
    type=options.Seconds(min=0),
    metavar="SECONDS",
    help="Stop waiting after this long, with exit code 124; the batch goes on.",
)
_interval = click.option(
    "--interval",
    type=options.Seconds(min=0.05),
    default=watch.INTERVAL_SECONDS,
    show_default=True,
    metavar="SECONDS",
    help="Time between two looks.",
)


@click.command("wait")
@click.argument("batch")
@_timeout
@_interval
@options.output
def wait_for_batch(batch: str, timeout: float | None, interval: float, as_json: bool) -> int:
    """Wait until a batch is finished.

    The exit code tells how: 0 all succeeded, 3 some failed, 4 cancelled, 124 timeout.
    """
    db = connections.open_database(settings.load())
    batch_id = _batch_id(db, batch)
    last = to_the_end(
        watch.until_finished(db, batch_id, timeout_seconds=timeout, interval_seconds=interval)
    )
    if as_json:
        output.emit(shapes.progress(last.progress))
    else:
        output.line(display.status_line(last))
    return exits.of_batch(last.progress.state)


@click.command("watch")
@click.argument("batch")
@_timeout
@_interval
@options.output
def watch_batch(batch: str, timeout: float | None, interval: float, as_json: bool) -> int:
    """Follow a batch until it is finished.

    Live on a terminal, lines elsewhere, JSON Lines with -o json. Exit codes as of `rushes wait`.
    """
    db = connections.open_database(settings.load())
    batch_id = _batch_id(db, batch)
    snapshots = watch.until_finished(
        db, batch_id, timeout_seconds=timeout, interval_seconds=interval
    )
    return follow(snapshots, as_json=as_json)


def follow(snapshots: Iterable[watch.Snapshot], *, as_json: bool = False) -> int:
    """Show each snapshot as the place allows; the exit code of the finished batch."""
    if as_json:
        last = display.as_json_lines(snapshots)
    elif sys.stdout.isatty():
        last = display.live(snapshots)
    else:
        last = display.as_lines(snapshots)
    return exits.of_batch(last.progress.state)


def to_the_end(snapshots: Iterable[watch.Snapshot]) -> watch.Snapshot:
    """The last one."""
    return collections.deque(snapshots, maxlen=1)[0]


def _batch_id(db: database.Database, reference: str) -> str:
    with db.reading() as session:
        return queries.find_batch(session, reference).id
