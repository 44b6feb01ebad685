"""`rushes list` and `rushes show`."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import click

from jobs import (
    database,
    errors,
    failures,
    queries,
    requests,
    results,
    retries,
    settings,
    shapes,
    since,
    states,
    storage,
    stores,
    watch,
)
from jobs.cli import connections, display, options, output, references
from jobs.schema import Attempt, Batch, Job

MOST_NAMED = 100_000  # failed jobs: some ten seconds


@click.command("list")
@click.option("--limit", type=options.Whole(1, 1000), default=20, show_default=True)
@click.option("--before", metavar="BATCH", help="Older than this one: the next page.")
@click.option(
    "--state",
    "wanted",
    multiple=True,
    type=click.Choice([state.value for state in states.BatchState]),
    help="Only those in this state; may be repeated.",
)
@click.option("--owner", callback=options.owner, help="Only this owner's.")
@click.option(
    "--since",
    "begin",
    metavar="WHEN",
    help="Only those submitted from then on: 12h, 3d, 2026-12-24, 2026-12-24T06:00.",
)
@options.output
def list_batches(
    limit: int,
    before: str | None,
    wanted: tuple[str, ...],
    owner: str | None,
    begin: str | None,
    as_json: bool,
) -> None:
    """List the batches, newest first."""
    moment = _since(begin)
    db = connections.open_database(settings.load())
    with db.reading() as session:
        found = queries.batches(
            session,
            limit=limit,
            before=None if before is None else queries.find_batch(session, before),
            owner=owner,
            states_wanted=[states.BatchState(state) for state in wanted],
            since=moment,
        )
    if as_json:
        output.emit({"batches": [shapes.batch(row) for row in found]})
        return
    given = _given(wanted, owner, begin)
    if not found:
        what = "no such batches" if given else "no batches"
        output.note(what + (" before that one" if before else "" if given else " yet"))
        return
    _print_list(found)
    if len(found) == limit:
        command = ["rushes", "list", *given, "--before", found[-1].id]
        output.note(f"older ones: {shlex.join(command)}")


def _given(wanted: Sequence[str], owner: str | None, begin: str | None) -> list[str]:
    """What chose among them, for the command that shows more of the same."""
    pairs = [("--state", state) for state in wanted]
    pairs += [("--owner", owner)] if owner is not None else []
    pairs += [("--since", begin)] if begin is not None else []
    return [word for pair in pairs for word in pair]


def _since(text: str | None) -> datetime | None:
    try:
        return None if text is None else since.parse(text, now=datetime.now(UTC))
    except ValueError as error:
        raise options.misused(f"--since: {error}") from None


def _print_list(found: Sequence[Batch]) -> None:
    """With the owner of each where they differ."""
    has_owners = len({row.owner for row in found}) > 1
    owner = ("OWNER",) if has_owners else ()
    headers = ("BATCH", "STATE", "JOBS", "DONE", "FAILED", "CANCELLED", "CREATED", *owner)
    rows = [_list_row(row, has_owners=has_owners) for row in found]
    output.table((*headers, "PRESET", "NAME"), rows)


def _list_row(row: Batch, *, has_owners: bool) -> tuple[str, ...]:
    return (
        row.id,
        output.state(row.state),
        str(row.total),
        str(row.succeeded),
        str(row.failed),
        str(row.cancelled),
        output.when(row.created_at),
        *((output.cut(row.owner, 20),) if has_owners else ()),
        output.cut(row.preset, 40),
        output.cut(row.name or "", 40),
    )


@click.command()
@click.argument("reference", metavar="BATCH|JOB")
@click.option(
    "--limit",
    type=options.Whole(0, MOST_NAMED),
    default=20,
    show_default=True,
    help="Failed jobs, and running ones, that are named.",
)
@options.kinds("Of a batch: name only the failed jobs that failed so")
@options.output
def show(reference: str, limit: int, kinds: tuple[str, ...], as_json: bool) -> None:
    """Show a batch or a job.

    A batch: counts, pace, what runs, what failed and why. A job: everything, its attempts too.
    """
    config = settings.load()
    db = connections.open_database(config)
    with db.reading() as session:
        found = references.find(session, reference)
    store = _store(config)
    if isinstance(found, Job):
        if kinds:
            raise options.misused("--kind is for the failed jobs of a batch: give it a BATCH")
        job = _read_job(db, found)
        (_emit_job if as_json else _print_job)(job, store)
    else:
        which = failures.Which(kinds=tuple(states.FailureKind(kind) for kind in kinds))
        batch = _read_batch(db, found.id, which=which, limit=limit)
        (_emit_batch if as_json else _print_batch)(batch, store)


def _store(config: settings.Settings) -> storage.ObjectStore | None:
    """None when its settings are wrong: what the database knows is shown all the same."""
    try:
        return stores.open_store(config)
    except errors.RushesError as error:
        output.note(f"note: {error}")
        return None


# A batch.


@dataclass(frozen=True, kw_only=True)
class BatchView:
    """What `show` tells of a batch."""

    snapshot: watch.Snapshot
    groups: Sequence[failures.Group]
    """Of what failed."""
    which: failures.Which
    """Of the failed jobs, those that are named."""
    failed: Sequence[Job]
    workers: Mapping[int, str]
    """Of the failed jobs, by their ids."""
    limit: int

    @property
    def num_failed(self) -> int:
        """Those that would be named without a limit."""
        kinds = self.which.kinds
        return sum(group.jobs for group in self.groups if not kinds or group.kind in kinds)


def _read_batch(
    db: database.Database, batch_id: str, *, which: failures.Which, limit: int
) -> BatchView:
    snapshot = watch.look(db, batch_id)
    with db.snapshot() as session:
        failed = queries.jobs(
            session, batch_id, states_wanted=(states.JobState.FAILED,), which=which, limit=limit
        )
        return BatchView(
            snapshot=snapshot,
            groups=failures.groups(session, snapshot.progress.batch),
            which=which,
            failed=failed,
            workers=queries.workers_of(session, failed),
            limit=limit,
        )


def _emit_batch(view: BatchView, store: storage.ObjectStore | None) -> None:
    output.emit(
        shapes.snapshot(view.snapshot)
        | {
            "failures": [shapes.failure(group) for group in view.groups],
            "failed": [
                shapes.failed_job(job, worker=view.workers.get(job.id)) for job in view.failed
            ],
            "manifest": _manifest(view.snapshot.progress.batch, store),
        }
    )


def _manifest(batch: Batch, store: storage.ObjectStore | None) -> str | None:
    if batch.manifest_at is None or batch.results_expired_at is not None or store is None:
        return None
    return store.address(results.batch_key(batch.id, results.MANIFEST))


def _print_batch(view: BatchView, store: storage.ObjectStore | None) -> None:
    snapshot = view.snapshot
    batch = snapshot.progress.batch
    output.facts(
        [
            ("batch", batch.id),
            ("name", output.plain(batch.name or "")),
            ("preset", output.plain(batch.preset)),
            ("owner", output.plain(batch.owner)),
            ("priority", str(priority) if (priority := batch.priority + batch.boost) else ""),
            ("state", output.state(snapshot.progress.state)),
            ("jobs", display.counts(snapshot)),
            ("pace", display.pace_of(snapshot)),
            ("created", output.when(batch.created_at)),
            ("deadline", _deadline_words(batch)),
            ("finished", output.when(batch.finished_at)),
            ("results", _manifest(batch, store) or _expired_words(batch)),
        ]
    )
    _print_failures(view)
    if running := snapshot.running[: view.limit]:
        output.line("running:")
        headers = ("JOB", "", "STAGE", "STEP", "TIME", "WORKER", "")
        rows = [display.running_row(*pair, now=snapshot.now) for pair in running]
        output.table(headers, [(f"  {job_id}", *others) for job_id, *others in rows])
    _print_more(len(snapshot.running), len(running), "running")
    if view.failed:
        output.line("failed:")
        rows = [_failed_row(job, view.workers) for job in view.failed]
        output.table(("JOB", "", "KIND", "WORKER", "WHY"), rows)
    _print_more(view.num_failed, len(view.failed), "failed")
    if hint := _worth_a_retry(view):
        output.note(f"note: {hint}")
    if snapshot.idle_queues:
        output.note(f"note: {display.hint_of_idle(snapshot.idle_queues, snapshot.refusals)}")


def _print_failures(view: BatchView) -> None:
    """What they have in common, before the single ones."""
    if view.groups:
        output.line("why jobs failed:")
        headers = ("  JOBS", "KIND", "RETRY", "WORKERS", "FOR EXAMPLE")
        output.table(headers, [_failure_row(group) for group in view.groups])


def _failure_row(group: failures.Group) -> tuple[str, ...]:
    return (
        f"  {group.jobs:,}",
        display.kind_of(group.kind, quarantined=group.quarantined),
        "may help" if group.may_go_well else "no use",
        _workers_words(group),
        output.cut(group.example.error or "", 100),
    )


def _workers_words(group: failures.Group) -> str:
    """The few that made at least half of them; else how many."""
    if few := group.mostly_on:
        return ", ".join(f"{number:,} on {output.plain(worker)}" for worker, number in few)
    return f"on {output.count(len(group.workers), 'worker')}" if group.workers else ""


def _worth_a_retry(view: BatchView) -> str:
    """How to ask for these alone, where there are others too."""
    good = [group for group in view.groups if group.may_go_well]
    if not good or len(good) == len(view.groups):
        return ""
    kinds = {group.kind: f" --kind {group.kind}" for group in good if group.kind}
    command = f"rushes retry {view.snapshot.progress.batch.id}{''.join(kinds.values())}"
    if any(group.quarantined and group.kind in kinds for group in view.groups):
        command += " --no-quarantined"
    number = output.count(sum(group.jobs for group in good), "failed job")
    return f"a retry may help {number}: {command}"


def _print_more(number: int, shown: int, word: str) -> None:
    if number > shown:
        limit = min(number, MOST_NAMED)
        output.line(f"  and {number - shown:,} more {word}: --limit {limit}")


def _expired_words(batch: Batch) -> str:
    expired_at = batch.results_expired_at
    return "" if expired_at is None else f"deleted as old, {output.when(expired_at)}"


def _deadline_words(batch: Batch) -> str:
    passed = ", passed: what was not finished is cancelled" if batch.expired_at else ""
    return output.when(batch.deadline_at) + passed


def _failed_row(job: Job, workers: Mapping[int, str]) -> tuple[str, ...]:
    return (
        f"  {job.id}",
        display.label(job),
        display.kind_of(job.failure_kind, quarantined=job.quarantined),
        output.plain(workers.get(job.id, "")),
        output.cut(job.error or "", 100),
    )


# A job.


@dataclass(frozen=True, kw_only=True)
class JobView:
    """What `show` tells of a job."""

    job: Job
    batch: Batch
    look: dict[str, Any]
    attempts: Sequence[Attempt]
    winner: Attempt | None
    video_deleted_at: datetime | None


def _read_job(db: database.Database, job: Job) -> JobView:
    with db.reading() as session:
        winner = queries.winning_attempt(session, job)
        return JobView(
            job=job,
            batch=session.get_one(Batch, job.batch_id),
            look=queries.look(session, job),
            attempts=queries.attempts(session, job.id),
            winner=winner,
            video_deleted_at=requests.video_deleted_at(session, job) if winner else None,
        )


def _emit_job(view: JobView, store: storage.ObjectStore | None) -> None:
    output.emit(
        shapes.job(
            view.job,
            of=view.batch,
            look=view.look,
            attempts=[shapes.attempt(attempt) for attempt in view.attempts],
            video=_video(view, store),
            video_deleted_at=view.video_deleted_at,
        )
    )


def _video(view: JobView, store: storage.ObjectStore | None) -> dict[str, Any] | None:
    if store is None or view.video_deleted_at is not None:
        return None
    return shapes.video(store, view.winner)


def _print_job(view: JobView, store: storage.ObjectStore | None) -> None:
    job = view.job
    video = _video(view, store)
    output.facts(
        [
            ("job", str(job.id)),
            ("batch", f"{job.batch_id}, position {job.position}"),
            ("preset", output.plain(view.batch.preset)),
            ("custom_id", output.plain(job.custom_id or "")),
            ("state", _job_state(job)),
            ("prompt", output.plain(job.prompt)),
            ("negative", output.plain(job.negative_prompt or "")),
            ("seed", str(job.seed)),
            ("priority", str(priority) if (priority := view.batch.boost - job.rank) else ""),
            *((f"  {key}", output.plain(str(value))) for key, value in (job.meta or {}).items()),
            ("image", view.job.image_key or ""),
            ("look", _look_words(view.look)),
            ("queue", job.queue),
            ("finished", output.when(job.finished_at)),
            ("error", f"{job.failure_kind}: {output.plain(job.error or '')}" if job.error else ""),
            ("video", video["url"] if video else ""),
            ("deleted", output.when(view.video_deleted_at)),
            ("link", video["link"] or "" if video and video["link"] != video["url"] else ""),
        ]
    )
    if view.attempts:
        headers = ("ATTEMPT", "STATE", "STAGE", "STEP", "WORKER", "STARTED", "WHY")
        output.table(headers, [_attempt_row(attempt) for attempt in view.attempts])
        output.note(f"details: rushes logs {job.id}")


def _job_state(job: Job) -> str:
    said = output.state(job.state)
    if job.quarantined:
        is_crash = job.failure_kind in retries.CRASHES
        why = "its workers died" if is_crash else f"it failed on {retries.MAX_MACHINES} workers"
        said += f", quarantined: {why}"
    if job.cancel_requested and job.state is states.JobState.RUNNING:
        said += ", stops at its next step"
    if job.not_before is not None and job.state is states.JobState.QUEUED:
        said += display.until(job.not_before)
    return said


def _weights_words(look: dict[str, Any]) -> str:
    """What is special about the weights: another checkpoint, 8 bits, LoRAs."""
    said = [look[key] for key in ("transformer", "quantization") if look.get(key)]
    said += [f"LoRA {use['path']}" for use in look.get("loras", ())]
    return "".join(f", {output.plain(part)}" for part in said)


def _look_words(look: dict[str, Any]) -> str:
    return (
        f"{look['width']}x{look['height']}, {look['num_frames']} frames at {look['fps']} fps, "
        f"steps {'-'.join(map(str, look['denoising_step_list']))} ({look['step_rule']}), "
        f"shift {look['sample_shift']:g}, {output.plain(look['model_path'])}{_weights_words(look)}"
    )


def _attempt_row(attempt: Attempt) -> tuple[str, ...]:
    return (
        str(attempt.number),
        output.state(attempt.state),
        attempt.stage or "",
        display.step_of(attempt),
        output.plain(attempt.worker),
        output.when(attempt.started_at),
        output.cut(attempt.error or attempt.note or "", 100),
    )
