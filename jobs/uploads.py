"""Files that people uploaded: a row each, their bytes in the results store.

Images lie under their hash, where jobs start from them. Everything else has an object of its own,
so that deleting it can take nothing from another upload of the same bytes.
"""

import re
import secrets
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from jobs import errors, storage
from jobs.schema import StoredFile

MAX_NAME_CHARS = 200
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
DATED = re.compile(r"file-([0-9a-f]{13})[0-9a-f]{18}")
"""An id that tells when its file was created. Older ones do not."""

Place = tuple[datetime, str]
"""Of a file in the order of creation."""

IMAGE = "vision"
"""The purpose of an image that jobs may start from."""


def new_id(created_at: datetime) -> str:
    """Tells its moment: a list goes on after a file whose row is gone meanwhile."""
    return f"file-{(created_at - EPOCH) // MICROSECOND:013x}{secrets.token_hex(9)}"


def shared_key(sha256: str) -> str:
    """Where an image lies, whoever sent it."""
    return f"inputs/{sha256[:2]}/{sha256}"


def own_key(file_id: str) -> str:
    """Where the bytes of this upload lie, and of no other."""
    return f"inputs/files/{file_id}"


def is_there(store: storage.ObjectStore, sha256: str, *, size_bytes: int) -> bool:
    """Whether the image lies whole under its key; False where the store cannot tell."""
    head = store.head(shared_key(sha256))
    return head is not None and (head.size_bytes, head.sha256) == (size_bytes, sha256)


def keep_shared(
    store: storage.ObjectStore, path: Path, *, sha256: str, content_type: str
) -> storage.StoredObject:
    """Lay an image into the store, unless the same is known to be there. Hold its key before."""
    key = shared_key(sha256)
    size_bytes = path.stat().st_size
    if is_there(store, sha256, size_bytes=size_bytes):
        return storage.StoredObject(key=key, size_bytes=size_bytes, sha256=sha256)
    return store.put_file(path, key, content_type=content_type)


def add(
    session: Session,
    stored: storage.StoredObject,
    *,
    file_id: str,
    owner: str,
    purpose: str,
    name: str,
) -> StoredFile:
    created_at = _created_at(file_id)
    assert created_at is not None, "not an id of `new_id`"
    shown = "".join(char if char.isprintable() else "_" for char in name)[:MAX_NAME_CHARS]
    row = StoredFile(
        id=file_id,
        owner=owner,
        purpose=purpose,
        name=shown or "file",
        key=stored.key,
        size_bytes=stored.size_bytes,
        sha256=stored.sha256,
        created_at=created_at,
    )
    session.add(row)
    session.flush()
    return row


def find(session: Session, file_id: str, *, owner: str | None) -> StoredFile:
    """NotFound, also for one of another owner. None: whoever owns it."""
    row = session.get(StoredFile, file_id.replace("\0", ""))
    if row is None or owner not in (None, row.owner):
        raise errors.NotFound(f"no file {file_id[:60]!r}")
    return row


def place(session: Session, file_id: str, *, owner: str | None) -> Place:
    """Where a file is, or was until it was deleted. NotFound."""
    created_at = _created_at(file_id) or find(session, file_id, owner=owner).created_at
    return created_at, file_id


def _created_at(file_id: str) -> datetime | None:
    dated = DATED.fullmatch(file_id)
    return None if dated is None else EPOCH + int(dated[1], 16) * MICROSECOND


def every(
    session: Session,
    *,
    owner: str | None,
    purpose: str | None,
    after: Place | None,
    limit: int,
    oldest_first: bool,
) -> Sequence[StoredFile]:
    statement = select(StoredFile)
    if owner is not None:
        statement = statement.where(StoredFile.owner == owner)
    if purpose is not None:
        statement = statement.where(StoredFile.purpose == purpose.replace("\0", ""))
    if after is not None:
        moment, file_id = after
        when, same = StoredFile.created_at, StoredFile.created_at == moment
        later = (when > moment) | (same & (StoredFile.id > file_id))
        earlier = (when < moment) | (same & (StoredFile.id < file_id))
        statement = statement.where(later if oldest_first else earlier)
    order = [StoredFile.created_at, StoredFile.id]
    return session.scalars(
        statement.order_by(*(o if oldest_first else o.desc() for o in order)).limit(limit)
    ).all()


def remove(session: Session, file_id: str) -> None:
    session.execute(delete(StoredFile).where(StoredFile.id == file_id))
