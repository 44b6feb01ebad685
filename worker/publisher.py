"""A finished mp4 into the bucket, then `succeed`. Nothing is rendered again, come what may."""

import time
from dataclasses import dataclass

import structlog
from sqlalchemy.exc import DBAPIError

from jobs import (
    broker,
    database,
    lifecycle,
    results,
    retries,
    settings,
    storage,
    store_mark,
    stores,
)
from worker import errors, finished, scratch, tracing
from worker import settings as worker_settings_module

log = structlog.get_logger()

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0


def wait_seconds(tries: int) -> float:
    """After so many tries that failed; a store may be away for days."""
    return retries.growing_wait(FIRST_WAIT_SECONDS, tries + 1, longest_seconds=LONGEST_WAIT_SECONDS)


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """What the publishing process of a host holds."""

    config: settings.Settings
    db: database.Database
    bell: broker.Broker
    store: storage.ObjectStore
    guard: store_mark.Guard

    def publish(self, attempt_id: int) -> None:
        """Upload until the store has it or the job is somebody else's. Safe to call twice."""
        for folder in scratch.folders(self.config.scratch_dir):
            if folder.attempt_id == attempt_id:
                with folder.locked() as is_ours:
                    if is_ours:
                        self._until_done(folder)

    def _until_done(self, folder: scratch.AttemptFolder) -> None:
        tries = 0
        while (longest_seconds := self._try(folder, tries)) is not None:
            time.sleep(min(wait_seconds(tries), longest_seconds))
            tries += 1

    def _try(self, folder: scratch.AttemptFolder, tries: int) -> float | None:
        """None when nothing is left to do; else how long the next try may wait at most.

        A third of the lease that counts meanwhile: after an outage of the database silence is
        pardoned for as long as `lease_seconds`.
        """
        try:
            if not self._is_wanted(folder):
                return None
            self.guard.require()
            job_id = folder.facts().job_id
            with tracing.job("upload", batch_id=folder.batch_id, job_id=job_id, tries=tries):
                stored = self._upload(folder)
            won = self.db.write(lifecycle.succeed, folder.attempt_id, video=stored)
        except errors.DiskUnusable as error:
            finished.give_up(self.db, self.config, folder, error=str(error))
            self.bell.kick()
            return None
        except storage.StorageError as error:
            attempt_id = folder.attempt_id
            log.warning("publish.delayed", attempt_id=attempt_id, tries=tries, error=str(error))
            if self._note(folder, f"the store does not take the video: {error}"):
                return self.config.publish_lease_seconds / 3
            return self.config.lease_seconds / 3
        except DBAPIError as error:
            log.warning("publish.delayed", attempt_id=folder.attempt_id, error=str(error)[:300])
            return self.config.lease_seconds / 3
        folder.remove()
        self.bell.kick()
        event = "attempt.succeeded" if won else "attempt.superseded"
        log.info(event, attempt_id=folder.attempt_id, key=stored.key)
        return None

    def _is_wanted(self, folder: scratch.AttemptFolder) -> bool:
        with self.db.reading() as session:
            if finished.state_of(session, folder) is None:
                return False
        verdict = finished.renew(self.db, self.config, folder, note=None)
        return verdict is lifecycle.Verdict.GO_ON

    def _upload(self, folder: scratch.AttemptFolder) -> lifecycle.StoredVideo:
        """DiskUnusable when the file on this disk is no longer the one that was rendered."""
        facts = folder.facts()
        ids = (facts.batch_id, facts.job_id, folder.attempt_id)
        if scratch.sha256(folder.video) != facts.video.sha256:
            raise errors.DiskUnusable(f"{folder.video} changed before its upload")
        with scratch.disk_errors():  # only our side: the store's troubles are StorageErrors
            stored = self.store.put_file(
                folder.video, results.video_key(*ids), content_type="video/mp4"
            )
            self.store.put_file(
                folder.sidecar, results.sidecar_key(*ids), content_type="application/json"
            )
        return lifecycle.StoredVideo(
            key=stored.key, size_bytes=stored.size_bytes, sha256=stored.sha256
        )

    def _note(self, folder: scratch.AttemptFolder, note: str) -> bool:
        try:
            finished.renew(self.db, self.config, folder, note=note)
        except DBAPIError as error:
            log.warning("publish.note_missed", error=str(error)[:200])
            return False
        return True


def make() -> Publisher:
    """From the environment of this process. Connects to nothing yet."""
    config = settings.load()
    if worker_settings_module.load().traces:
        tracing.start(worker=f"publisher@{config.host_name}")
    db, store = database.connect_service(config), stores.open_store(config)
    return Publisher(
        config=config,
        db=db,
        bell=broker.Broker(config),
        store=store,
        guard=store_mark.Guard(db, store),
    )
