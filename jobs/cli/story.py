"""`rushes logs`: the attempts of a job or a batch, in the order in which they began."""

from collections.abc import Collection, Iterator

import click

from jobs import database, queries, settings, shapes, sizes, states
from jobs.cli import connections, display, options, output, references
from jobs.schema import Attempt, Batch, Job

Pair = tuple[Job, Attempt]
States = Collection[states.AttemptState]
WENT_WRONG = (states.AttemptState.FAILED, states.AttemptState.LOST)


@click.command()
@click.argument("reference", metavar="BATCH|JOB")
@click.option("--failed-only", is_flag=True, help="Only the attempts that went wrong.")
@click.option(
    "--detail", is_flag=True, help="With tracebacks; those of a single job are always shown."
)
@options.output
def logs(reference: str, failed_only: bool, detail: bool, as_json: bool) -> None:
    """Tell what happened to a batch or a job.

    Each attempt: when, where, how long each stage took, what went wrong.
    """
    db = connections.open_database(settings.load())
    with db.reading() as session:
        found = references.find(session, reference)
    that_are = WENT_WRONG if failed_only else ()
    if isinstance(found, Job):
        pairs, batch_id = _of_job(db, found, that_are), found.batch_id
    else:
        pairs, batch_id = _of_batch(db, found, that_are), found.id
    if as_json:
        attempts = (
            shapes.attempt(attempt) | {"custom_id": job.custom_id} for job, attempt in pairs
        )
        output.emit_list({"batch_id": batch_id}, "attempts", attempts)
        return
    told = 0
    for job, attempt in pairs:
        told += 1
        _tell(job, attempt, detail=detail or isinstance(found, Job))
    if isinstance(found, Job):
        output.line(_now(found))
    elif not told:
        output.note("no attempts" + (" that went wrong" if failed_only else " yet"))


def _of_job(db: database.Database, job: Job, that_are: States) -> Iterator[Pair]:
    with db.reading() as session:
        found = queries.attempts(session, job.id)
    yield from ((job, each) for each in found if not that_are or each.state in that_are)


def _of_batch(db: database.Database, batch: Batch, that_are: States) -> Iterator[Pair]:
    after = 0
    while True:
        # A short transaction per page: what is printed may be read for hours.
        with db.reading() as session:
            page = queries.attempts_of_batch(session, batch, after=after, that_are=that_are)
        yield from page
        if not page:
            return
        after = page[-1][1].id


def _tell(job: Job, attempt: Attempt, *, detail: bool) -> None:
    output.line(
        f"{output.when(attempt.started_at)}  job {job.id} ({display.label(job)}), "
        f"attempt {attempt.number} on {output.plain(attempt.worker)}: {_end(attempt)}"
    )
    if attempt.seconds:
        stages = ", ".join(f"{name} {value:.1f} s" for name, value in attempt.seconds.items())
        memory = attempt.peak_memory_bytes
        peak = "" if memory is None else f"; peak memory {sizes.words(memory)}"
        _tell_below(stages + peak)
    if attempt.memory and attempt.memory != "resident":
        _tell_below(f"memory: {attempt.memory}")
    if attempt.error:
        kind = f"{attempt.failure_kind}: " if attempt.failure_kind else ""
        _tell_below(f"{kind}{attempt.error}")
    if attempt.note:
        _tell_below(attempt.note)
    if attempt.video_key:
        _tell_below(f"{attempt.video_key}, {sizes.words(attempt.video_bytes or 0)}")
    if detail and attempt.error_detail:
        for row in attempt.error_detail.splitlines():
            _tell_below(f"| {row}")


def _tell_below(text: str) -> None:
    output.line(f"    {output.plain(text)}".rstrip())


def _end(attempt: Attempt) -> str:
    said = output.state(attempt.state)
    if attempt.finished_at is not None:
        seconds = (attempt.finished_at - attempt.started_at).total_seconds()
        said += f" after {output.duration(max(seconds, 0))}"
    if attempt.stage and attempt.state is not states.AttemptState.SUCCEEDED:
        said += f", in {attempt.stage} {display.step_of(attempt)}".rstrip()
    return said


def _now(job: Job) -> str:
    """Where the job stands after all that."""
    if job.state is states.JobState.QUEUED and job.not_before is not None:
        return f"now {output.state(job.state)}{display.until(job.not_before)}"
    return f"now {output.state(job.state)}" + (" (quarantined)" if job.quarantined else "")
