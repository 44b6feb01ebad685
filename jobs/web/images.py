"""Images of prompts that came over the network: uploaded, given with the request, or addresses."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from jobs import database, errors, images, inputs, uploads
from jobs.web import rates

MAX_FETCH_SECONDS = 300.0
"""Of one request, which holds a thread meanwhile; the image that it ends in may take longer."""
MAX_FETCHES, FETCHES_OF_ONE = 16, 12  # requests at a time
WAIT_SECONDS = 10.0  # before one who has so many asks again
MAX_CHECKS, CHECKS_OF_ONE, CHECKS_WAITING = 2, 1, 15
"""Images of all and of one owner that are decoded at a time; so many more wait.

An image of the most pixels takes a good half of a second: who waits gets a turn. One who sends
the worst of them keeps nobody else waiting.
"""
GIVEN = "given:"
UPLOAD = "upload:"


def fetch_turns() -> rates.Turns:
    """Of one process, for all its requests."""
    what = "requests at once that fetch images"
    return rates.Turns(FETCHES_OF_ONE, of_all=MAX_FETCHES, what=what, wait_seconds=WAIT_SECONDS)


def check_turns() -> rates.Turns:
    """The same, for images that are here."""
    return rates.Turns(
        CHECKS_OF_ONE,
        of_all=MAX_CHECKS,
        what="images at once",
        wait_seconds=WAIT_SECONDS,
        waiting=CHECKS_WAITING,
    )


def far_check_turns() -> rates.Turns:
    """The same, for images from afar: all of a request that has its turn to fetch wait."""
    return rates.Turns(
        CHECKS_OF_ONE,
        of_all=MAX_CHECKS,
        what="images at once",
        wait_seconds=MAX_FETCH_SECONDS,
        waiting=MAX_FETCHES * inputs.FETCHES_AT_ONCE,
    )


@dataclass
class WebImages(inputs.InputImages):
    """No file of this machine, and of its buckets only what the sender may read anyway."""

    db: database.Database | None = None
    owner: str | None = ""
    """Whose uploads; None: everybody's."""
    may_read_buckets: bool = False
    given: dict[str, bytes | str] = field(default_factory=dict)
    """Images and data URLs that came with the request, by the name that rows call them."""
    turns: rates.Turns | None = None
    """For images from afar."""
    checking: Callable[[str | None], AbstractContextManager[object]] = nullcontext
    """Around an owner's image that is here."""
    checking_far: Callable[[str | None], AbstractContextManager[object]] = nullcontext
    """Around one that was fetched."""
    storing: Callable[[], AbstractContextManager[None]] = nullcontext
    """Around what waits for the store."""
    _fetching_since: float | None = None
    """None: this request has no turn."""

    def give(self, data: bytes | str) -> str:
        """What a row calls this image, or the data URL of one, which may be longer than a row."""
        name = f"{GIVEN}{len(self.given)}"
        self.given[name] = data
        return name

    def read(self, source: str) -> images.FetchedImage:
        given = self.given.get(source)
        if isinstance(given, bytes):
            with self.checking(self.owner):
                return images.examine(given, "the image")
        if given is not None:
            source = given
        if source.startswith(UPLOAD):
            return self._uploaded(source)
        if images.scheme_of(source) == "s3" and not self.may_read_buckets:
            raise images.ImageUnusable(
                "s3 address", "is for admin tokens only: upload the image, or give https://"
            )
        if images.scheme_of(source) == "data":
            with self.checking(self.owner):
                return super().read(source)
        return self._fetched_from_afar(source)

    def upload(self, db: database.Database) -> None:
        storing = self.storing if self._fetched else nullcontext
        with storing():
            super().upload(db)

    def close(self) -> None:
        super().close()
        if self.turns is not None and self._fetching_since is not None:
            self.turns.give_back(self.owner)
        self._fetching_since = None

    def _fetched_from_afar(self, source: str) -> images.FetchedImage:
        with self._lock:
            if self._fetching_since is None:
                if self.turns is not None:
                    self.turns.take(self.owner)
                self._fetching_since = time.monotonic()
            seconds = time.monotonic() - self._fetching_since
        if seconds > MAX_FETCH_SECONDS:
            raise images.ImageUnusable(
                "address",
                f"fetching the images before it took {seconds:.0f} s: upload them first, or send "
                "fewer prompts at a time",
            )
        checking = self.checking_far(self.owner)
        return images.fetch(source, base=self.base, config=self.config, checking=checking)

    def _uploaded(self, source: str) -> images.FetchedImage:
        assert self.db is not None
        assert self.store is not None
        file_id = source.removeprefix(UPLOAD)
        with self.db.reading() as session:
            try:
                row = uploads.find(session, file_id, owner=self.owner)
            except errors.NotFound:
                raise images.ImageUnusable(source[:60], "there is no such upload") from None
            key, sha256 = row.key, row.sha256
        with self.storing():
            data = self.store.read_bytes(key)
        with self.checking(self.owner):
            image = images.examine(data, source[:60])
        if image.sha256 != sha256:
            other = "is not what was uploaded (its sha256 differs): upload it again"
            raise images.ImageUnusable(source[:60], other)
        return image
