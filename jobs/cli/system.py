"""`rushes workers`, `rushes migrate` and `rushes doctor`."""

from dataclasses import asdict
from datetime import datetime

import click
from alembic.util import CommandError

from jobs import database, doctor, errors, logs, migrate, queries, settings
from jobs.cli import connections, display, exits, options, output, shapes
from jobs.schema import Attempt

QUEUE_PREFIX = "rushes.render."


@click.command()
@options.output
def workers(as_json: bool) -> None:
    """List the workers and what they render."""
    db = connections.open_database(settings.load())
    with db.reading() as session:
        found = queries.live_workers(session)
        now = database.now(session)
    if as_json:
        output.emit({"workers": [shapes.worker(live) for live in found]})
    elif found:
        headers = ("WORKER", "STATE", "SEEN", "DEVICE", "MEMORY", "TAKES", "RENDERS", "RESTARTS")
        output.table(headers, [_worker_row(live, now) for live in found])
    else:
        output.note("no workers: start one with `rushes worker`, or everything with `rushes up`")


def _worker_row(live: queries.LiveWorker, now: datetime) -> tuple[str, ...]:
    row = live.worker
    return (
        output.plain(row.name),
        output.state("alive" if live.is_alive else "silent"),
        f"{output.duration(max((now - row.heartbeat_at).total_seconds(), 0))} ago",
        output.plain(row.device),
        "" if row.memory_bytes is None else output.size(row.memory_bytes),
        output.plain(", ".join(queue.removeprefix(QUEUE_PREFIX) for queue in row.queues)),
        _rendering(live.attempt),
        str(row.restarts),
    )


def _rendering(attempt: Attempt | None) -> str:
    if attempt is None:
        return ""
    step = display.step_of(attempt)
    return f"job {attempt.job_id}: {attempt.stage or 'start'}" + (f" {step}" if step else "")


@click.command("migrate")
@click.option("--revision", default="head", show_default=True, help="Go up to this one only.")
@options.output
def migrate_database(revision: str, as_json: bool) -> None:
    """Bring the database to this version.

    Any number of them may start at once: one works, the others wait.
    """
    config = settings.load()
    logs.configure(config, level="WARNING")
    db = database.connect(config)
    click.get_current_context().call_on_close(db.close)
    try:
        before, after = migrate.upgrade(db, revision=revision)
    except CommandError as error:
        raise errors.NotFound(f"--revision {revision}: {error}") from None
    if as_json:
        output.emit({"before": before, "after": after})
    elif before == after:
        output.line(f"the database is at {after or 'nothing'} already")
    else:
        output.line(f"the database went from {before or 'nothing'} to {after}")


@click.command("doctor")
@options.output
def doctor_command(as_json: bool) -> int:
    """Check every part and say what to do.

    Exit code 1 when something fails; warnings are no failure.
    """
    checks = []
    for check in doctor.examine():
        checks.append(check)
        if not as_json:
            _print_check(check)
    if as_json:
        output.emit({"checks": [asdict(check) for check in checks]})
    failed = sum(check.status == "fail" for check in checks)
    if not as_json:
        warned = sum(check.status == "warn" for check in checks)
        output.line(f"{len(checks) - failed - warned} ok, {warned} warnings, {failed} failures")
    return exits.ERROR if failed else exits.OK


def _print_check(check: doctor.Check) -> None:
    mark = output.state(check.status) + " " * (4 - len(check.status))
    output.line(f"{mark}  {check.name}: {output.plain(check.seen)}")
    if check.advice:
        output.line(f"      -> {output.plain(check.advice)}")
