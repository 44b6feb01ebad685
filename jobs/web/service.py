"""What every request handler needs, made once per process."""

import contextlib
import functools
import io
import json
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import structlog
from anyio import CapacityLimiter
from fastapi import Request
from limits import parse
from sqlalchemy.orm import Session

from jobs import (
    bell,
    database,
    errors,
    metrics,
    presets,
    prompt_row,
    readers,
    reordering,
    safety,
    settings,
    storage,
    store_mark,
    stores,
    submission,
)
from jobs.web import bodies, failing, images, rates
from jobs.web.history import History

log = structlog.get_logger()

MAX_ROWS = 10_000  # in one JSON document; more of them come as a file
STREAM_SECONDS = 5.0  # somebody looks at a video: a store that is silent for longer hangs
CHECK_SECONDS = 2.0  # probes give up after 5
TURN_SECONDS = 2.0  # what a burst of requests may wait for the others
MAX_OPENED = 64  # videos at a time; a store that is well takes milliseconds for each
MAX_READ = 32  # of those that are open, at a time; the others wait without a thread
MAX_LOOKING = 8  # streams of events, at a time; two thirds of the connections to the database
MAX_LISTENERS, LISTENERS_OF_ONE = 200, 100  # each looks at the database twice a second
LISTEN_SECONDS = 10.0  # before one who has so many asks again
MAX_STORING = 20
"""Requests. Starlette has 40 threads, which any two of these leave some of: images.MAX_FETCHES,
MAX_CHECKS with CHECKS_WAITING, MAX_FILES with FILES_WAITING, and this.
"""
MAX_FILES, FILES_OF_ONE, FILES_WAITING = 8, 3, 4
"""Prompt files at a time, and those that wait. A million lines take half a minute."""
FILE_WAIT_SECONDS = 10.0
FEW_ROWS = 100  # are read at once, without a turn


def listen_turns() -> rates.Turns:
    """For streams of events: no thread is held, and nobody waits for a turn."""
    return rates.Turns(
        LISTENERS_OF_ONE, of_all=MAX_LISTENERS, what="listeners", wait_seconds=LISTEN_SECONDS
    )


def file_turns() -> rates.Turns:
    """For prompts that take long to read: all who read some share one lock of Python's."""
    return rates.Turns(
        FILES_OF_ONE,
        of_all=MAX_FILES,
        what="prompt files at once",
        wait_seconds=FILE_WAIT_SECONDS,
        waiting=FILES_WAITING,
    )


