"""The store of finished videos and manifests: what it does, what it answers, how it fails.

Keys are relative to the URL of the store. `put_*` overwrites; who writes which key is decided in
`results`. `stores` opens one.
"""

import contextlib
import hashlib
import io
import os
import secrets
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Protocol

from jobs import errors

MAX_LINK_SECONDS = 7 * 24 * 3600  # longest life of a SigV4 link
CHUNK_BYTES = 1 << 20
MOST_DELETED_AT_ONCE = 1_000  # what one DeleteObjects takes
PART_PREFIX = ".rushes-part-"  # unfinished files in a folder store
RESERVED_PREFIXES = (PART_PREFIX, ".rclone_temp_")  # rclone hides the latter from listings


class StorageError(errors.RushesError):
    """The store did not do what was asked, and neither waiting nor other keys will change that."""

    def __init__(self, address: str, message: str) -> None:
        self.address = address
        super().__init__(f"{address}: {message}")


class StorageUnavailable(StorageError):
    """The store is out of reach, overloaded or full: the same call may work later."""


class BrokenOff(StorageUnavailable):
    """An object began to come and did not end: likely whole at the next try."""


class StorageDenied(StorageError):
    """The store refuses us or has no such bucket: someone must change keys, rights or the URL."""


class KeysRefused(StorageDenied):
    """Our keys, clock or region are not good now, whatever is asked for: keys are renewed."""


class ObjectMissing(StorageError):
    """No object under this key."""

    def __init__(self, address: str) -> None:
        super().__init__(address, "no such object")


class UploadMismatch(StorageError):
    """The stored object differs from what was sent; `stored_bytes` None: the store refused it."""

    def __init__(
        self,
        address: str,
        *,
        key: str,
        sent_bytes: int,
        stored_bytes: int | None,
        sent_sha256: str,
        stored_sha256: str | None,
    ) -> None:
        self.key = key
        self.sent_bytes = sent_bytes
        self.stored_bytes = stored_bytes
        self.sent_sha256 = sent_sha256
        self.stored_sha256 = stored_sha256
        stored = (
            "the store refused it as damaged"
            if stored_bytes is None
            else f"the store has {stored_bytes} bytes, sha256 {stored_sha256 or 'unknown'}"
        )
        super().__init__(
            address,
            f"upload differs: sent {sent_bytes} bytes, sha256 {sent_sha256}; {stored}; "
            "send it again",
        )


@dataclass(frozen=True, kw_only=True)
class StoredObject:
    """What a `put` left in the store, verified."""

    key: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class ObjectHead:
    """What the store knows about an object; `sha256` only if it kept what our upload told it."""

    key: str
    size_bytes: int
    sha256: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectEntry:
    """A line of a listing."""

    key: str
    size_bytes: int
    modified_at: datetime
    """By the clock of the store."""


class ObjectStore(Protocol):
    """May be used by several threads at once. Every method raises `StorageError` or its kinds."""

    @property
    def url(self) -> str: ...

    def put_file(self, path: Path, key: str, *, content_type: str) -> StoredObject: ...

    def put_bytes(self, data: bytes, key: str, *, content_type: str) -> StoredObject: ...

    def read_bytes(self, key: str) -> bytes: ...

    def stream(self, key: str, *, first: int, last: int) -> Generator[bytes]:
        """Bytes `first` to `last`, that one included. What cannot be read is told by this call."""

    def download(self, key: str, path: Path) -> None:
        """Whole or not at all: `path` appears when the last byte is there."""

    def head(self, key: str) -> ObjectHead | None: ...

    def entries(self, prefix: str = "") -> Iterator[ObjectEntry]:
        """Objects whose keys start with the prefix, in order; `b/7` finds `b/77/x` too."""

    def list(self, prefix: str = "") -> Iterator[str]:
        """Their keys."""

    def delete(self, key: str) -> None:
        """Safe to call twice."""

    def delete_many(self, keys: Sequence[str]) -> None:
        """The same for at most MOST_DELETED_AT_ONCE. After an error, some may be gone."""

    def presign(self, key: str, *, seconds: int, file_name: str | None = None) -> str:
        """A link for readers without keys; with a file name, browsers save instead of play."""

    def address(self, key: str) -> str: ...

    def keeps_versions(self) -> bool:
        """Whether what is deleted or overwritten stays as an older version."""

    def check(self) -> None:
        """Raise unless the store answers and knows us. Creates nothing."""


