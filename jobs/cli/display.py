"""A batch in progress: live on a terminal, else line by line."""

import time
from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from jobs import queues as queue_names
from jobs import shapes, watch
from jobs.cli import output
from jobs.schema import PAUSED_UNTIL, Attempt, Job, Refusal

if TYPE_CHECKING:
    from rich.console import RenderableType

LINE_SECONDS = 60.0  # a log of a long night shows that the watcher is alive
SHOWN_REFUSALS = 3
COUNTED = ("succeeded", "failed", "cancelled", "running", "queued")


def live(snapshots: Iterable[watch.Snapshot]) -> watch.Snapshot:
    """One picture that changes in place; returns the last snapshot."""
    from rich.live import Live

    console, snapshot = output.console(), None
    with Live(console=console, auto_refresh=False) as screen:
        for snapshot in snapshots:
            screen.update(_picture(snapshot, max_rows=max(console.height - 6, 3)), refresh=True)
    assert snapshot is not None
    return snapshot


def as_lines(snapshots: Iterable[watch.Snapshot]) -> watch.Snapshot:
    """A line per change, and one a minute without any."""
    told, told_at, snapshot = ("", ""), 0.0, None
    for snapshot in snapshots:
        idle = snapshot.idle_queues
        hint = hint_of_idle(idle, snapshot.refusals) if idle else ""
        essence = counts(snapshot) + snapshot.progress.state, hint
        if essence != told or time.monotonic() - told_at > LINE_SECONDS:
            output.line(f"{output.when(snapshot.now)}  {status_line(snapshot)}")
            if essence != told and hint:
                output.note(hint)
            told, told_at = essence, time.monotonic()
    assert snapshot is not None
    return snapshot


def as_json_lines(snapshots: Iterable[watch.Snapshot]) -> watch.Snapshot:
    """A JSON object per change of anything but the clock."""
    told, snapshot = "", None
    for snapshot in snapshots:
        essence = counts(snapshot) + snapshot.progress.state + repr(_steps(snapshot))
        essence += repr(sorted(snapshot.idle_queues))
        if essence != told:
            output.emit_line(shapes.snapshot(snapshot))
            told = essence
    assert snapshot is not None
    return snapshot


def status_line(snapshot: watch.Snapshot) -> str:
    """`260101-k3v9 running: 3 of 10 succeeded, 2 running, 5 queued; 1.2/min, ...`"""
    progress = snapshot.progress
    parts = [f"{progress.batch.id} {output.state(progress.state)}: {counts(snapshot)}"]
    if pace := pace_of(snapshot):
        parts.append(pace)
    return "; ".join(parts)


def pace_of(snapshot: watch.Snapshot) -> str:
    """How fast it goes and how long it will take, as far as that is known."""
    rate, left = snapshot.progress.rate_per_minute, snapshot.progress.seconds_left
    said = [] if rate is None else [f"{rate:.1f}/min" if rate < 100 else f"{rate:.0f}/min"]
    if left is not None:
        said.append(f"about {output.duration(left)} left")
    return ", ".join(said)


def hint_of_idle(queues: Collection[str], refusals: Sequence[Refusal] = ()) -> str:
    names = ", ".join(queues)
    if refusals:
        why = "; ".join(refusal_line(refusal) for refusal in refusals[:SHOWN_REFUSALS])
        return f"no worker takes from {names} for now: {why}"
    elsewhere = (
        "; a model outside that folder is found only by workers that have a preset naming it in "
        "RUSHES_PRESETS_DIR"
        if any(map(queue_names.may_lie_elsewhere, queues))
        else ""
    )
    return (
        f"no live worker takes from {names}: a worker takes jobs of the models in its models "
        "folder; start one with `rushes up` or `rushes worker`, or put the weights there, which "
        f"it finds within minutes (`rushes doctor` says what is missing){elsewhere}"
    )


def refusal_line(refusal: Refusal) -> str:
    """`gpu0@a until 02:10 (3 times in a row): /models/x: ...`"""
    again = f" ({refusal.times} times in a row)" if refusal.times > 1 else ""
    until = output.when(refusal.until)
    if refusal.needs_test:
        until = f"its self-test passes, the next one from {until} on"
    return f"{refusal.worker} until {until}{again}: {output.plain(refusal.reason)}"


def step_of(attempt: Attempt) -> str:
    """`2/4`: the step it works on, of how many."""
    return f"{attempt.step}/{attempt.steps}" if attempt.steps else ""


def running_row(job: Job, attempt: Attempt, *, now: datetime) -> tuple[str, ...]:
    """Number, name, stage, step, time, worker, and what it waits for."""
    seconds = (now - attempt.started_at).total_seconds()
    return (
        str(job.id),
        label(job),
        attempt.stage or "start",
        step_of(attempt),
        output.duration(max(seconds, 0)),
        output.plain(attempt.worker),
        output.cut(attempt.note or ""),
    )


def label(job: Job) -> str:
    """What a person calls the job."""
    return output.cut(job.custom_id if job.custom_id is not None else job.prompt, 40)


def kind_of(kind: str | None, *, quarantined: bool) -> str:
    return (kind or "") + (" (quarantined)" if quarantined else "")


def counts(snapshot: watch.Snapshot) -> str:
    batch = snapshot.progress.batch
    said = [f"{batch.succeeded:,} of {batch.total:,} succeeded"]
    for name in COUNTED[1:]:
        number: int = getattr(batch, name)
        if number:
            said.append(f"{number:,} {name}")
    return ", ".join(said)


def _steps(snapshot: watch.Snapshot) -> list[tuple[int, str | None, int]]:
    return [(attempt.id, attempt.stage, attempt.step) for _, attempt in snapshot.running]


def _picture(snapshot: watch.Snapshot, *, max_rows: int) -> "RenderableType":
    from rich.console import Group
    from rich.padding import Padding
    from rich.progress_bar import ProgressBar
    from rich.text import Text

    batch = snapshot.progress.batch
    done = batch.total - batch.queued - batch.running
    parts: list[RenderableType] = [
        Text.from_ansi(status_line(snapshot)),
        # Padding ends the bar's line, which the bar itself leaves open.
        Padding(ProgressBar(total=max(batch.total, 1), completed=done), 0),
    ]
    if snapshot.running:
        parts.append(_running_table(snapshot, max_rows))
    if snapshot.idle_queues:
        parts.append(Text(hint_of_idle(snapshot.idle_queues, snapshot.refusals), style="yellow"))
    return Group(*parts)


def _running_table(snapshot: watch.Snapshot, max_rows: int) -> "RenderableType":
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for header in ("job", "", "stage", "step", "time", "worker", ""):
        table.add_column(header, no_wrap=True)
    for job, attempt in snapshot.running[:max_rows]:
        table.add_row(*map(Text, running_row(job, attempt, now=snapshot.now)))
    if len(snapshot.running) > max_rows:
        table.add_row("", Text(f"and {len(snapshot.running) - max_rows} more"))
    return table


def until(not_before: datetime) -> str:
    """What a queued job waits for, behind its state."""
    if not_before == PAUSED_UNTIL:
        return ", paused"
    return f", not before {output.when(not_before)}"
