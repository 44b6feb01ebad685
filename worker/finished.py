"""What attempts have left on this host's disk: videos that wait for their upload, and garbage."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import structlog
from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import broker, database, lifecycle, retries, settings, states
from jobs.schema import Attempt, Job, Worker
from worker import errors, scratch

log = structlog.get_logger()

MOST_ON_THE_WAY = 1_000  # messages to this host's publisher, of videos that wait on its disk


def renew(
    db: database.Database,
    config: settings.Settings,
    folder: scratch.AttemptFolder,
    *,
    note: str | None,
) -> lifecycle.Verdict:
    """Keep the lease of a finished video; clean up after one that nobody waits for any more."""
    try:
        facts = folder.facts()
    except errors.DiskUnusable as error:
        give_up(db, config, folder, error=str(error))
        return lifecycle.Verdict.SUPERSEDED
    verdict = db.write(
        lifecycle.rendered,
        folder.attempt_id,
        seconds=facts.seconds,
        peak_memory_bytes=facts.peak_memory_bytes,
        memory=_memory(facts),
        lease_seconds=config.publish_lease_seconds,
        note=note,
    )
    if verdict is lifecycle.Verdict.CANCELLED:
        db.write(lifecycle.cancel_attempt, folder.attempt_id)
    if verdict is not lifecycle.Verdict.GO_ON:
        folder.remove()
        log.info("publish.dropped", attempt_id=folder.attempt_id, because=verdict)
    return verdict


def _memory(facts: scratch.Facts) -> str | None:
    if facts.ran_out_of_memory is None:
        return facts.memory
    return f"{facts.memory}; before: {facts.ran_out_of_memory}"


def give_up(
    db: database.Database,
    config: settings.Settings,
    folder: scratch.AttemptFolder,
    *,
    error: str,
) -> None:
    """The disk has lost a finished video: its job is rendered again."""
    db.write(
        lifecycle.fail,
        folder.attempt_id,
        kind=states.FailureKind.DISK,
        error=error,
        budgets=retries.budgets(config),
    )
    folder.remove()
    log.error("publish.damaged", attempt_id=folder.attempt_id, error=error)


def find_unfinished(
    db: database.Database, bell: broker.Broker, config: settings.Settings
) -> list[int]:
    """Send again for every finished video that no publisher works on, and remove garbage.

    After a restart of the host's processes, or when Redis lost the message.
    """
    found = renew_all(db, config)
    if found:
        # During an outage of the store the same ids are found again and again.
        on_the_way = bell.waiting(broker.publish_queue(config.host_name))
        unsent = [attempt_id for attempt_id in found if attempt_id not in on_the_way]
        # Far fewer than can be read back: more would be sent again at each look, without end.
        for attempt_id in unsent[: max(0, MOST_ON_THE_WAY - len(on_the_way))]:
            bell.send_publish(config.host_name, attempt_id)
    return found


def renew_all(db: database.Database, config: settings.Settings) -> list[int]:
    """Tell the database of every finished video that no publisher works on; remove garbage.

    Before what a dead process held is ended: it may have finished a video and not been able to say
    so, and that one needs no further render.
    """
    folders = scratch.folders(config.scratch_dir)
    if not folders:
        return []
    # As a write, which is tried again: a new process begins with this, and ends if it fails.
    rows = db.write(_rows, folders, config.publish_lease_seconds)
    return [
        folder.attempt_id
        for folder in folders
        if (row := rows.get(folder.attempt_id)) is not None
        and row.batch_id == folder.batch_id  # else it is another farm's
        and _waits_for_upload(db, config, folder, row)
    ]


def end_lost(db: database.Database, config: settings.Settings, worker: str) -> None:
    """All that this dead worker of our host held, but for the videos that it has finished."""
    try:
        renew_all(db, config)
    except OSError as error:
        # A scratch disk that cannot be read has lost them.
        log.error("scratch.not_read", path=str(config.scratch_dir), error=str(error))
    db.write(lifecycle.end_lost_attempts, budgets=retries.budgets(config), worker=worker)


def requeue_vanished(
    db: database.Database, config: settings.Settings, *, launcher: str
) -> list[int]:
    """Give back the jobs of a launcher's workers whose finished video is no longer on its disk.

    Nothing else would notice before their lease ends.
    """
    with db.reading() as session:
        waiting = session.execute(
            select(Attempt.id, Attempt.number, Job.batch_id)
            .join(Job, Job.id == Attempt.job_id)
            .join(Worker, Worker.name == Attempt.worker)
            .where(Attempt.state == states.AttemptState.RENDERED)
            .where(Worker.launcher == launcher)
        ).all()
    gone = []
    for attempt_id, number, batch_id in waiting:
        folder = scratch.AttemptFolder(
            root=config.scratch_dir, batch_id=batch_id, attempt_id=attempt_id
        )
        if folder.is_finished:
            continue
        # A publisher tells the database before it removes the folder: then this changes nothing.
        reason = f"the finished video is gone: {folder.path}"
        wait_seconds = retries.wait_after_release(number)
        if db.write(lifecycle.release, attempt_id, reason=reason, wait_seconds=wait_seconds):
            log.error("publish.vanished", attempt_id=attempt_id, folder=str(folder.path))
            gone.append(attempt_id)
    return gone


def state_of(session: Session, folder: scratch.AttemptFolder) -> states.AttemptState | None:
    """None: not an attempt of this database, so its folder is another farm's."""
    return session.scalar(
        select(Attempt.state)
        .join(Job, Job.id == Attempt.job_id)
        .where(Attempt.id == folder.attempt_id, Job.batch_id == folder.batch_id)
    )


@dataclass(frozen=True)
class _Row:
    batch_id: str
    state: states.AttemptState
    is_fresh: bool
    """Nothing is to be said of it: its lease is long, and nobody wants it stopped."""


def _rows(
    session: Session, folders: Sequence[scratch.AttemptFolder], lease_seconds: float
) -> dict[int, _Row]:
    """Of all at once: in an outage of the store thousands wait, and this is done at every beat."""
    fresh_from = database.now(session) + timedelta(seconds=lease_seconds / 2)
    is_fresh = (
        (Attempt.state == states.AttemptState.RENDERED)
        & (Attempt.lease_until > fresh_from)
        & Attempt.note.is_not(None)
        & ~Job.cancel_requested
    )
    rows = session.execute(
        select(Attempt.id, Job.batch_id, Attempt.state, is_fresh)
        .join(Job, Job.id == Attempt.job_id)
        .where(database.among(session, Attempt.id, [folder.attempt_id for folder in folders]))
    )
    return {row[0]: _Row(row[1], row[2], bool(row[3])) for row in rows}


def _waits_for_upload(
    db: database.Database, config: settings.Settings, folder: scratch.AttemptFolder, row: _Row
) -> bool:
    if not folder.is_finished:
        if row.state not in states.LIVE_ATTEMPT_STATES:
            folder.remove()
            log.info("scratch.removed", attempt_id=folder.attempt_id, because=row.state)
        return False
    with folder.locked() as is_free:
        if not is_free or row.is_fresh:
            return is_free
        note = "waits for its upload"
        return renew(db, config, folder, note=note) is lifecycle.Verdict.GO_ON
