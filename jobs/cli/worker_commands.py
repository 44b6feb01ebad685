"""`rushes workers`: the list, and what is done about one that is not to be trusted."""

import time
from datetime import datetime
from pathlib import PurePath
from typing import Any

import click
from click.core import ParameterSource

from jobs import bell, database, errors, health, queries, queues, settings, shapes, sizes
from jobs import workers as jobs_workers
from jobs.cli import connections, display, exits, options, output
from jobs.schema import Attempt, Refusal, Worker

LOOK_SECONDS = 0.5
WORKER_HEADERS = (
    *("WORKER", "STATE", "SEEN", "DEVICE", "MEMORY", "TAKES", "RENDERS"),
    *("LOADED", "JOBS", "LOADS", "LORA SWITCHES", "RESTARTS"),
)


@click.group(invoke_without_command=True)
@options.output
@click.pass_context
def workers(ctx: click.Context, as_json: bool) -> None:
    """List the workers, or test one.

    What they render, hold and refuse, and who is taken out.
    """
    if ctx.invoked_subcommand is None:
        _list(as_json=as_json)


def _list(*, as_json: bool) -> None:
    db = connections.open_database(settings.load())
    with db.reading() as session:
        found = queries.live_workers(session)
        now = database.now(session)
    if as_json:
        output.emit({"workers": [shapes.worker(live) for live in found]})
    elif found:
        output.table(WORKER_HEADERS, [_worker_row(live, now) for live in found])
        for row, refusal in ((live.worker, each) for live in found for each in live.refusals):
            told = f"note: {_refused(refusal)}: {display.refusal_line(refusal)}"
            output.note(told + (_suspects(row) if refusal.needs_test else ""))
        for name in (live.worker.name for live in found if live.has_no_models):
            output.note(f"note: {output.plain(name)} takes nothing: its host has no models")
    else:
        output.note("no workers: start one with `rushes worker`, or everything with `rushes up`")


def _suspects(row: Worker) -> str:
    return f" (jobs {', '.join(map(str, row.suspects))})" if row.suspects else ""


def _worker_row(live: queries.LiveWorker, now: datetime) -> tuple[str, ...]:
    row = live.worker
    return (
        output.plain(row.name),
        output.state(_state(live)),
        f"{output.duration(max((now - row.heartbeat_at).total_seconds(), 0))} ago",
        output.plain(row.device),
        _memory(row),
        output.plain(", ".join(queue.removeprefix(queues.PREFIX) for queue in live.takes)),
        _rendering(live.attempt),
        output.plain(", ".join(_loaded(model) for model in row.resident or ())),
        *(str(number) for number in (row.renders, row.loads, row.lora_switches, row.restarts)),
    )


def _state(live: queries.LiveWorker) -> str:
    if not live.is_alive:
        return "silent"
    if any(refusal.needs_test for refusal in live.refusals):
        return "out"
    return "refuses" if live.refusals else "alive"


def _refused(refusal: Refusal) -> str:
    return f"no jobs of {refusal.queue.removeprefix(queues.PREFIX)}" if refusal.queue else "no jobs"


def _memory(row: Worker) -> str:
    """Used of all, of the device; of the process, where the device is the processor."""
    known = [each for each in (row.device_used_bytes, row.memory_bytes) if each is not None]
    return " / ".join(sizes.words(each) for each in known)


def _loaded(model: dict[str, Any]) -> str:
    name = PurePath(str(model["model"])).name
    return f"{name} + {output.count(len(model['loras']), 'LoRA')}" if model["loras"] else name


def _rendering(attempt: Attempt | None) -> str:
    if attempt is None:
        return ""
    step = display.step_of(attempt)
    return f"job {attempt.job_id}: {attempt.stage or 'start'}" + (f" {step}" if step else "")


@workers.command("test")
@click.argument("name", metavar="NAME")
@click.option("--no-wait", is_flag=True, help="Only ask for it.")
@click.option(
    "--timeout",
    type=options.Seconds(min=0, min_open=True),
    default=900.0,
    show_default=True,
    metavar="SECONDS",
    help="Wait this long.",
)
@options.output
def test_worker(name: str, no_wait: bool, timeout: float, as_json: bool) -> int:
    """Have a worker test its device.

    It finishes its job and takes no more until the test has passed: a small render on a fresh
    process, compared with the processor's. Exit code 1 when it fails.
    """
    ctx = click.get_current_context()
    if no_wait and ctx.get_parameter_source("timeout") is not ParameterSource.DEFAULT:
        raise options.misused("--timeout is for a wait: give it without --no-wait")
    db = connections.open_database(settings.load())
    before = _find(db, name)
    db.write(health.ask_for_test, name)
    if no_wait:
        if as_json:
            output.emit({"worker": name, "tested_at": None, "failure": None})
        else:
            output.line(f"{name} tests itself when its job is done: see `rushes workers`")
        return exits.OK
    tested = _wait_for_test(db, before, timeout=timeout)
    if as_json:
        failure = tested.test_failure
        output.emit({"worker": name, "tested_at": tested.tested_at, "failure": failure})
    elif tested.test_failure is None:
        output.line(f"{name} passed its self-test and takes jobs")
    else:
        output.line(f"{name} takes no jobs, its self-test failed: {tested.test_failure}")
    return exits.OK if tested.test_failure is None else exits.ERROR


def _wait_for_test(db: database.Database, before: Worker, *, timeout: float) -> Worker:
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        with db.reading() as session:
            now = session.get(Worker, before.name)
        if now is not None and now.tested_at != before.tested_at:
            return now
        time.sleep(LOOK_SECONDS)
    raise errors.RushesError(
        f"{before.name}: no result of its self-test within {output.duration(timeout)}. It still "
        "takes no jobs until it has passed; `rushes workers` shows what it does"
    )


@workers.command(short_help="Let a worker that was taken out take jobs again.")
@click.argument("name", metavar="NAME")
@options.output
def readmit(name: str, as_json: bool) -> None:
    """Let a worker that was taken out, or refuses jobs, take them at once and without a test."""
    config = settings.load()
    db = connections.open_database(config)
    _find(db, name, may_be_silent=True)
    was_out = any([db.write(health.readmit, name), db.write(jobs_workers.ask_again, name)])
    if was_out and (delayed := bell.kick(config)):
        output.note(f"note: {delayed}")
    if as_json:
        output.emit({"worker": name, "changed": was_out})
    else:
        output.line(f"{name} " + ("takes jobs again" if was_out else "takes jobs as it is"))


@workers.command(short_help="Take a silent worker off the list.")
@click.argument("name", metavar="NAME")
@options.output
def forget(name: str, as_json: bool) -> None:
    """Take a silent worker off the list, for a machine that will not come back.

    One that does come back is on the list again.
    """
    db = connections.open_database(settings.load())
    _find(db, name, may_be_silent=True)
    was_there = db.write(jobs_workers.forget, name)
    if as_json:
        output.emit({"worker": name, "changed": was_there})
    else:
        output.line(f"{name} is forgotten")


def _find(db: database.Database, name: str, *, may_be_silent: bool = False) -> Worker:
    with db.reading() as session:
        live = {each.worker.name: each for each in queries.live_workers(session)}
    if name not in live:
        there = ", ".join(live) or "none"
        raise errors.NotFound(f"no worker {name!r}; there are: {there}")
    if not (live[name].is_alive or may_be_silent):
        raise errors.RushesError(
            f"{name} is silent: start `rushes worker` on its host, which runs the test"
        )
    return live[name].worker
