"""Finished videos on this host's disk that wait for their upload."""

import structlog

from jobs import broker, database, lifecycle, settings
from worker import scratch

log = structlog.get_logger()


def renew(
    db: database.Database,
    config: settings.Settings,
    folder: scratch.AttemptFolder,
    *,
    note: str | None,
) -> lifecycle.Verdict:
    """Keep the lease of a finished video; clean up after one that nobody waits for any more."""
    sidecar = folder.sidecar()
    verdict = db.write(
        lifecycle.rendered,
        folder.attempt_id,
        seconds=sidecar["seconds"],
        peak_memory_bytes=sidecar["peak_memory_bytes"],
        lease_seconds=config.publish_lease_seconds,
        note=note,
    )
    if verdict is lifecycle.Verdict.CANCELLED:
        db.write(lifecycle.cancel_attempt, folder.attempt_id)
    if verdict is not lifecycle.Verdict.GO_ON:
        folder.remove()
        log.info("publish.dropped", attempt_id=folder.attempt_id, because=verdict)
    return verdict


def find_unfinished(
    db: database.Database, bell: broker.Broker, config: settings.Settings
) -> list[int]:
    """Send again for every finished video on this disk that no publisher works on.

    After a restart of the host's processes, or when Redis lost the message.
    """
    found = []
    for folder in scratch.folders(config.scratch_dir):
        with folder.locked() as is_free:
            if not is_free:
                continue
            if renew(db, config, folder, note="waits for its upload") is lifecycle.Verdict.GO_ON:
                found.append(folder.attempt_id)
    for attempt_id in found:
        bell.send_publish(config.host_name, attempt_id)
    return found
