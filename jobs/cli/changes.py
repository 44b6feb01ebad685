"""`rushes cancel` and `rushes retry`."""

from collections.abc import Mapping
from typing import Any

import click

from jobs import bell, cancelling, database, failures, orders, settings, shapes, states
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
@click.argument("references_given", metavar="BATCH|JOB...", nargs=-1, required=True)
@click.option("--failed-only", is_flag=True, help="The failed jobs: the default for a batch.")
@click.option("--cancelled", is_flag=True, help="The cancelled jobs.")
@options.kinds("Only those that failed so, as `rushes show` names it")
@click.option(
    "--quarantined/--no-quarantined",
    default=None,
    help="Only those that were set aside for ending their workers, or none of these.",
)
@options.output
def retry(
    references_given: tuple[str, ...],
    failed_only: bool,
    cancelled: bool,
    kinds: tuple[str, ...],
    quarantined: bool | None,
    as_json: bool,
) -> None:
    """Queue failed or cancelled jobs again.

    With the same seed and look and with fresh budgets. A single JOB may be failed or cancelled,
    unless an option names one of them.
    With --cancelled, those that still run and were to stop go on.
    """
    config = settings.load()
    db = connections.open_database(config)
    with db.reading() as session:  # all of them are found before any is touched
        found = [references.find(session, reference) for reference in references_given]
        for batch_id in {_batch_id(row) for row in found}:
            orders.check_not_expired(session, batch_id)
    which = failures.Which(
        kinds=tuple(states.FailureKind(kind) for kind in kinds), quarantined=quarantined
    )
    wanted = _wanted(failed_only, cancelled)
    of_job = wanted if failed_only or cancelled else RETRYABLE
    outcomes = [_retry(db, row, of_job if isinstance(row, Job) else wanted, which) for row in found]
    if any(outcome.jobs for outcome in outcomes) and (delayed := bell.kick(config)):
        output.note(f"note: {delayed}")
    if as_json:
        output.emit(_retry_shape(found, outcomes))
        return
    for row, outcome in zip(found, outcomes, strict=True):
        states_wanted = of_job if isinstance(row, Job) else wanted
        output.line(_retry_words(db, row, outcome, states_wanted, which))


def _batch_id(row: Batch | Job) -> str:
    return row.batch_id if isinstance(row, Job) else row.id


def _wanted(failed_only: bool, cancelled: bool) -> tuple[states.JobState, ...]:
    if not cancelled:
        return (states.JobState.FAILED,)
    return RETRYABLE if failed_only else (states.JobState.CANCELLED,)


def _retry(
    db: database.Database,
    row: Batch | Job,
    wanted: tuple[states.JobState, ...],
    which: failures.Which,
) -> orders.Retried:
    return db.write(
        orders.retry_jobs,
        _batch_id(row),
        from_states=wanted,
        which=which,
        job_ids=[row.id] if isinstance(row, Job) else None,
    )


def _retry_shape(found: list[Batch | Job], outcomes: list[orders.Retried]) -> dict[str, Any]:
    batch_ids = {_batch_id(row) for row in found}
    return {
        "batch_id": batch_ids.pop() if len(batch_ids) == 1 else None,
        "retried": sum(outcome.jobs for outcome in outcomes),
        "outcomes": [
            {"batch_id": _batch_id(row), "job_id": row.id if isinstance(row, Job) else None}
            | shapes.retried(outcome)
            for row, outcome in zip(found, outcomes, strict=True)
        ],
    }


def _retry_words(
    db: database.Database,
    row: Batch | Job,
    outcome: orders.Retried,
    wanted: tuple[states.JobState, ...],
    which: failures.Which,
) -> str:
    if isinstance(row, Job):
        done = "queued again" if outcome.jobs else _why_not_retried(db, row, wanted)
        said = f"job {row.id} ({display.label(row)}): {done}"
    elif outcome.jobs:
        said = f"batch {row.id}: {output.count(outcome.jobs, 'job')} queued again"
    else:
        others = row.cancelled if wanted == (states.JobState.FAILED,) else 0
        hint = f"; {output.count(others, 'cancelled job')} there: --cancelled" if others else ""
        such = " such" if which != failures.ALL else ""
        return f"batch {row.id}: no{such} {' or '.join(wanted)} jobs{hint}"
    if outcome.doubtful:
        said += f"; will probably fail as before: {_doubts(outcome.doubtful)}"
    if outcome.jobs and outcome.is_paused:
        said += f"; the batch is paused, `rushes resume {_batch_id(row)}` lets it go on"
    return said


def _why_not_retried(db: database.Database, job: Job, wanted: tuple[states.JobState, ...]) -> str:
    with db.reading() as session:  # it may have been queued since it was found
        now = session.get(Job, job.id) or job
    if now.state not in RETRYABLE:
        return f"is {now.state}: nothing to retry"
    if now.state not in wanted:
        return f"is {now.state}, not {' or '.join(wanted)}: nothing to retry"
    kind = display.kind_of(now.failure_kind, quarantined=now.quarantined)
    return f"is {now.state}{kind and f', {kind}'}: nothing to retry"


def _doubts(doubtful: Mapping[str, int]) -> str:
    return ", ".join(f"{number:,} {doubt}" for doubt, number in doubtful.items())
