"""Deletes what is old, or says what it would delete. Safe beside everything else that runs.

The row is marked first, then the objects go, then the row: no reader is promised what is gone, and
no object is left that no row names. A run that was killed left marks, which the next one finds.
"""

import contextlib
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from functools import cached_property
from itertools import islice
from pathlib import Path

import structlog
from sqlalchemy import ColumnElement, Select, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from jobs import (
    database,
    errors,
    expiry,
    firing,
    holds,
    parts,
    results,
    settings,
    storage,
    store_mark,
    stores,
)
from jobs.schema import Base, Batch, Schedule

log = structlog.get_logger()

INPUTS_AT_ONCE = 100
LATEST_DELETE_SECONDS = holds.CONDEMNED.total_seconds() / 2
MOST_REFUSED = 20  # in a row: then it is the store that refuses us, and not some objects
SLASH_IN_JSON = re.compile(r"\\(?:/|u002f)", re.IGNORECASE)  # as programs may write it
IMAGES_IN_TEXT = re.compile(r"inputs/[0-9a-f]{2}/[0-9a-f]{64}")
BATCHES_IN_TEXT = re.compile(r"batches/([0-9a-z-]{1,20})/")
TEMPORARY = tuple(
    f"rushes-{name}-" for name in ("images", "results", "upload", "batch", "card", "selftest")
)
"""Folders of ours in the system's temporary folder or in scratch, left by killed processes."""


