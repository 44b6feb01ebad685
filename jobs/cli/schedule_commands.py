"""`rushes schedule`."""

from pathlib import Path
from typing import Any

import click

from jobs import (
    bell,
    database,
    errors,
    firing,
    presets,
    readers,
    schedules,
    settings,
    shapes,
    states,
    submission,
)
from jobs.cli import connections, options, output, prompt_files
from jobs.schema import Batch, Firing, Schedule

COMING = 5


@click.group()
def schedule() -> None:
    """Submit batches by a cron rule.

    Each fire time makes one batch, however many dispatchers run.
    """


@schedule.command()
@click.argument("name")
@click.option(
    "--cron",
    required=True,
    metavar="'M H D M W'",
    help="When: minute, hour, day, month, weekday; or @daily and the like.",
)
@click.option("--tz", "zone", default="UTC", show_default=True, help="Whose clock: Europe/Berlin.")
@click.option(
    "--file", required=True, metavar="FILE|s3://...", help="A file is kept; an object read anew."
)
@click.option("--preset", required=True, metavar="NAME|FILE", help="The look, kept as it is now.")
@click.option(
    "--misfire",
    default="run_once",
    show_default=True,
    metavar="skip|run_once|catch_up:N",
    help="Fire times missed by all dispatchers: make up for none, the latest, the latest N.",
)
@click.option(
    "--overlap",
    type=click.Choice([policy.value for policy in states.Overlap]),
    default="queue",
    show_default=True,
    help="While an earlier batch is unfinished: make the next one all the same, or not.",
)
@click.option(
    "--list",
    "lists",
    multiple=True,
    metavar="NAME=A,B,...|NAME=@FILE",
    help="A variable {{NAME}} that takes the next item at each firing.",
)
@click.option("--owner", callback=options.owner, help="As of `rushes submit`.")
@click.option("--priority", type=int, default=0, show_default=True, help="As of `rushes submit`.")
@click.option("--repeat", type=int, default=1, show_default=True, help="As of `rushes submit`.")
@click.option("--skip-invalid", is_flag=True, help="As of `rushes submit`.")
@prompt_files.format_option
@options.output
def add(
    name: str,
    file: str,
    preset: str,
    misfire: str,
    overlap: str,
    lists: tuple[str, ...],
    format_name: readers.Format | None,
    owner: str | None,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Add a schedule. Its prompts are checked as for its first firing."""
    config = settings.load()
    db = connections.open_database(config)
    policy, catch_up = _misfire(misfire)
    new = schedules.NewSchedule(
        name=name,
        preset=presets.load(preset, folder=config.presets_dir),
        misfire=policy,
        catch_up=catch_up,
        overlap=states.Overlap(overlap),
        owner=config.owner if owner is None else owner,
        lists=_lists(lists),
        **_source(config, file, format_name),
        **wanted,
    )
    made, plan = firing.add(config, db, new)
    for problem in plan.skipped:
        output.note(f"{output.problem_line(file, problem)} (skipped)")
    for text in plan.notes:
        output.note(f"note: {text}")
    _tell_one(db, made, plan, as_json=as_json)


def _misfire(text: str) -> tuple[states.Misfire, int]:
    name, _, number = text.replace(" ", ":").partition(":")
    try:
        policy = states.Misfire(name)
        if (policy is states.Misfire.CATCH_UP) != bool(number):
            raise ValueError
        return policy, int(number or 1)
    except ValueError:
        message = f"--misfire must be skip, run_once or catch_up:N, got {text!r}"
        raise options.misused(message) from None


def _lists(given: tuple[str, ...]) -> dict[str, list[str]]:
    lists: dict[str, list[str]] = {}
    for name, items in map(_list, given):
        if name in lists:
            message = f"--list {name} is given twice: give all of its items at once, {name}=A,B"
            raise options.misused(message)
        lists[name] = items
    return lists


def _list(text: str) -> tuple[str, list[str]]:
    name, equals, items = text.partition("=")
    if not equals:
        raise options.misused(f"--list must be NAME=A,B or NAME=@FILE, got {text!r}")
    if items.startswith("@"):
        lines = _bytes(items[1:]).decode("utf-8-sig", "replace").splitlines()
        return name, [line.strip() for line in lines if line.strip()]
    return name, [item.strip() for item in items.split(",")]


def _source(
    config: settings.Settings, file: str, format_name: readers.Format | None
) -> dict[str, Any]:
    """The prompts themselves, or where they are read from each time."""
    is_url = file.startswith("s3://")
    if file == prompt_files.STDIN or ("://" in file and not is_url):
        reason = "is neither a file, to be kept, nor s3://bucket/key, to be read at each firing"
        raise errors.invalid(file, reason)
    data = firing.read_url(config, file) if is_url else _bytes(file)
    found = format_name or readers.detect_format(file, data[: readers.HEAD_BYTES])
    if is_url:
        return {"prompts_url": file, "format": found}
    if len(data) > schedules.MAX_PROMPT_BYTES:  # cut, perhaps amid a character
        return {"prompts": data.decode("utf-8", "replace"), "format": found}
    try:
        return {"prompts": data.decode(), "format": found}
    except UnicodeDecodeError:
        raise errors.invalid(file, "is not UTF-8: save the file as UTF-8") from None


def _bytes(file: str) -> bytes:
    try:
        with Path(file).open("rb") as stream:
            return stream.read(schedules.MAX_PROMPT_BYTES + 1)
    except (OSError, ValueError) as error:
        raise prompt_files.unreadable(file, error) from None


@schedule.command("list")
@options.output
def list_schedules(as_json: bool) -> None:
    """List the schedules."""
    db = connections.open_database(settings.load())
    with db.reading() as session:
        found = schedules.every(session)
    if as_json:
        output.emit({"schedules": [shapes.schedule(row, coming=None) for row in found]})
    elif found:
        headers = ("SCHEDULE", "STATE", "CRON", "ZONE", "NEXT", "FIRED", "PRESET")
        output.table(headers, [_row(row) for row in found])
    else:
        output.note("no schedules yet: add one with `rushes schedule add`")


def _row(row: Schedule) -> tuple[str, ...]:
    return (
        output.cut(row.name, 40),
        output.state("paused" if row.paused_at else "active"),
        row.cron,
        row.zone,
        _local(row, row.next_fire_at),
        str(row.counter),
        output.cut(row.preset, 40),
    )


@schedule.command()
@click.argument("name")
@options.output
def show(name: str, as_json: bool) -> None:
    """Show a schedule and its next five fire times."""
    db = connections.open_database(settings.load())
    with db.reading() as session:
        found = schedules.find(session, name)
    _tell_one(db, found, None, as_json=as_json)


def _tell_one(
    db: database.Database, row: Schedule, plan: submission.Plan | None, *, as_json: bool
) -> None:
    with db.reading() as session:
        coming = schedules.coming(session, row, COMING)
    if as_json:
        output.emit(shapes.schedule(row, coming=coming))
        return
    output.facts(
        [
            ("schedule", output.plain(row.name)),
            ("state", output.state("paused" if row.paused_at else "active")),
            ("cron", f"{row.cron} in {row.zone}"),
            ("preset", output.plain(row.preset)),
            ("prompts", output.plain(row.prompts_url or "kept with the schedule")),
            ("jobs", "" if plan is None else f"{plan.jobs:,} at the first firing"),
            ("lists", output.plain(", ".join(row.lists))),
            ("missed", shapes.misfire(row)),
            ("overlap", row.overlap),
            ("fired", output.count(row.counter, "time")),
            *((("next" if not number else ""), _local(row, t)) for number, t in enumerate(coming)),
        ]
    )
    if not coming:
        output.note("it does not fire: " + ("paused" if row.paused_at else "no date is left"))


def _local(row: Schedule, moment: Any) -> str:
    """By the schedule's own clock."""
    if moment is None:
        return ""
    return str(moment.astimezone(schedules.rule_of(row).zone).strftime("%Y-%m-%d %H:%M %z"))


@schedule.command()
@click.argument("name")
@options.output
def pause(name: str, as_json: bool) -> None:
    """Fire no more until it is resumed."""
    db = connections.open_database(settings.load())
    changed = db.write(schedules.pause, name)
    _told(name, "paused", changed, as_json=as_json)


@schedule.command(short_help="Fire again from now on.")
@click.argument("name")
@options.output
def resume(name: str, as_json: bool) -> None:
    """Fire again from now on; what fell into the pause is not made up for."""
    db = connections.open_database(settings.load())
    changed = db.write(schedules.resume, name)
    _told(name, "active", changed, as_json=as_json)


def _told(name: str, state: str, changed: bool, *, as_json: bool) -> None:
    if as_json:
        output.emit({"name": name, "state": state, "changed": changed})
    else:
        output.line(f"schedule {output.plain(name)} is {state}" + ("" if changed else " already"))


@schedule.command()
@click.argument("name")
@options.output
def remove(name: str, as_json: bool) -> None:
    """Remove a schedule and its history; its batches stay."""
    db = connections.open_database(settings.load())
    db.write(schedules.remove, name)
    if as_json:
        output.emit({"name": name, "removed": True})
    else:
        output.line(f"schedule {output.plain(name)} is removed; its batches stay")


@schedule.command("run-now", short_help="Make its next batch at once.")
@click.argument("name")
@click.option("-q", "--quiet", is_flag=True, help="Print the batch id alone.")
@options.output
def run_now(name: str, quiet: bool, as_json: bool) -> None:
    """Make its next batch at once, beside the rule and even while paused."""
    config = settings.load()
    batch_id, _ = firing.fire_now(config, connections.open_database(config), name)
    if delayed := bell.kick(config):
        output.note(f"note: {delayed}")
    if as_json:
        output.emit({"name": name, "batch_id": batch_id})
    else:
        output.line(batch_id if quiet else f"batch {batch_id}: made by {output.plain(name)}")


@schedule.command()
@click.argument("name")
@click.option(
    "--limit", type=options.Whole(1, schedules.MAX_HISTORY), default=20, show_default=True
)
@options.output
def history(name: str, limit: int, as_json: bool) -> None:
    """What became of its fire times, newest first."""
    db = connections.open_database(settings.load())
    with db.reading() as session:
        row = schedules.find(session, name)
        found = schedules.history(session, row.id, limit=limit)
    if as_json:
        output.emit({"name": name, "firings": [shapes.firing(*pair) for pair in found]})
    elif found:
        headers = ("FIRE TIME", "STATE", "BATCH", "", "WHY")
        output.table(headers, [_firing_row(row, *pair) for pair in found])
    else:
        output.note("it has not fired yet")


def _firing_row(row: Schedule, fired: Firing, batch: Batch | None) -> tuple[str, ...]:
    return (
        _local(row, fired.fire_at) + (" by hand" if fired.is_manual else ""),
        output.state(fired.state),
        fired.batch_id or "",
        "" if batch is None else output.state(shapes.batch(batch)["state"]),
        output.cut(fired.reason or "", 100),
    )