@dataclass(frozen=True, kw_only=True)
class Service:
    """Database, store and rules of one running service."""

    config: settings.Settings
    db: database.Database
    needs_token: bool
    """False: whoever reaches us is the one person who uses this machine."""
    host_names: frozenset[str] | None = None
    """What a Host header may say; None: anything."""
    history: History = field(default_factory=History)
    """How long the queue was, since this process began."""
    failures: failing.Groups = field(default_factory=failing.Groups)
    fetch_turns: rates.Turns = field(default_factory=images.fetch_turns)
    check_turns: rates.Turns = field(default_factory=images.check_turns)
    far_check_turns: rates.Turns = field(default_factory=images.far_check_turns)
    listen_turns: rates.Turns = field(default_factory=listen_turns)
    large_turns: rates.Turns = field(default_factory=bodies.large_turns)
    file_turns: rates.Turns = field(default_factory=file_turns)

    _storing: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(MAX_STORING))

    @functools.cached_property
    def store(self) -> storage.ObjectStore:
        """Waits out a store that is slow: for `storing`, and for what asks the store nothing."""
        return stores.open_store(self.config)

    @contextlib.contextmanager
    def storing(self) -> Iterator[None]:
        """For calls of the patient store: some at a time, or a store that hangs takes all threads.

        StorageUnavailable: so many wait for it already.
        """
        if not self._storing.acquire(timeout=TURN_SECONDS):
            raise storage.StorageUnavailable(self.store.url, f"{MAX_STORING} requests wait for it")
        try:
            yield
        finally:
            self._storing.release()

    @functools.cached_property
    def streaming_store(self) -> storage.ObjectStore:
        return stores.open_store(self.config, answer_seconds=STREAM_SECONDS)

    @functools.cached_property
    def checked_store(self) -> storage.ObjectStore:
        return stores.open_store(self.config, answer_seconds=CHECK_SECONDS)

    @functools.cached_property
    def store_guard(self) -> store_mark.Guard:
        return store_mark.Guard(self.checked_db, self.checked_store)

    @functools.cached_property
    def writing_guard(self) -> store_mark.Guard:
        """Before something is laid into the store, or deleted there."""
        return store_mark.Guard(self.db, self.store)

    @functools.cached_property
    def checked_db(self) -> database.Database:
        """Its connection is nobody else's: requests that hang leave it free."""
        return database.connect(self.config, answer_seconds=CHECK_SECONDS)

    @functools.cached_property
    def checking(self) -> ThreadPoolExecutor:
        """For those who ask whether something is there, and do not wait for it."""
        return ThreadPoolExecutor(2, thread_name_prefix="check")

    @functools.cached_property
    def checking_database(self) -> ThreadPoolExecutor:
        """Apart: a store that hangs takes both of those, and the service goes on without it."""
        return ThreadPoolExecutor(1, thread_name_prefix="check-database")

    @functools.cached_property
    def opening(self) -> CapacityLimiter:
        return CapacityLimiter(MAX_OPENED)

    @functools.cached_property
    def reading(self) -> CapacityLimiter:
        return CapacityLimiter(MAX_READ)

    @functools.cached_property
    def looking(self) -> CapacityLimiter:
        return CapacityLimiter(MAX_LOOKING)

    @functools.cached_property
    def metrics(self) -> metrics.Registry:
        return metrics.Registry(self.db)

    @functools.cached_property
    def prompt_check(self) -> safety.Check | None:
        return submission.prompt_check(self.config)

    @functools.cached_property
    def limiter(self) -> rates.Limiter | None:
        if self.config.web_rate == "off":
            return None
        url = self.config.broker_url.get_secret_value()
        return rates.Limiter(parse(self.config.web_rate), redis_url=url)

    @functools.cached_property
    def cors_origins(self) -> frozenset[str]:
        return names(self.config.web_cors_origins)

    def seconds_to_wait(self, who: str) -> float:
        """0: this request counts and may be served."""
        return 0.0 if self.limiter is None else self.limiter.seconds_to_wait(who)

    def preset(self, name: str) -> presets.Preset:
        """By name alone: what comes over the network must not read files of this machine."""
        return presets.load(name, folder=self.config.presets_dir, names_only=True)

    def usable_presets(self) -> list[presets.Preset]:
        """What `preset` takes. FolderMissing, as for each of them."""
        presets.check_folder(self.config.presets_dir)
        found = presets.available(self.config.presets_dir)
        return [preset for preset in found if isinstance(preset, presets.Preset)]

    def default_preset(self, *, with_image: bool) -> presets.Preset:
        """For APIs whose clients know no presets. InvalidInput when none is set."""
        name = self.config.default_image_preset if with_image else self.config.default_preset
        setting = "RUSHES_DEFAULT_IMAGE_PRESET" if with_image else "RUSHES_DEFAULT_PRESET"
        how = "name a preset as the model (GET /api/presets lists them)"
        if name is None:
            raise errors.invalid("model", f"{how}, or set {setting}")
        try:
            return presets.load(name, folder=self.config.presets_dir)
        except errors.NotFound:
            raise errors.invalid("model", f"{how}: that of {setting} is gone") from None

    def submit(
        self,
        stream: BinaryIO,
        *,
        source: str,
        format: readers.Format,
        options: submission.Options,
        pictures: images.WebImages,
        beside: Callable[[Session, str], None] | None = None,
        fill: Callable[[prompt_row.PromptRow], prompt_row.PromptRow] | None = None,
    ) -> submission.Submission:
        """Store a batch and wake the dispatchers. InvalidInput lists every bad line.

        `fill` completes each row before it is checked. Its values are no part of the content that
        an idempotency key is compared by.
        """
        file = submission.PromptFile(
            stream=stream,
            source=source,
            format=format,
            options=options,
            images=pictures,
            check=self.prompt_check,
            fill=fill,
        )
        try:
            made = submission.submit(self.db, file, beside=beside)
        finally:
            pictures.close()
        self.wake(made.is_new)
        return made

    def wake(self, is_work: int) -> None:
        """Tell the dispatchers. Without Redis they look by themselves a little later."""
        if is_work and (delayed := bell.kick(self.config)):
            log.warning("web.kick_failed", reason=delayed)

    def send_anew(self) -> None:
        """What was sent before the order changed."""
        if delayed := reordering.send_anew(self.config, self.db):
            log.warning("web.kick_failed", reason=delayed)

    def submit_rows(
        self,
        rows: Sequence[Mapping[str, Any]],
        *,
        options: submission.Options,
        pictures: images.WebImages,
        beside: Callable[[Session, str], None] | None = None,
    ) -> submission.Submission:
        """As `submit`, for rows that came as JSON; a problem's line is a row's number from 1."""
        lines = io.BytesIO()
        for row in rows:  # one by one: all at once would be in memory three times
            lines.write(json.dumps(row).encode() + b"\n")
        return self.submit(
            lines,
            source="prompts",
            format="jsonl",
            options=options,
            pictures=pictures,
            beside=beside,
        )


def of(request: Request) -> Service:
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


def names(text: str | None) -> frozenset[str]:
    return frozenset(part.lower() for part in settings.listed(text))
