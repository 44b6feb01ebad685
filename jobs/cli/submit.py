"""`rushes submit`."""

from datetime import UTC, datetime, timedelta
from typing import Any

import click
from sqlalchemy.exc import DBAPIError

from jobs import (
    bell,
    database,
    deadlines,
    errors,
    presets,
    queries,
    readers,
    settings,
    shapes,
    submission,
    watch,
)
from jobs.cli import (
    connections,
    display,
    exits,
    options,
    output,
    prompt_files,
    waiting,
)


@click.command()
@click.argument("file", metavar="FILE|-")
@click.option("--preset", metavar="NAME|FILE", help="The look: `rushes presets` lists them.")
@click.option("--name", help="A name for people; need not be unique.")
@click.option(
    "--priority",
    type=int,
    default=0,
    show_default=True,
    help="-100 to 100, higher goes first; for rows that have none of their own.",
)
@click.option(
    "--owner",
    callback=options.owner,
    help="Whose it is: owners share the farm equally. Default: RUSHES_OWNER.",
)
@click.option(
    "--deadline",
    metavar="WHEN",
    help="06:00, 2h or 2026-12-24T06:00: what is not finished then is given up.",
)
@click.option(
    "--repeat",
    type=int,
    default=1,
    show_default=True,
    help="Videos per prompt, with seed, seed + 1, ...",
)
@click.option(
    "--idempotency-key",
    metavar="KEY",
    help="Submitting again with the same key and content gives the same batch.",
)
@click.option("--skip-invalid", is_flag=True, help="Leave bad lines out instead of refusing all.")
@prompt_files.format_option
@click.option("--dry-run", is_flag=True, help="Check everything, store nothing.")
@click.option("--wait", "wait_for_it", is_flag=True, help="Follow the batch to its end.")
@click.option(
    "--timeout",
    type=options.Seconds(min=0),
    metavar="SECONDS",
    help="With --wait: stop waiting after this long, with exit code 124.",
)
@click.option("-q", "--quiet", is_flag=True, help="Print the batch id alone.")
@options.output
def submit(
    file: str,
    preset: str | None,
    format_name: readers.Format | None,
    dry_run: bool,
    wait_for_it: bool,
    timeout: float | None,
    quiet: bool,
    as_json: bool,
    deadline: str | None,
    owner: str | None,
    **wanted: Any,
) -> int:
    """Store the prompts of a file as a batch.

    FILE holds JSON Lines, CSV or a prompt per line; - is standard input. All of it is stored, or
    nothing: every bad line is told with its number.
    """
    if timeout is not None and not wait_for_it:
        raise options.misused("--timeout is for --wait")
    if wait_for_it and dry_run:
        raise options.misused("--wait is for a batch, and --dry-run makes none")
    config = settings.load()
    chosen = prompt_files.preset(preset, config)
    wanted |= {
        "owner": config.owner if owner is None else owner,
        "deadline": _deadline(deadline),
        "max_queued": config.max_queued_per_owner,
    }
    with prompt_files.opened(file) as (stream, source):
        prompts = submission.PromptFile(
            stream=stream,
            source=source,
            format=format_name or prompt_files.detected(stream, source),
            options=submission.Options(preset=chosen, **wanted),
            check=submission.prompt_check(config),
            images=prompt_files.images(config, file, chosen, check_only=dry_run),
        )
        if dry_run:
            return _told_plan(prompts, as_json=as_json, quiet=quiet)
        db = connections.open_database(config)
        made = submission.submit(db, prompts)
    notes = [*made.plan.notes, *_after_commit(config, db, made)]
    _tell_skipped(source, made.plan, notes)
    if not wait_for_it:
        _tell(made, chosen, notes, as_json=as_json, quiet=quiet)
        return exits.OK
    return _follow(db, made, chosen, notes, timeout=timeout, as_json=as_json, quiet=quiet)


