"""A finished mp4 into the bucket, then `succeed`. Nothing is rendered again, come what may."""

import random
import time
from dataclasses import dataclass

import structlog
from sqlalchemy.exc import DBAPIError

from jobs import broker, database, dispatch, lifecycle, results, settings, states, storage
from worker import finished, scratch

log = structlog.get_logger()

FIRST_WAIT_SECONDS = 1.0
LONGEST_WAIT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Publisher:
    """What the publishing process of a host holds."""

    config: settings.Settings
    db: database.Database
    bell: broker.Broker

    def publish(self, attempt_id: int) -> None:
        """Upload until the store has it or the job is somebody else's. Safe to call twice."""
        folder = scratch.AttemptFolder(root=self.config.scratch_dir, attempt_id=attempt_id)
        with folder.locked() as is_ours:
            if not is_ours:
                return
            tries = 0
            while not self._try(folder, tries):
                longest = min(FIRST_WAIT_SECONDS * 2**tries, LONGEST_WAIT_SECONDS)
                time.sleep(random.uniform(longest / 2, longest))  # noqa: S311
                tries += 1

    def _try(self, folder: scratch.AttemptFolder, tries: int) -> bool:
        """True when nothing is left to do."""
        try:
            if (
                finished.renew(self.db, self.config, folder, note=None)
                is not lifecycle.Verdict.GO_ON
            ):
                return True
            stored = self._upload(folder)
            if stored is None:
                self._give_up(folder)
                return True
            won = self.db.write(lifecycle.succeed, folder.attempt_id, video=stored)
        except storage.StorageError as error:
            attempt_id = folder.attempt_id
            log.warning("publish.delayed", attempt_id=attempt_id, tries=tries, error=str(error))
            self._note(folder, f"the store does not take the video: {error}")
            return False
        except DBAPIError as error:
            log.warning("publish.delayed", attempt_id=folder.attempt_id, error=str(error)[:300])
            return False
        folder.remove()
        self.bell.kick()
        event = "attempt.succeeded" if won else "attempt.superseded"
        log.info(event, attempt_id=folder.attempt_id, key=stored.key)
        return True

    def _upload(self, folder: scratch.AttemptFolder) -> lifecycle.StoredVideo | None:
        """None: the file on this disk is no longer the one that was rendered."""
        sidecar = folder.sidecar()
        if scratch.sha256_or_none(folder.video) != sidecar["video"]["sha256"]:
            return None
        store = storage.open_store(self.config)
        ids = (sidecar["batch_id"], sidecar["job_id"], folder.attempt_id)
        stored = store.put_file(folder.video, results.video_key(*ids), content_type="video/mp4")
        store.put_file(
            folder.path / scratch.SIDECAR,
            results.sidecar_key(*ids),
            content_type="application/json",
        )
        return lifecycle.StoredVideo(
            key=stored.key, size_bytes=stored.size_bytes, sha256=stored.sha256
        )

    def _give_up(self, folder: scratch.AttemptFolder) -> None:
        error = f"{folder.video} changed or vanished before its upload: check the disk"
        self.db.write(
            lifecycle.fail,
            folder.attempt_id,
            kind=states.FailureKind.DISK,
            error=error,
            budgets=dispatch.budgets(self.config),
        )
        folder.remove()
        log.error("publish.damaged", attempt_id=folder.attempt_id, error=error)

    def _note(self, folder: scratch.AttemptFolder, note: str) -> None:
        try:
            finished.renew(self.db, self.config, folder, note=note)
        except DBAPIError as error:
            log.warning("publish.note_missed", error=str(error)[:200])


def make() -> Publisher:
    """From the environment of this process."""
    config = settings.load()
    return Publisher(config=config, db=database.connect(config), bell=broker.Broker(config))
