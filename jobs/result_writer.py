"""Writes the result files of finished batches, beside the dispatcher. Any number may run."""

import contextlib
import threading
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import cached_property
from typing import Self

import structlog
from sqlalchemy import Select, or_, select, tuple_, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from jobs import database, errors, results, settings, storage, store_mark, stores
from jobs.schema import Batch

log = structlog.get_logger()

LEASE_SECONDS = 60.0  # then another writer begins anew
AGAIN_SECONDS = 30.0  # after the database or the object store failed
MARK_SECONDS = 24 * 3600.0  # until the mark of the store is written again


@dataclass(frozen=True, kw_only=True)
class Taken:
    """A batch that is ours to write for as long as its lease lasts."""

    batch_id: str
    finished_at: datetime
    lease_until: datetime


class ResultWriter:
    """One batch at a time, each under a lease in the database.

    Two that write the same end of a batch write the same bytes, and an end that is no longer the
    last one is not marked as written. Who has lost the lease puts no more files into the bucket:
    they might replace those of a later end.
    """

    def __init__(self, config: settings.Settings, *, db: database.Database) -> None:
        self._config = config
        self._db = db
        self._again_at = 0.0
        self._mark_at = 0.0
        self.look = threading.Event()
        """Set it to have finished batches looked for at once."""

    def run(self, stop: threading.Event) -> None:
        """Write what is finished until told to stop."""
        while not stop.is_set():
            self.look.clear()
            try:
                self._mark_store()
                self.write_finished(stop)
            except (DBAPIError, database.DatabaseUnavailable) as error:
                log.warning("results.database_unavailable", error=str(error)[:300])
                stop.wait(min(self._config.tick_seconds, AGAIN_SECONDS))
                continue
            self.look.wait(self._config.tick_seconds)

    def _mark_store(self) -> None:
        """Once a day: this is the farm's store, unless another one is."""
        if time.monotonic() < self._mark_at:
            return
        self._mark_at = time.monotonic() + AGAIN_SECONDS
        try:
            self._guard.leave()
        except (errors.RushesError, OSError) as error:
            log.error("store.unmarked", error=str(error))
        else:
            self._mark_at = time.monotonic() + MARK_SECONDS

    @cached_property
    def _store(self) -> storage.ObjectStore:
        return stores.open_store(self._config)

    @cached_property
    def _guard(self) -> store_mark.Guard:
        return store_mark.Guard(self._db, self._store)

    def write_finished(self, stop: threading.Event | None = None) -> int:
        """Every finished batch that nobody else writes; how many are complete now."""
        if time.monotonic() < self._again_at:
            return 0
        written = 0
        taken: Taken | None = None
        while not (stop and stop.is_set()) and (taken := self._take(after=taken)) is not None:
            batch_id = taken.batch_id
            try:
                with _Lease(self._db, batch_id, taken.lease_until) as lease:
                    self._guard.require()
                    written += results.write(self._db, self._store, batch_id, may_put=lease.renew)
            except DBAPIError:
                raise
            except Exception as error:  # one batch that meets a defect must not end dispatch
                # The videos themselves are there already.
                is_defect = not isinstance(error, (errors.RushesError, OSError))
                told = f"{type(error).__name__}: {error}" if is_defect else str(error)
                log.warning(
                    "batch.manifest_delayed", batch_id=batch_id, error=told, exc_info=is_defect
                )
                if is_defect:
                    continue  # the end of its lease is soon enough, and others need not wait
                self._db.write(give_back, batch_id)
                self._again_at = time.monotonic() + AGAIN_SECONDS
                if isinstance(error, storage.StorageUnavailable):
                    break  # waiting for an answer once is enough
        if written:
            log.info("batch.results_written", batches=written)
        return written

    def _take(self, *, after: Taken | None) -> Taken | None:
        with self._db.reading() as session:
            # Looking takes no lock: it is done every few seconds, and mostly in vain.
            if session.scalar(_free(database.now(session), after).limit(1)) is None:
                return None
        return self._db.write(take, seconds=LEASE_SECONDS, after=after)


class _Lease:
    """Renewed while the body runs: an upload may take longer than one lease."""

    def __init__(self, db: database.Database, batch_id: str, held: datetime) -> None:
        self._db = db
        self._batch_id = batch_id
        self._held: datetime | None = held
        self._renewing = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._keep, name="results-lease", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def renew(self) -> bool:
        """False: another has it by now."""
        with self._renewing:
            if self._held is not None:
                self._held = self._db.write(
                    renew, self._batch_id, held=self._held, seconds=LEASE_SECONDS
                )
            return self._held is not None

    def _keep(self) -> None:
        while not self._done.wait(LEASE_SECONDS / 3):
            # After a failure the next try may still come in time.
            with contextlib.suppress(DBAPIError, database.DatabaseUnavailable):
                if not self.renew():
                    return


def take(session: Session, *, seconds: float, after: Taken | None = None) -> Taken | None:
    """The batch that has been finished longest and that nobody writes, with the lease on it.

    `after` is the one that was tried last: those before it are left to the next look.
    """
    now = database.now(session)
    free = _free(now, after).order_by(Batch.finished_at, Batch.id).limit(1)
    batch = session.scalars(free.with_for_update(skip_locked=True)).first()
    if batch is None:
        return None
    assert batch.finished_at is not None
    batch.results_lease_until = now + timedelta(seconds=seconds)
    return Taken(
        batch_id=batch.id,
        finished_at=batch.finished_at,
        lease_until=batch.results_lease_until,
    )


def _free(now: datetime, after: Taken | None) -> Select[Batch]:
    free = (
        select(Batch)
        .where(Batch.finished_at.is_not(None), Batch.manifest_at.is_(None))
        .where(or_(Batch.results_lease_until.is_(None), Batch.results_lease_until < now))
    )
    if after is None:
        return free
    # A place and not a list of all that were tried: that would grow with each of them.
    return free.where(
        tuple_(Batch.finished_at, Batch.id) > tuple_(after.finished_at, after.batch_id)
    )


def renew(session: Session, batch_id: str, *, held: datetime, seconds: float) -> datetime | None:
    """The new end of the lease; None when it is another's by now."""
    until = database.now(session) + timedelta(seconds=seconds)
    renewed = session.execute(
        update(Batch)
        .where(Batch.id == batch_id, Batch.results_lease_until == held)
        .values(results_lease_until=until)
        .returning(Batch.id)
    )
    return until if renewed.first() is not None else None


def give_back(session: Session, batch_id: str) -> None:
    session.execute(update(Batch).where(Batch.id == batch_id).values(results_lease_until=None))
