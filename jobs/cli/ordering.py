"""`rushes pause`, `rushes resume` and `rushes prioritize`."""

from collections.abc import Callable
from typing import Any

import click
from sqlalchemy.orm import Session

from jobs import bell, database, orders, prompt_row, queries, reordering, settings, states
from jobs.cli import connections, options, output, references
from jobs.schema import Batch, Job


@click.command()
@click.argument("references_given", metavar="BATCH|JOB...", nargs=-1, required=True)
@options.output
def pause(references_given: tuple[str, ...], as_json: bool) -> None:
    """Start no more jobs of batches, or not these jobs.

    At once, also where a worker was about to. What runs goes on; `rushes resume` undoes it.
    """
    changes = orders.pause_batch, orders.pause_job
    _change(references_given, changes, "paused", _why_not_paused, as_json)


def _why_not_paused(row: Batch | Job) -> str:
    if isinstance(row, Batch):
        return "paused before" if row.finished_at is None else "is finished"
    is_waiting = row.state == states.JobState.QUEUED
    return "paused before" if is_waiting else f"does not wait: {row.state}"


@click.command()
@click.argument("references_given", metavar="BATCH|JOB...", nargs=-1, required=True)
@options.output
def resume(references_given: tuple[str, ...], as_json: bool) -> None:
    """Let paused jobs, and the jobs of paused batches, start again.

    A job that was paused by itself stays so when its batch is resumed.
    """
    changes = orders.resume_batch, orders.resume_job
    _change(references_given, changes, "resumed", lambda _row: "not paused", as_json)


def _change(
    given: tuple[str, ...],
    changes: tuple[Callable[[Session, str], bool], Callable[[Session, int], bool]],
    done: str,
    why_not: Callable[[Batch | Job], str],
    as_json: bool,
) -> None:
    """Of each pair the first is for a batch, the second for a job."""
    config = settings.load()
    db = connections.open_database(config)
    with db.reading() as session:  # all of them are found before any is touched
        found = [references.find(session, reference) for reference in given]
    outcomes = []
    for row in found:
        if isinstance(row, Job):
            did = db.write(changes[1], row.id)
            outcomes.append({"batch_id": row.batch_id, "job_id": row.id, "changed": did})
        else:
            did = db.write(changes[0], row.id)
            outcomes.append({"batch_id": row.id, "job_id": None, "changed": did})
    if any(outcome["changed"] for outcome in outcomes) and (delayed := bell.kick(config)):
        output.note(f"note: {delayed}")
    if as_json:
        output.emit({done: outcomes})
        return
    for row, outcome in zip(found, outcomes, strict=True):
        said = done if outcome["changed"] else why_not(_as_it_is_now(db, row))
        output.line(f"{_named(outcome)}: {said}")


def _as_it_is_now(db: database.Database, row: Batch | Job) -> Batch | Job:
    """Not as it was found: it may have been started meanwhile."""
    with db.reading() as session:
        return session.get(type(row), row.id) or row


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
        raise options.misused("give either --to N or --first")
    most = prompt_row.MAX_PRIORITY
    if priority is not None and not -most <= priority <= most:
        raise options.misused(f"--to must be -{most} to {most}")
    config = settings.load()
    db = connections.open_database(config)
    with db.reading() as session:
        found = [references.find(session, reference) for reference in references_given]
    # From the last to the first: with --first, the one named first goes first.
    outcomes = [_moved(db, row, priority) for row in reversed(found)][::-1]
    if any(outcome["changed"] for outcome in outcomes) and (
        delayed := reordering.send_anew(config, db)
    ):
        output.note(f"note: {delayed}")
    if as_json:
        output.emit({"prioritized": outcomes})
        return
    for outcome in outcomes:
        output.line(_words(outcome))


def _moved(db: database.Database, row: Batch | Job, priority: int | None) -> dict[str, Any]:
    def move(session: Session) -> tuple[int, bool]:
        first = (queries.highest_priority(session) or 0) + 1
        wanted = first if priority is None else priority
        if isinstance(row, Job):
            return wanted, orders.prioritize_job(session, row.id, wanted)
        return wanted, orders.prioritize_batch(session, row.id, wanted)

    wanted, changed = db.write(move)
    return {
        "batch_id": row.batch_id if isinstance(row, Job) else row.id,
        "job_id": row.id if isinstance(row, Job) else None,
        "priority": wanted if changed else None,
        "changed": changed,
    }


def _words(outcome: dict[str, Any]) -> str:
    if outcome["changed"]:
        return f"{_named(outcome)}: priority {outcome['priority']}"
    is_batch = outcome["job_id"] is None
    return f"{_named(outcome)}: " + ("is finished" if is_batch else "does not wait any more")


def _named(outcome: dict[str, Any]) -> str:
    job_id = outcome["job_id"]
    return f"batch {outcome['batch_id']}" if job_id is None else f"job {job_id}"
