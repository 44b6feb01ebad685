"""By which a farm knows its store again: a small object whose name the database has.

Each process learns the URL of the store from its own settings. One that was given another would
upload videos where nobody looks for them, so it asks for the mark first.
"""

import secrets
from dataclasses import dataclass

import structlog
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from jobs import database, storage
from jobs.schema import StoreMark

log = structlog.get_logger()

ONLY = 1
TEXT = b"The database of a rushes farm names this object: its results lie here.\n"


class OtherStore(storage.StorageDenied):
    """Our settings name another store than that of the farm."""

    def __init__(self, store_url: str, mark: StoreMark) -> None:
        super().__init__(
            store_url,
            f"this is not the store of this farm, {mark.url}: it has no {key(mark.name)}; correct "
            "RUSHES_RESULTS_URL or its endpoint here and start this again "
            "(docs/operations.md, another store)",
        )


class Guard:
    """Asks a store for each mark once: one that had it stays the farm's, whatever is deleted."""

    def __init__(self, db: database.Database, store: storage.ObjectStore) -> None:
        self._db = db
        self._store = store
        self._seen: str | None = None

    def require(self) -> StoreMark | None:
        """The mark that the store has, None while the farm has none; else OtherStore."""
        mark = self._mark()
        if mark is None or mark.name == self._seen:
            return mark
        if self._store.head(key(mark.name)) is None:
            raise OtherStore(self._store.url, mark)
        self._seen = mark.name
        return mark

    def leave(self) -> None:
        """Mark the store as the farm's if none is yet, and renew its mark; else OtherStore.

        A bucket may delete what is old.
        """
        if self._mark() is None:
            self._begin()
        mark = self.require()
        assert mark is not None
        _put(self._store, mark.name)

    def _begin(self) -> None:
        """Each its own object, so that of two at once neither replaces what the other counts on."""
        name = secrets.token_hex(8)
        _put(self._store, name)
        try:
            self._db.write(_first, StoreMark(id=ONLY, name=name, url=self._store.url))
        except IntegrityError:  # another dispatcher was there first, perhaps at another store
            mark = self._mark()
            if mark is None or mark.name != name:  # nor ourselves, without having heard of it
                self._store.delete(key(name))
        else:
            log.info("store.marked", store=self._store.url, key=key(name))

    def _mark(self) -> StoreMark | None:
        with self._db.reading() as session:
            return session.get(StoreMark, ONLY)


@dataclass(frozen=True, kw_only=True)
class Moved:
    """What `move` did."""

    key: str
    """Of the mark."""
    changed: bool
    """The store had another address before, or none was known."""


def move(db: database.Database, store: storage.ObjectStore) -> Moved:
    """From now on this one is the farm's, and no process goes on with the one before it.

    The mark is new at the same address, too: behind another endpoint or on another disk lies
    another store, to which the mark was copied with the rest.
    """
    name = secrets.token_hex(8)
    _put(store, name)
    before = db.write(_replace, StoreMark(id=ONLY, name=name, url=store.url))
    return Moved(key=key(name), changed=before != store.url)


def key(name: str) -> str:
    return f"farms/{name}"


def _put(store: storage.ObjectStore, name: str) -> None:
    store.put_bytes(TEXT, key(name), content_type="text/plain")


def _first(session: Session, mark: StoreMark) -> None:
    session.add(StoreMark(id=mark.id, name=mark.name, url=mark.url))
    session.flush()


def _replace(session: Session, mark: StoreMark) -> str | None:
    """The address before it."""
    before = session.scalar(select(StoreMark.url).where(StoreMark.id == ONLY))
    session.merge(mark)
    return before
