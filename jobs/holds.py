"""Who may rely on an object below `inputs/`, and who may delete it: decided by rows.

Objects there are shared by their content. A submit says what it will need before it looks whether
it is there; who deletes what is old says so before too. Whoever comes second sees the first: the
submit waits for the moment that a deletion takes, and the deletion leaves alone what is held.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, delete, or_, select, update
from sqlalchemy.orm import Session

from jobs import database
from jobs.schema import INPUT_KEY_CHARACTERS, Input

GRACE = timedelta(hours=24)  # a submit is shorter, from its first image to its commit
CONDEMNED = timedelta(minutes=10)  # a deletion is over by then, tries and timeouts included
LOOK_SECONDS = 0.5
KEYS_AT_ONCE = 500


def fits(key: str) -> bool:
    """Whether a row can hold it, as it can each key of ours and not all that others lay there."""
    is_text = key.encode(errors="replace").decode() == key
    return len(key) <= INPUT_KEY_CHARACTERS and is_text and "\0" not in key


def hold_all(db: database.Database, keys: Iterable[str]) -> None:
    """Before these objects are looked for or put; waits while one of them is being deleted."""
    rest = sorted(set(keys))  # in one order, so that two submits never wait in a circle
    while chunk := rest[:KEYS_AT_ONCE]:
        held = set(db.write(hold, chunk))
        rest = [key for key in chunk if key not in held] + rest[KEYS_AT_ONCE:]
        if len(held) < len(chunk):
            time.sleep(LOOK_SECONDS)


def hold(session: Session, keys: Sequence[str]) -> Sequence[str]:
    """Those that are held now; the others are being deleted."""
    now = database.now(session)
    is_free = or_(Input.condemned_until.is_(None), Input.condemned_until < now)
    rows = [{"key": key, "held_at": now, "condemned_until": None} for key in keys]
    return _upsert(session, rows, where=is_free)


def condemn(session: Session, keys: Sequence[str], *, grace: timedelta = GRACE) -> Sequence[str]:
    """Those that may be deleted, if no stored row needs them: look after this call, not before."""
    now = database.now(session)
    is_free = or_(Input.held_at.is_(None), Input.held_at < now - grace) & or_(
        Input.condemned_until.is_(None), Input.condemned_until < now
    )
    rows = [{"key": key, "condemned_until": now + CONDEMNED} for key in sorted(keys)]
    return _upsert(session, rows, where=is_free)


def held(session: Session, keys: Sequence[str], *, grace: timedelta = GRACE) -> set[str]:
    """Those that `condemn` would leave alone."""
    since = database.now(session) - grace
    found = select(Input.key).where(Input.key.in_(keys), Input.held_at >= since)
    return set(session.scalars(found))


def absolve(session: Session, keys: Sequence[str]) -> None:
    """They are needed after all, or their deletion did not work."""
    session.execute(update(Input).where(Input.key.in_(keys)).values(condemned_until=None))


def forget(session: Session, keys: Sequence[str]) -> None:
    """They are deleted. A submit may hold them from now on."""
    session.execute(delete(Input).where(Input.key.in_(keys), Input.condemned_until.is_not(None)))


def forget_old(session: Session, *, grace: timedelta = GRACE) -> None:
    """What was held so long ago that it says nothing any more."""
    now = database.now(session)
    session.execute(
        delete(Input)
        .where(or_(Input.held_at.is_(None), Input.held_at < now - grace))
        .where(or_(Input.condemned_until.is_(None), Input.condemned_until < now))
    )


def _upsert(
    session: Session, rows: Sequence[Mapping[str, object]], *, where: ColumnElement[bool]
) -> Sequence[str]:
    """The keys of the rows that were new or that `where` is true for."""
    if not rows:
        return ()
    insert = database.insert(session, Input)
    changed = {name: insert.excluded[name] for name in rows[0] if name != "key"}
    statement = insert.values(rows).on_conflict_do_update(
        index_elements=[Input.key], set_=changed, where=where
    )
    return session.scalars(statement.returning(Input.key)).all()
