"""`rushes cancel` and `rushes retry`."""

from typing import Any

import click

from jobs import bell, cancelling, database, orders, settings, states
from jobs.cli import connections, display, options, output, references
from jobs.schema import Batch, Job

RETRYABLE: tuple[states.JobState, ...] = (states.JobState.FAILED, states.JobState.CANCELLED)


@click.command()
@click.argument("references_given", metavar="BATCH|JOB...", nargs=-1, required=True)
@options.output
def cancel(references_given: tuple[str, ...], as_json: bool) -> None:
    """Cancel batches or jobs.

    What waits is cancelled now; what runs stops at its next step.
    """
    db = connections.open_database(settings.load())
    with db.reading() as session:  # all of them are found before any is touched
        found = [references.find(session, reference) for reference in references_given]
    outcomes = [
        _cancel_job(db, row) if isinstance(row, Job) else _cancel_batch(db, row) for row in found
    ]
    if as_json:
        output.emit({"cancelled": outcomes})
        return
    for outcome in outcomes:
        output.line(_cancel_words(outcome))


def _cancel_batch(db: database.Database, batch: Batch) -> dict[str, Any]:
    cancelled, asked = cancelling.cancel_batch(db, batch.id)
    return {"batch_id": batch.id, "job_id": None, "cancelled": cancelled, "stopping": asked}


def _cancel_job(db: database.Database, job: Job) -> dict[str, Any]:
    cancelled, asked = cancelling.cancel_job(db, job)
    return {"batch_id": job.batch_id, "job_id": job.id, "cancelled": cancelled, "stopping": asked}


def _cancel_words(outcome: dict[str, Any]) -> str:
    job_id = outcome["job_id"]
    what = f"batch {outcome['batch_id']}" if job_id is None else f"job {job_id}"
    said = (
        [f"{output.count(outcome['cancelled'], 'job')} cancelled"] if outcome["cancelled"] else []
    )
    if outcome["stopping"]:
        said.append(f"{outcome['stopping']:,} running: asked to stop at the next step")
    return f"{what}: {', '.join(said) or 'nothing to cancel'}"


@click.command()
@click.argument("reference", metavar="BATCH|JOB")
@click.option("--failed-only", is_flag=True, help="The failed jobs: the default for a batch.")
@click.option("--cancelled", is_flag=True, help="The cancelled jobs.")
@options.output
def retry(reference: str, failed_only: bool, cancelled: bool, as_json: bool) -> None:
    """Queue failed or cancelled jobs again.

    With the same seed and look and with fresh budgets. A single JOB may be failed or cancelled,
    unless an option names one of them.
    With --cancelled, those that still run and were to stop go on.
    """
    config = settings.load()
    db = connections.open_database(config)
    with db.reading() as session:
        found = references.find(session, reference)
        batch_id = found.batch_id if isinstance(found, Job) else found.id
        orders.check_not_expired(session, batch_id)
    wanted = _wanted(failed_only, cancelled)
    if isinstance(found, Job) and not (failed_only or cancelled):
        wanted = RETRYABLE
    job_ids = [found.id] if isinstance(found, Job) else None
    retried = db.write(orders.retry_jobs, batch_id, from_states=wanted, job_ids=job_ids)
    if retried and (delayed := bell.kick(config)):
        output.note(f"note: {delayed}")
    if as_json:
        output.emit({"batch_id": batch_id, "retried": retried})
    else:
        output.line(_retry_words(found, retried, wanted))


def _wanted(failed_only: bool, cancelled: bool) -> tuple[states.JobState, ...]:
    if not cancelled:
        return (states.JobState.FAILED,)
    return RETRYABLE if failed_only else (states.JobState.CANCELLED,)


def _retry_words(found: Batch | Job, retried: int, wanted: tuple[states.JobState, ...]) -> str:
    if isinstance(found, Job):
        unasked = f", not {' or '.join(wanted)}" if found.state in RETRYABLE else ""
        said = "queued again" if retried else f"is {found.state}{unasked}: nothing to retry"
        return f"job {found.id} ({display.label(found)}): {said}"
    if retried:
        return f"batch {found.id}: {output.count(retried, 'job')} queued again"
    others = found.cancelled if wanted == (states.JobState.FAILED,) else 0
    hint = f"; {output.count(others, 'cancelled job')} there: --cancelled" if others else ""
    return f"batch {found.id}: no {' or '.join(wanted)} jobs{hint}"
