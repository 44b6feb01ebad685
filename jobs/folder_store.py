"""Objects as plain files below one folder."""

import contextlib
import errno
import io
import os
from collections.abc import Generator, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from jobs import storage


class FolderStore:
    """Objects as plain files below one folder; their content type is the file name's business.

    A folder that is not to be made, and is not there, is an outage: its disk may not be mounted,
    and what is written in its place is hidden once it is.
    """

    def __init__(self, folder: Path, *, may_make: bool = True) -> None:
        self._folder = folder
        self._may_make = may_make

    @property
    def url(self) -> str:
        return self._folder.as_uri()

    def put_file(self, path: Path, key: str, *, content_type: str) -> storage.StoredObject:  # noqa: ARG002
        with path.open("rb") as source:
            return self._put(source, key)

    def put_bytes(self, data: bytes, key: str, *, content_type: str) -> storage.StoredObject:  # noqa: ARG002
        return self._put(io.BytesIO(data), key)

    def read_bytes(self, key: str) -> bytes:
        with self._translated(key):
            return self._path(key).read_bytes()

    def stream(self, key: str, *, first: int, last: int) -> Generator[bytes]:
        with self._translated(key):
            source = self._path(key).open("rb")
            source.seek(first)
        return storage.chunks(source, last - first + 1)

    def download(self, key: str, path: Path) -> None:
        with contextlib.ExitStack() as stack:
            with self._translated(key):
                source = stack.enter_context(self._path(key).open("rb"))
            storage.write_whole(source, path)

    def head(self, key: str) -> storage.ObjectHead | None:
        try:
            with self._translated(key), self._path(key).open("rb") as source:
                digest = storage.digest(source)
        except storage.ObjectMissing:
            return None
        return storage.ObjectHead(key=key, size_bytes=digest.size_bytes, sha256=digest.sha256)

    def entries(self, prefix: str = "") -> Iterator[storage.ObjectEntry]:
        storage.check_prefix(prefix)
        top = self._folder / prefix.rpartition("/")[0]
        with self._translated(prefix):
            self._require_folder()
            keys = [
                (Path(folder) / name).relative_to(self._folder).as_posix()
                for folder, _, names in os.walk(top, onerror=_raise_unless_gone)
                for name in names
                if not name.startswith(storage.PART_PREFIX)
            ]
        for key in sorted(key for key in keys if key.startswith(prefix)):
            with contextlib.suppress(storage.ObjectMissing):  # deleted meanwhile
                with self._translated(key):
                    found = (self._folder / key).stat()
                yield storage.ObjectEntry(
                    key=key,
                    size_bytes=found.st_size,
                    modified_at=datetime.fromtimestamp(found.st_mtime, UTC),
                )

    def list(self, prefix: str = "") -> Iterator[str]:
        return (entry.key for entry in self.entries(prefix))

    def delete(self, key: str) -> None:
        path = self._path(key)
        with contextlib.suppress(storage.ObjectMissing), self._translated(key):
            path.unlink()
        with contextlib.suppress(OSError):  # the first one that still holds something
            for folder in path.parents[: key.count("/")]:
                folder.rmdir()

    def delete_many(self, keys: Sequence[str]) -> None:
        assert len(keys) <= storage.MOST_DELETED_AT_ONCE
        for key in keys:
            self.delete(key)

    def presign(self, key: str, *, seconds: int, file_name: str | None = None) -> str:  # noqa: ARG002
        storage.check_link_seconds(seconds)
        return self.address(key)

    def address(self, key: str) -> str:
        return self._path(key).as_uri()

    def keeps_versions(self) -> bool:
        return False

    def check(self) -> None:
        with self._translated(""):
            self._require_folder()
        nearest = next(p for p in (self._folder, *self._folder.parents) if p.exists())
        if not nearest.is_dir():
            raise storage.StorageDenied(self.url, f"{nearest} is a file, a folder is needed")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise storage.StorageDenied(self.url, f"no right to write in {nearest}")

    def _put(self, source: BinaryIO, key: str) -> storage.StoredObject:
        target = self._path(key)
        sent = storage.digest(source)
        source.seek(0)
        try:
            try:
                self._write(source, key)
            except FileNotFoundError:  # a `delete` took the folder away as empty
                source.seek(0)
                self._write(source, key)
            with target.open("rb") as written:
                stored = storage.digest(written)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            raise storage.StorageError(
                self.address(key), "a file and a folder want this name"
            ) from error
        except OSError as error:
            raise self._failure(error, self.address(key)) from error
        if stored != sent:
            raise storage.mismatch(self.address(key), key, sent, stored.size_bytes, stored.sha256)
        return storage.StoredObject(key=key, size_bytes=sent.size_bytes, sha256=sent.sha256)

    def _path(self, key: str) -> Path:
        return self._folder / storage.checked_key(key)

    @contextlib.contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            address = (self._folder / key).as_uri()
            raise self._failure(error, address) from error

    def _failure(self, error: OSError, address: str) -> storage.StorageError:
        reason = error.strerror or str(error)
        if error.errno == errno.ENOENT and not (self._may_make or self._folder.exists()):
            message = "there is no such folder: mount its disk, or make it"
            return storage.StorageUnavailable(self.url, message)
        if error.errno in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR):
            return storage.ObjectMissing(address)
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            return storage.StorageDenied(address, reason)
        return storage.StorageUnavailable(address, reason)

    def _write(self, source: storage.Readable, key: str) -> None:
        target = self._path(key)
        if self._may_make:
            self._folder.mkdir(parents=True, exist_ok=True)
        for folder in reversed(target.parents[: key.count("/")]):
            folder.mkdir(exist_ok=True)
        storage.write_whole(source, target)

    def _require_folder(self) -> None:
        if not self._may_make:
            self._folder.stat()


def _raise_unless_gone(error: OSError) -> None:
    """A folder that went away meanwhile holds nothing; one that cannot be read may."""
    if error.errno not in (errno.ENOENT, errno.ENOTDIR):
        raise error
