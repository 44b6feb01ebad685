"""`rushes demo`: everything on this machine, a few videos, and where they are."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs import (
    broker,
    cancelling,
    database,
    direct,
    errors,
    parts,
    presets,
    queries,
    results,
    servers,
    settings,
    standalone,
    states,
    stores,
    submission,
    watch,
)
from jobs.cli import display, exits, output

PROMPTS = Path(__file__).resolve().parents[2] / "examples" / "prompts.jsonl"
PRESET = "tiny"
AUTO = "auto"
LINK_SECONDS = 24 * 3600
WAIT_SECONDS = 600.0
WORKER_SECONDS = 30.0
LINK_TRY_SECONDS = 10.0


def run(config: settings.Settings, *, devices: str) -> int:
    """Start what is not running yet, render, tell, and stop what was started."""
    began = time.monotonic()
    devices = _usable(config, devices)
    with _farm(config, devices) as farm:
        db = database.connect(farm.config)
        _wait_for_worker(db)
        batch_id = _submit(farm.config, db)
        try:
            last = _follow(db, batch_id)
        except BaseException:
            # Not left behind for whoever starts a worker here next.
            cancelling.cancel_batch(db, batch_id)
            raise
        _tell_where(farm, db, batch_id)
        stopping = "; stopping what was started" if farm.children else ""
        output.line(f"\ndone in {time.monotonic() - began:.0f} s{stopping}")
        return exits.of_batch(last.progress.state)


def _usable(config: settings.Settings, devices: str) -> str:
    """InvalidInput for devices that are not there, or that render nothing."""
    if devices.partition(":")[0] == "sim":
        message = f"{devices!r} only sleeps and takes no job of the demo: give auto or cpu:N"
        raise errors.invalid("--devices", message)
    try:
        parts.DEVICE_SLOTS.load()(devices, cores=1)
    except errors.GpusUnknown as error:
        if devices != AUTO:
            raise
        if not settings.read_up_file(config.home):
            output.note(f"note: {error}; the tiny model is rendered on the CPU")
            return "cpu"
    return devices


def _wait_for_worker(db: database.Database) -> None:
    """Until one has registered: before, a hint would say that there is none."""
    deadline = time.monotonic() + WORKER_SECONDS
    while time.monotonic() < deadline:
        with db.reading() as session:
            if queries.live_workers_by_queue(session):
                return
        time.sleep(0.1)


def _follow(db: database.Database, batch_id: str) -> watch.Snapshot:
    snapshots = watch.until_finished(
        db, batch_id, timeout_seconds=WAIT_SECONDS, interval_seconds=0.25
    )
    return (display.live if sys.stdout.isatty() else display.as_lines)(snapshots)


@contextmanager
def _farm(config: settings.Settings, devices: str) -> Iterator[standalone.Farm]:
    if settings.read_up_file(config.home):
        output.line("using the `rushes up` that runs in this folder")
        if devices != AUTO:
            output.note(f"note: it has devices of its own: --devices {devices} is ignored")
        yield standalone.Farm(config=config, children=(), local_servers=())
        return
    output.line("starting Redis, S3, database, dispatcher and worker on this machine")
    with standalone.running(config, devices=devices, say=output.line) as farm:
        yield farm


def _submit(config: settings.Settings, db: database.Database) -> str:
    with PROMPTS.open("rb") as stream:
        prompts = submission.PromptFile(
            stream=stream,
            source=str(PROMPTS),
            format="jsonl",
            options=submission.Options(preset=presets.load(PRESET), name="demo"),
        )
        made = submission.submit(db, prompts)
    broker.Broker(config).kick()
    output.line(f"batch     {made.batch_id}: {made.jobs} prompts of {PROMPTS.name}")
    return made.batch_id


def _tell_where(farm: standalone.Farm, db: database.Database, batch_id: str) -> None:
    store = stores.open_store(farm.config)
    with db.reading() as session:
        done = queries.jobs(session, batch_id, states_wanted=[states.JobState.SUCCEEDED])
        videos = [(job, queries.winning_attempt(session, job)) for job in done]
    keys = [(job, attempt.video_key) for job, attempt in videos if attempt and attempt.video_key]
    if not keys:
        return
    output.line(f"\n{len(keys)} videos in {store.address(results.batch_folder(batch_id))}:")
    folder = _local_folder(farm)
    for job, key in keys:
        place = folder / key if folder else store.address(key)
        output.line(f"  {display.label(job):24} {place}")
    job, key = keys[0]
    link = store.presign(key, seconds=LINK_SECONDS)
    when = "for a day" if not farm.children else "for a day; start `rushes up` here to open it"
    output.line(f"\na link to the first, {when}:\n  {link}")
    if link.startswith("http") and not _opens(link):
        output.note("note: the link does not open from here; look at S3_PUBLIC_ENDPOINT_URL")


def _local_folder(farm: standalone.Farm) -> Path | None:
    for server in farm.local_servers:
        if isinstance(server, servers.S3Server):
            return server.bucket_folder
    return None


def _opens(link: str) -> bool:
    try:
        with direct.opened(link, seconds=LINK_TRY_SECONDS) as answer:
            return bool(answer.read(4096))
    except OSError:
        return False
