"""The images of a prompt file, each fetched once, checked, and laid into the results store."""

import hashlib
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from jobs import database, errors, holds, images, settings, storage, store_mark

LONG_SOURCE_CHARS = 200  # data URLs are remembered by their hash
FETCHES_AT_ONCE = 8
UPLOADS_AT_ONCE = 8  # boto3 keeps ten connections
ROWS_AHEAD = 4 * FETCHES_AT_ONCE
FAR = ("https", "s3")

T = TypeVar("T")


class ImageAway(errors.RushesError):
    """Its server does not answer now; nobody's prompts are to blame."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputImage:
    """An image that a job will start from. Its key is made of its content."""

    key: str
    width: int
    height: int


@dataclass
class InputImages:
    """Resolves what rows call their image. A batch renders what lay there when it was submitted."""

    config: settings.Settings
    base: Path | None
    """Folder that relative paths start from; None: no files of this machine."""
    store: storage.ObjectStore | None
    """None: check only, as for a dry run."""
    may_wait: bool = False
    """An image whose server does not answer makes `resolve` raise ImageAway."""
    _known: dict[str, InputImage | str | Future[InputImage | str]] = field(default_factory=dict)
    """By what rows call them; a Future while it is fetched ahead."""
    _fetched: dict[str, images.FetchedImage] = field(default_factory=dict)
    """By key; `data` lies in the folder instead."""
    _folder: tempfile.TemporaryDirectory[str] | None = None
    """Made for the first of them; `close` removes it."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def upload(self, db: database.Database) -> None:
        """Lay all of them into the store, once the whole file was found good."""
        if self.store is None:
            return
        if self._fetched:
            store_mark.Guard(db, self.store).require()
        holds.hold_all(db, self._fetched)
        with ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="images") as pool:
            stored = list(pool.map(self._store, self._fetched.values()))
        assert stored == list(self._fetched)
        self._fetched.clear()
        self.close()

    def _store(self, image: images.FetchedImage) -> str:
        assert self.store is not None
        data = self._path(image).read_bytes()
        return images.store_once(self.store, replace(image, data=data))

    def close(self) -> None:
        """Safe to call twice."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def resolve(self, source: str) -> InputImage | str:
        """The checked image, or why it cannot be used."""
        name = _name(source)
        found = self._known.get(name)
        if found is None:
            found = self._fetch(source)
        elif isinstance(found, Future):
            found = found.result()
        self._known[name] = found
        return found

    def fetched_ahead(
        self, rows: Iterable[T], source_of: Callable[[T], str | None]
    ) -> Generator[T]:
        """The same rows, while the images of the next ones are fetched from afar, some at once.

        To be closed by who does not read it to its end.
        """
        coming: deque[T] = deque()
        pool = ThreadPoolExecutor(FETCHES_AT_ONCE, thread_name_prefix="images")
        try:
            for row in rows:
                source = source_of(row)
                if source is not None and images.scheme_of(source) in FAR:
                    name = _name(source)
                    if name not in self._known:
                        self._known[name] = pool.submit(self._fetch, source)
                coming.append(row)
                if len(coming) > ROWS_AHEAD:
                    yield coming.popleft()
            yield from coming
        finally:
            pool.shutdown(cancel_futures=True)

    def _path(self, image: images.FetchedImage) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="rushes-images-")
        return Path(self._folder.name, image.sha256)

    def read(self, source: str) -> images.FetchedImage:
        """ImageError."""
        return images.fetch(source, base=self.base, config=self.config)

    def _fetch(self, source: str) -> InputImage | str:
        try:
            found = self.read(source)
        except images.ImageUnreachable as error:
            if self.may_wait:
                raise ImageAway(f"image {error}") from error
            return str(error)
        except images.ImageError as error:
            return str(error)
        with self._lock:
            if self.store is not None and found.key not in self._fetched:
                self._path(found).write_bytes(found.data)
                self._fetched[found.key] = replace(found, data=b"")
        return InputImage(key=found.key, width=found.width, height=found.height)


def _name(source: str) -> str:
    if len(source) <= LONG_SOURCE_CHARS:
        return source
    return hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