def mismatch(
    address: str, key: str, sent: "Digest", stored_bytes: int | None, stored_sha256: str | None
) -> UploadMismatch:
    """The error for what was sent; `stored_*` as that has them."""
    return UploadMismatch(
        address,
        key=key,
        sent_bytes=sent.size_bytes,
        stored_bytes=stored_bytes,
        sent_sha256=sent.sha256,
        stored_sha256=stored_sha256,
    )


@dataclass(frozen=True, kw_only=True)
class Digest:
    """Of some bytes; both sums as hexadecimal digits."""

    size_bytes: int
    sha256: str
    md5: str


def digest(source: IO[bytes]) -> Digest:
    """From where the source is to its end."""
    size_bytes, sha256, md5 = 0, hashlib.sha256(), hashlib.md5(usedforsecurity=False)
    while chunk := source.read(CHUNK_BYTES):
        size_bytes += len(chunk)
        sha256.update(chunk)
        md5.update(chunk)
    return Digest(size_bytes=size_bytes, sha256=sha256.hexdigest(), md5=md5.hexdigest())


def digest_bytes(data: bytes) -> Digest:
    """The same of bytes that are here."""
    return digest(io.BytesIO(data))


class Readable(Protocol):
    """What a file or the body of an answer can do."""

    def read(self, size: int, /) -> bytes: ...


class Closable(Readable, Protocol):
    """The same, to be closed by who has read it."""

    def close(self) -> None: ...


def chunks(source: Closable, count: int) -> Generator[bytes]:
    """The next `count` bytes, or what there is; then, or with the generator, it is closed."""
    with contextlib.closing(source):
        while count > 0 and (chunk := source.read(min(CHUNK_BYTES, count))):
            count -= len(chunk)
            yield chunk


def write_whole(source: Readable, target: Path) -> None:
    """Write beside the target, flush to disk, rename; a crash leaves the old file or the new."""
    part = target.with_name(f"{PART_PREFIX}{secrets.token_hex(8)}")
    try:
        with part.open("xb") as sink:
            while chunk := source.read(CHUNK_BYTES):
                sink.write(chunk)
            sink.flush()
            os.fsync(sink.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    _flush_folder(target.parent)


def _flush_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checked_key(key: str) -> str:
    """The key, if every store can hold it and no folder can be left with it; else InvalidInput."""
    parts = key.split("/")
    problem = None
    if any(part in ("", ".", "..") for part in parts):
        problem = "parts between slashes must not be empty, `.` or `..`"
    elif "\\" in key or not key.isprintable():
        problem = "no backslash, no control character"
    elif any(part.startswith(RESERVED_PREFIXES) for part in parts):
        problem = f"no part may start with {' or '.join(RESERVED_PREFIXES)}"
    elif len(key.encode()) > 900 or any(len(part.encode()) > 255 for part in parts):
        problem = "at most 900 bytes, 255 between slashes"
    if problem:
        raise errors.invalid("object key", f"{problem}; got {key[:100]!r}")
    return key


def check_prefix(prefix: str) -> None:
    """InvalidInput where no key can begin so."""
    if prefix:
        checked_key(prefix.removesuffix("/"))


def check_link_seconds(seconds: int) -> None:
    """InvalidInput where no link can live for so long."""
    if not 1 <= seconds <= MAX_LINK_SECONDS:
        message = f"a link can live for 1 second to 7 days ({MAX_LINK_SECONDS} s), got {seconds}"
        raise errors.invalid("link", message)
