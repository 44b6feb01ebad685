"""The images of a prompt file, each fetched once, checked, and laid into the results store."""

import hashlib
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from jobs import database, errors, holds, images, settings, storage

LONG_SOURCE_CHARS = 200  # data URLs are remembered by their hash


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
    _known: dict[str, InputImage | str] = field(default_factory=dict)
    _fetched: dict[str, images.FetchedImage] = field(default_factory=dict)
    """By key; `data` lies in the folder instead."""
    _folder: tempfile.TemporaryDirectory[str] | None = None
    """Made for the first of them; `close` removes it."""

    def upload(self, db: database.Database) -> None:
        """Lay all of them into the store, once the whole file was found good."""
        if self.store is None:
            return
        holds.hold_all(db, self._fetched)
        for key, image in self._fetched.items():
            data = self._path(image).read_bytes()
            assert images.store_once(self.store, replace(image, data=data)) == key
        self._fetched.clear()
        self.close()

    def close(self) -> None:
        """Safe to call twice."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def resolve(self, source: str) -> InputImage | str:
        """The checked image, or why it cannot be used."""
        name = source
        if len(source) > LONG_SOURCE_CHARS:
            name = hashlib.sha256(source.encode("utf-8", "surrogatepass")).hexdigest()
        if name not in self._known:
            self._known[name] = self._fetch(source)
        return self._known[name]

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
        if self.store is not None and found.key not in self._fetched:
            self._path(found).write_bytes(found.data)
            self._fetched[found.key] = replace(found, data=b"")
        return InputImage(key=found.key, width=found.width, height=found.height)