class Kind(StrEnum):
    """What can be old, in the order in which it is looked at: later ones depend on earlier ones."""

    RESULTS = "results"
    BATCHES = "batches"
    UPLOADS = "uploads"
    INPUTS = "inputs"
    KEYS = "keys"
    REQUESTS = "requests"
    TOKENS = "tokens"
    WORKERS = "workers"
    HISTORY = "history"
    NOTICES = "notices"
    SCRATCH = "scratch"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was deleted of a kind, or would be."""

    kind: Kind
    keep_days: float | None
    """None: for ever."""
    counts: dict[str, int] = field(default_factory=dict)
    size_bytes: int | None = None
    """None where there are no files."""
    error: str | None = None
    """Why it was not gone through with; the next run goes on."""


class Cleaner:
    """One run. Any number may run at once."""

    def __init__(
        self,
        config: settings.Settings,
        db: database.Database,
        *,
        apply: bool,
        grace: timedelta = holds.GRACE,
    ) -> None:
        self._config = config
        self._db = db
        self._apply = apply
        self._grace = grace

    def run(self, kinds: Sequence[Kind] = tuple(Kind)) -> Iterator[Outcome]:
        """An outcome per kind. One that the store or the database ends does not end the others."""
        for kind in Kind:
            if kind not in kinds:
                continue
            keep_days = self._keep_days(kind)
            tally = _Tally()
            error = None
            if keep_days is not None:
                try:
                    self._steps[kind](self._now - timedelta(days=keep_days), tally)
                except (errors.RushesError, DBAPIError, OSError) as problem:
                    error = self._told(problem)
                    log.warning("cleaning.ended_early", kind=kind, error=error)
            yield Outcome(
                kind=kind,
                keep_days=keep_days,
                counts=tally.counts,
                size_bytes=tally.size_bytes,
                error=error,
            )

    def _told(self, problem: Exception) -> str:
        advice = None
        if isinstance(problem, DBAPIError):
            advice = database.advice(problem, self._db.url)
        return advice or errors.first_line(problem)

    @property
    def _steps(self) -> dict[Kind, Callable[[datetime, "_Tally"], None]]:
        return {
            Kind.RESULTS: self._results,
            Kind.BATCHES: self._batches,
            Kind.UPLOADS: self._rows(expiry.old_uploads, "files"),
            Kind.INPUTS: self._inputs,
            Kind.KEYS: self._keys,
            Kind.REQUESTS: self._rows(expiry.old_requests, "requests"),
            Kind.TOKENS: self._rows(expiry.old_tokens, "tokens"),
            Kind.WORKERS: self._workers,
            Kind.HISTORY: self._rows(expiry.old_firings, "firings"),
            Kind.NOTICES: self._rows(expiry.old_notices, "notices"),
            Kind.SCRATCH: self._scratch,
        }

    def _keep_days(self, kind: Kind) -> float | None:
        days: float | None = getattr(self._config, f"keep_{kind}_days")
        return days

    def _before(self, kind: Kind) -> datetime | None:
        days = self._keep_days(kind)
        return None if days is None else self._now - timedelta(days=days)

    @cached_property
    def _now(self) -> datetime:
        with self._db.reading() as session:
            return database.now(session)

    @property
    def _store(self) -> storage.ObjectStore:
        """OtherStore, before anything of another farm is counted or deleted."""
        self._guard.require()
        return self._opened

    @cached_property
    def _opened(self) -> storage.ObjectStore:
        return stores.open_store(self._config)

    @cached_property
    def _guard(self) -> store_mark.Guard:
        return store_mark.Guard(self._db, self._opened)

    # Results.

    def _results(self, before: datetime, tally: "_Tally") -> None:
        tally.begin("batches", "objects", size=True)
        kept = self._named_by_schedules.batch_ids
        if not self._apply:
            with self._db.reading() as session:
                old = expiry.batches_with_old_results(before, but_not=kept)
                ids = [batch.id for batch in session.scalars(old)]
                ids += expiry.batches_to_empty(session)
            for batch_id in ids:
                for entry in self._store.entries(f"{results.batch_folder(batch_id)}/"):
                    tally.add("objects", 1, size_bytes=entry.size_bytes)
                tally.add("batches", 1)
            return
        self._guard.require()  # a batch whose results are elsewhere keeps them
        while self._db.write(expiry.expire_results, before, but_not=kept):
            pass
        with self._db.reading() as session:
            ids = list(expiry.batches_to_empty(session))
        refused = _Refused()
        for batch_id in ids:
            with refused.noted():
                self._empty(batch_id, tally)
                self._db.write(expiry.results_removed, batch_id)
                tally.add("batches", 1)
        refused.tell()

    def _empty(self, batch_id: str, tally: "_Tally") -> None:
        entries = self._store.entries(f"{results.batch_folder(batch_id)}/")
        while page := list(islice(entries, storage.MOST_DELETED_AT_ONCE)):
            self._store.delete_many([entry.key for entry in page])
            tally.add("objects", len(page), size_bytes=sum(entry.size_bytes for entry in page))

    # Rows of batches.

    def _batches(self, before: datetime, tally: "_Tally") -> None:
        tally.begin("batches", "jobs")
        if not self._apply:
            with self._db.reading() as session:
                old = self._to_forget(before).subquery()
                numbers = select(func.count(), func.coalesce(func.sum(old.c.total), 0))
                batches, jobs = session.execute(numbers).one()
            tally.add("batches", batches)
            tally.add("jobs", jobs)
            return
        keeps_results = self._keep_days(Kind.RESULTS) is None
        while self._db.write(expiry.forget, before, keeps_results=keeps_results):
            pass
        with self._db.reading() as session:
            ids = list(expiry.forgotten(session))
        for batch_id in ids:
            while deleted := self._db.write(expiry.delete_jobs, batch_id):
                tally.add("jobs", deleted)
            self._db.write(expiry.delete_batch, batch_id)
            tally.add("batches", 1)

    def _to_forget(self, before: datetime) -> Select[Batch]:
        return expiry.batches_to_forget(
            before,
            results_before=self._before(Kind.RESULTS),
            but_not=self._named_by_schedules.batch_ids,
        )

    # Input images.

    def _inputs(self, before: datetime, tally: "_Tally") -> None:
        tally.begin("objects", size=True)
        strange: list[str] = []
        old = self._old_inputs(strange)
        refused = _Refused()
        while page := list(islice(old, INPUTS_AT_ONCE)):
            sizes = {entry.key: entry.size_bytes for entry in page}
            with refused.noted():
                gone = (self._delete_inputs if self._apply else self._unneeded)(list(sizes), before)
                tally.add("objects", len(gone), size_bytes=sum(sizes[key] for key in gone))
        if self._apply:
            self._db.write(holds.forget_old, grace=self._grace)
        refused.tell()
        if strange:
            told = f"{len(strange)}, such as {strange[0][:100]!r}"
            raise errors.RushesError(f"names below inputs/ that are not ours stay: {told}")

    def _old_inputs(self, strange: list[str]) -> Iterator[storage.ObjectEntry]:
        """Without those that no row can hold; their names are added to `strange`."""
        unmodified_since = self._now - self._grace
        named = self._named_by_schedules.images
        for entry in self._store.entries("inputs/"):
            if entry.modified_at >= unmodified_since or entry.key in named:
                continue
            if holds.fits(entry.key):
                yield entry
            else:
                strange.append(entry.key)

    def _unneeded(self, keys: Sequence[str], before: datetime) -> Sequence[str]:
        uploaded_since = self._before(Kind.UPLOADS)
        forgotten: Sequence[str] = ()
        forget_before = self._before(Kind.BATCHES)
        with self._db.reading() as session:
            if forget_before is not None:
                ids = self._to_forget(forget_before).with_only_columns(Batch.id)
                forgotten = session.scalars(ids).all()
            needed = expiry.needed_inputs(
                session, keys, before=before, uploaded_since=uploaded_since, but_not=forgotten
            )
            held = holds.held(session, keys, grace=self._grace)
        return [key for key in keys if key not in needed | held]

    def _delete_inputs(self, keys: Sequence[str], before: datetime) -> Sequence[str]:
        began = time.monotonic()
        gone = self._db.write(_condemn_inputs, keys, before=before, grace=self._grace)
        try:
            if time.monotonic() - began > LATEST_DELETE_SECONDS:
                raise errors.RushesError("the database was slow to answer: run it again")
            self._store.delete_many(gone)
        except errors.RushesError:
            self._db.write(holds.absolve, gone)
            raise
        self._db.write(holds.forget, gone)
        return gone

    @cached_property
    def _named_by_schedules(self) -> "_Named":
        """A prompt file of a schedule may name objects of ours, by their addresses."""
        with self._db.reading() as session:
            rows = session.execute(
                select(Schedule.name, Schedule.prompts, Schedule.prompts_url, Schedule.lists)
            ).all()
        images: set[str] = set()
        batch_ids: set[str] = set()
        for name, prompts, url, lists in rows:
            items = [item for items in lists.values() for item in items]
            for text in (prompts or "", url or "", self._text_at(url, name), *items):
                plain = SLASH_IN_JSON.sub("/", text)
                images.update(IMAGES_IN_TEXT.findall(plain))
                batch_ids.update(BATCHES_IN_TEXT.findall(plain))
        return _Named(images=frozenset(images), batch_ids=frozenset(batch_ids))

    def _text_at(self, url: str | None, name: str) -> str:
        if url is None:
            return ""
        try:
            return firing.read_url(self._config, url).decode("utf-8", "replace")
        except errors.InvalidInput as error:
            # It may be there again when the schedule fires, and name what would be gone.
            raise errors.RushesError(
                f"what schedule {name} needs is not known: {error}; mend or remove the schedule"
            ) from error

    # Small things.

    def _keys(self, before: datetime, tally: "_Tally") -> None:
        tally.begin("keys")
        with self._db.reading() as session:
            number = expiry.count(session, Batch, expiry.has_old_key(before))
        tally.add("keys", self._db.write(expiry.drop_keys, before) if self._apply else number)

    def _workers(self, before: datetime, tally: "_Tally") -> None:
        self._rows(expiry.old_workers, "workers")(before, tally)
        self._rows(expiry.old_refusals, "refusals")(before, tally)

    def _rows(
        self, old: Callable[[datetime], tuple[type[Base], ColumnElement[bool]]], name: str
    ) -> Callable[[datetime, "_Tally"], None]:
        def step(before: datetime, tally: _Tally) -> None:
            tally.begin(name)
            if self._apply:
                tally.add(name, self._db.write(expiry.delete_rows, *old(before)))
                return
            with self._db.reading() as session:
                tally.add(name, expiry.count(session, *old(before)))

        return step

    # Files of this machine.

    def _scratch(self, before: datetime, tally: "_Tally") -> None:
        tally.begin("folders", "of_others", size=True)
        root = self._config.scratch_dir
        folders = parts.SCRATCH_FOLDERS.load()(root)
        with self._db.reading() as session:
            live = expiry.live_attempts(session, [folder.attempt_id for folder in folders])
            known = expiry.known_batches(session, {folder.batch_id for folder in folders})
        unneeded = [
            folder for folder in folders if (folder.batch_id, folder.attempt_id) not in live
        ]
        # Finished videos of batches that are not ours: perhaps another farm on this disk uploads
        # them, perhaps they were ours and are forgotten. Somebody has to look.
        of_others = {f.path for f in unneeded if f.batch_id not in known and f.is_finished}
        for path in (*(folder.path for folder in unneeded), *_temporary_folders(root)):
            newest, size_bytes = _age_and_size(path)
            # This machine's clock made these files, and is compared with itself.
            if time.time() - newest < (self._now - before).total_seconds():
                continue
            if path in of_others:
                tally.add("of_others", 1)
                continue
            if self._apply:
                shutil.rmtree(path, ignore_errors=True)
            tally.add("folders", 1, size_bytes=size_bytes)


class _Refused:
    """What the store does not let go, such as objects under a legal hold; the rest goes on."""

    def __init__(self) -> None:
        self._problems: list[errors.RushesError] = []
        self._in_a_row = 0

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except storage.StorageUnavailable:
            raise
        except (storage.StorageError, errors.InvalidInput) as problem:  # such as a name not ours
            self._problems.append(problem)
            self._in_a_row += 1
            if self._in_a_row == MOST_REFUSED:
                self.tell()
        else:
            self._in_a_row = 0

    def tell(self) -> None:
        if self._problems:
            number = f" (and {len(self._problems) - 1} more)" if len(self._problems) > 1 else ""
            raise errors.RushesError(f"{self._problems[0]}{number}") from self._problems[0]


@dataclass(frozen=True, kw_only=True)
class _Named:
    images: frozenset[str]
    batch_ids: frozenset[str]


class _Tally:
    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.size_bytes: int | None = None

    def begin(self, *names: str, size: bool = False) -> None:
        self.counts.update(dict.fromkeys(names, 0))
        self.size_bytes = 0 if size else self.size_bytes

    def add(self, name: str, number: int, *, size_bytes: int = 0) -> None:
        self.counts[name] += number
        if self.size_bytes is not None:
            self.size_bytes += size_bytes


def _condemn_inputs(
    session: Session, keys: Sequence[str], *, before: datetime, grace: timedelta
) -> list[str]:
    """Those that nothing needs: decided for good, since no submit can begin to rely on them."""
    condemned = holds.condemn(session, keys, grace=grace)
    # What was stored until now is seen here, what comes later waits for us.
    needed = expiry.needed_inputs(session, condemned, before=before, uploaded_since=None)
    free = [key for key in condemned if key not in needed]
    expiry.expire_inputs(session, free, before=before)
    # A batch that was reopened before we had its row.
    needed |= expiry.needed_inputs(session, free, before=before, uploaded_since=None)
    holds.absolve(session, sorted(needed))
    return [key for key in free if key not in needed]


def _temporary_folders(scratch: Path) -> list[Path]:
    return [
        path
        for top in {Path(tempfile.gettempdir()), scratch}
        for prefix in TEMPORARY
        for path in top.glob(f"{prefix}*")
        if path.is_dir()
    ]


def _age_and_size(folder: Path) -> tuple[float, int]:
    """When it was last written to, and its bytes."""
    newest, size_bytes = folder.stat().st_mtime, 0
    for path in folder.rglob("*"):
        try:
            found = path.lstat()
        except FileNotFoundError:
            continue
        newest, size_bytes = max(newest, found.st_mtime), size_bytes + found.st_size
    return newest, size_bytes