def _deadline(text: str | None) -> datetime | timedelta | None:
    try:
        return None if text is None else deadlines.parse(text, now=datetime.now(UTC))
    except ValueError as error:
        raise errors.invalid("options", f"--deadline: {error}") from None


def _told_plan(prompts: submission.PromptFile, *, as_json: bool, quiet: bool) -> int:
    plan = submission.plan(prompts)
    _tell_skipped(prompts.source, plan, plan.notes)
    if as_json:
        shape = {"batch_id": None, "is_new": None, "dry_run": True}
        output.emit(shape | _plan_shape(plan, prompts.options.preset, plan.notes))
    elif not quiet:
        looks = output.count(len(plan.looks), "look")
        output.line(
            f"{prompts.source}{_how_good(plan)}: {output.count(plan.prompts, 'prompt')}, "
            f"{output.count(plan.jobs, 'job')}, {looks}; nothing was stored"
        )
    return exits.OK


def _how_good(plan: submission.Plan) -> str:
    if not plan.num_skipped:
        return " is good"
    return f" is good but for {output.count(plan.num_skipped, 'bad line')}"


def _after_commit(
    config: settings.Settings, db: database.Database, made: submission.Submission
) -> list[str]:
    """Start the work; what stands in its way. The batch is stored whatever happens here."""
    notes = []
    if made.is_new and (delayed := bell.kick(config)):
        notes.append(delayed)
    try:
        with db.reading() as session:
            idle = queries.queues_without_workers(session, made.batch_id)
            refusals = queries.refusals_of(session, idle)
    except DBAPIError as error:
        told = errors.first_line(error)
        return [*notes, f"the batch is stored, and then the database went away ({told})"]
    if idle:
        notes.append(display.hint_of_idle(idle, refusals))
    return notes


def _tell_skipped(source: str, plan: submission.Plan, notes: list[str] | tuple[str, ...]) -> None:
    for problem in plan.skipped:
        output.note(f"{output.problem_line(source, problem)} (skipped)")
    for text in notes:
        output.note(f"note: {text}")


def _tell(
    made: submission.Submission,
    preset: presets.Preset,
    notes: list[str],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    if as_json:
        output.emit(_shape(made, preset, notes))
    elif quiet:
        output.line(made.batch_id)
    else:
        output.line(_words(made))
        if made.is_new:
            output.note(f"follow it with: rushes watch {made.batch_id}")


def _words(made: submission.Submission) -> str:
    jobs = output.count(made.jobs, "job")
    said = f"{jobs} queued" if made.is_new else f"submitted before with this key, {jobs}"
    return f"batch {made.batch_id}: {said}"


def _follow(
    db: database.Database,
    made: submission.Submission,
    preset: presets.Preset,
    notes: list[str],
    *,
    timeout: float | None,
    as_json: bool,
    quiet: bool,
) -> int:
    snapshots = watch.until_finished(db, made.batch_id, timeout_seconds=timeout)
    if as_json:
        output.note(_words(made))  # the document comes at the end, and perhaps never
    else:
        _tell(made, preset, notes, as_json=False, quiet=quiet)
        if not quiet:
            return waiting.follow(snapshots)
    last = waiting.to_the_end(snapshots)
    if as_json:
        output.emit(_shape(made, preset, notes) | {"batch": shapes.progress(last.progress)})
    return exits.of_batch(last.progress.state)


def _shape(made: submission.Submission, preset: presets.Preset, notes: list[str]) -> dict[str, Any]:
    ids = {"batch_id": made.batch_id, "is_new": made.is_new, "dry_run": False}
    return ids | _plan_shape(made.plan, preset, notes)


def _plan_shape(
    plan: submission.Plan, preset: presets.Preset, notes: list[str] | tuple[str, ...]
) -> dict[str, Any]:
    return {
        "preset": preset.name,
        "prompts": plan.prompts,
        "jobs": plan.jobs,
        "looks": plan.looks,
        "fingerprint": plan.fingerprint,
        "skipped": [output.problem_shape(problem) for problem in plan.skipped],
        "notes": list(notes),
    }
