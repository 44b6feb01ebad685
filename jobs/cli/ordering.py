"""`rushes pause`, `rushes resume` and `rushes prioritize`."""

from typing import Any

import click
from sqlalchemy.orm import Session

from jobs import bell, database, lifecycle, queries, readers, settings
from jobs.cli import connections, options, output, references
from jobs.schema import Batch, Job


@click.command()
@click.argument("batches", metavar="BATCH...", nargs=-1, required=True)
@options.output
def pause(batches: tuple[str, ...], as_json: bool) -> None:
    """Start no more jobs of batches.

    At once, also where a worker was about to. What runs goes on; `rushes resume` undoes it.
    """
    _change(batches, lifecycle.pause_batch, "paused", "finished, or paused before", as_json)


@click.command()
@click.argument("batches", metavar="BATCH...", nargs=-1, required=True)
@options.output
def resume(batches: tuple[str, ...], as_json: bool) -> None:
    """Let the jobs of paused batches start again."""
    _change(batches, lifecycle.resume_batch, "resumed", "not paused", as_json)


def _change(given: tuple[str, ...], change: Any, done: str, otherwise: str, as_json: bool) -> None:
    config = settings.load()
    db = connections.open_database(config)
    with db.reading() as session:  # all of them are found before any is touched
        found = [queries.find_batch(session, reference).id for reference in given]
    changed = {batch_id: bool(db.write(change, batch_id)) for batch_id in found}
    if any(changed.values()) and (delayed := bell.kick(config)):
        output.note(f"note: {delayed}")
    if as_json:
        shape = [{"batch_id": batch_id, "changed": did} for batch_id, did in changed.items()]
        output.emit({done: shape})
        return
    for batch_id, did in changed.items():
        output.line(f"batch {batch_id}: {done if did else otherwise}")


@click.command()
@click.argument("references_given", metavar="BATCH|JOB...", nargs=-1, required=True)
@click.option("--to", "priority", type=int, metavar="N", help="-100 to 100, higher goes first.")
@click.option("--first", is_flag=True, help="Before all that waits now.")
@options.output
def prioritize(
    references_given: tuple[str, ...], priority: int | None, first: bool, as_json: bool
) -> None:
    """Change the order of what waits.

    At once, however many jobs a batch has. Its jobs with a priority of their own keep their
    distance to the others.
    """
    if first == (priority is not None):
        raise click.UsageError("give either --to N or --first", click.get_current_context())
    most = readers.MAX_PRIORITY
    if priority is not None and not -most <= priority <= most:
        raise click.UsageError(f"--to must be -{most} to {most}", click.get_current_context())
    config = settings.load()
    db = connections.open_database(config)
    with db.reading() as session:
        found = [references.find(session, reference) for reference in references_given]
    # From the last to the first: with --first, the one named first goes first.
    outcomes = [_moved(db, row, priority) for row in reversed(found)][::-1]
    if any(outcome["changed"] for outcome in outcomes) and (delayed := bell.kick(config)):
        output.note(f"note: {delayed}")
    if as_json:
        output.emit({"prioritized": outcomes})
        return
    for outcome in outcomes:
        output.line(_words(outcome))


def _moved(db: database.Database, row: Batch | Job, priority: int | None) -> dict[str, Any]:
    def move(session: Session) -> tuple[int, bool]:
        wanted = queries.highest_priority(session) + 1 if priority is None else priority
        if isinstance(row, Job):
            return wanted, lifecycle.prioritize_job(session, row.id, wanted)
        return wanted, lifecycle.prioritize_batch(session, row.id, wanted)

    wanted, changed = db.write(move)
    return {
        "batch_id": row.batch_id if isinstance(row, Job) else row.id,
        "job_id": row.id if isinstance(row, Job) else None,
        "priority": wanted if changed else None,
        "changed": changed,
    }


def _words(outcome: dict[str, Any]) -> str:
    job_id = outcome["job_id"]
    what = f"batch {outcome['batch_id']}" if job_id is None else f"job {job_id}"
    if outcome["changed"]:
        return f"{what}: priority {outcome['priority']}"
    return f"{what}: " + ("is finished" if job_id is None else "does not wait any more")
