"""`rushes notify`."""

import sys
from typing import Any

import click

from jobs import (
    beat,
    couriers,
    database,
    first_answer,
    listeners,
    logs,
    misspelt,
    notifier,
    outbox,
    settings,
)
from jobs.cli import connections, exits, options, output, processes
from jobs.schema import Listener, Notice

DEFAULT_EVENTS = (outbox.BATCH_FINISHED, outbox.SCHEDULE_FAILED)
NOTICE_STATES = [state.replace(" ", "-") for state in listeners.NoticeState]
"""As they are typed."""


@click.group()
def notify() -> None:
    """Tell others when batches are finished."""


@notify.command()
@click.option("--check", is_flag=True, help="Exit 0 if the notifier here is alive, else 1.")
def run(check: bool) -> int:
    """Send the notices that are due.

    Any number may run; `rushes up` runs one. Stops on SIGTERM and SIGINT.
    """
    config = settings.load()
    if check:
        return processes.told_beat(beat.of_notifier(config), "notifier")
    db = connections.open_database(config, connect=database.connect_service)
    logs.configure(config)
    misspelt.warn()
    stop = processes.stop_on_signals()
    first_answer.wait(db, stop=stop, alive=beat.of_notifier(config).touch)
    notifier.Notifier(config, db=db).run(stop)
    return exits.OK


@notify.command()
@click.argument("name")
@click.argument("url", metavar="URL|-")
@click.option(
    "--event",
    "events",
    multiple=True,
    default=DEFAULT_EVENTS,
    show_default=True,
    help="May be repeated.",
)
@click.option(
    "--owner",
    callback=options.owner,
    help="Only of this owner's batches and schedules. Default: everybody's.",
)
@options.output
def add(name: str, url: str, events: tuple[str, ...], owner: str | None, as_json: bool) -> None:
    """Tell this address from now on.

    https://... gets signed webhooks, and their secret is shown now and never again. Other addresses
    are those of apprise: slack://..., mailto://... URL - is read from standard input.
    """
    config = settings.load()
    if url == "-":
        url = sys.stdin.readline().strip() if sys.stdin else ""
    listeners.check(config, name=name, url=url, events=events)
    db = connections.open_database(config)
    with db.transaction() as session:
        row = listeners.add(session, name=name, url=url, owner=owner, events=events)
    if as_json:
        output.emit(_shape(row) | {"secret": row.secret})
    elif row.secret is None:
        output.line(f"{name} is told of {', '.join(row.events)}")
    else:
        output.line(row.secret)
        output.note(f"{name} is told of {', '.join(row.events)}; the secret is not shown again")


@notify.command("list")
@options.output
def list_listeners(as_json: bool) -> None:
    """List who is told, without the secrets."""
    db = connections.open_database(settings.load())
    with db.reading() as session:
        found = listeners.every(session)
    if as_json:
        output.emit({"listeners": [_shape(row) for row in found]})
    elif found:
        headers = ("NAME", "ADDRESS", "OWNER", "EVENTS", "STATE", "CREATED")
        output.table(headers, [_row(row) for row in found])
    else:
        output.note("nobody is told: `rushes notify add NAME URL`")


@notify.command()
@click.argument("name")
@options.output
def remove(name: str, as_json: bool) -> None:
    """Tell this one no more; notices that wait are dropped."""
    db = connections.open_database(settings.load())
    dropped = db.write(listeners.remove, name)
    if as_json:
        output.emit({"name": name, "removed": True, "dropped": dropped})
    else:
        output.line(f"{name} is told no more" + (f"; {dropped} dropped" if dropped else ""))


@notify.command()
@click.argument("name")
@options.output
def test(name: str, as_json: bool) -> int:
    """Send a notice now and say what came of it."""
    config = settings.load()
    db = connections.open_database(config)
    with db.reading() as session:
        row = listeners.find(session, name)
        now = database.now(session)
    letter = couriers.Letter(
        url=row.url,
        secret=row.secret,
        message_id=f"msg_test_{int(now.timestamp())}",
        body={"type": outbox.TEST, "timestamp": now.isoformat(), "data": {}},
    )
    problem = None
    try:
        couriers.Courier(internal_hosts=listeners.internal_hosts(config)).deliver(letter)
    except couriers.NotDelivered as error:
        problem = str(error)
    if as_json:
        output.emit({"name": name, "delivered": problem is None, "error": problem})
    elif problem is None:
        output.line(f"{name} has taken it")
    else:
        output.note(f"{name}: {output.plain(problem)}")
    return exits.OK if problem is None else exits.ERROR


@notify.command()
@click.option("--limit", type=options.Whole(1, 1_000), default=20, show_default=True)
@click.option(
    "--state",
    type=click.Choice(NOTICE_STATES),
    help="Only those of which this became.",
)
@click.option("--before", metavar="MESSAGE_ID", help="Older than this one: the next page.")
@options.output
def log(limit: int, state: str | None, before: str | None, as_json: bool) -> None:
    """List the latest notices and what became of them."""
    wanted = None if state is None else listeners.NoticeState(state.replace("-", " "))
    db = connections.open_database(settings.load())
    with db.reading() as session:
        found = listeners.notices(session, limit=limit, state=wanted, before=before)
    if as_json:
        output.emit({"notices": [_notice_shape(notice, name) for notice, name in found]})
    elif found:
        headers = ("CREATED", "EVENT", "ABOUT", "TO", "STATE", "TRIES", "NEXT TRY", "ERROR")
        output.table(headers, [_notice_row(notice, name) for notice, name in found])
        if len(found) == limit:
            of_state = f" --state {state}" if state else ""
            last = found[-1][0].message_id
            output.note(f"older ones: rushes notify log{of_state} --before {last}")
    else:
        what = "no such notices" if state else "no notices"
        output.note(what + (" before that one" if before else "" if state else " yet"))


def _row(row: Listener) -> tuple[str, ...]:
    return (
        output.cut(row.name, 40),
        output.plain(listeners.shown(row.url)),
        "everybody" if row.owner is None else output.cut(row.owner, 40),
        ", ".join(row.events),
        "told" if row.stopped_at is None else "gone",
        output.when(row.created_at),
    )


def _shape(row: Listener) -> dict[str, Any]:
    return {
        "name": row.name,
        "address": listeners.shown(row.url),
        "owner": row.owner,
        "events": row.events,
        "created_at": row.created_at,
        "stopped_at": row.stopped_at,
    }


def _notice_row(notice: Notice, name: str) -> tuple[str, ...]:
    about = notice.body["data"]
    return (
        output.when(notice.created_at),
        notice.event,
        output.cut(about.get("batch_id") or about.get("schedule") or "", 40),
        output.cut(name, 40),
        listeners.state_of(notice),
        str(notice.tries),
        output.when(notice.next_try_at),
        output.plain(notice.error or ""),
    )


def _notice_shape(notice: Notice, name: str) -> dict[str, Any]:
    about = notice.body["data"]
    return {
        "message_id": notice.message_id,
        "name": name,
        "event": notice.event,
        "batch_id": about.get("batch_id"),
        "schedule": about.get("schedule"),
        "state": listeners.state_of(notice),
        "created_at": notice.created_at,
        "tries": notice.tries,
        "next_try_at": notice.next_try_at,
        "delivered_at": notice.delivered_at,
        "given_up_at": notice.given_up_at,
        "error": notice.error,
    }
