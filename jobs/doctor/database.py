"""The database: it answers, takes writes, has our tables and our time."""

import contextlib
import time
from collections.abc import Iterator
from datetime import UTC, datetime

from sqlalchemy import false, update
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from jobs import database, errors, migrate, settings
from jobs.doctor import checks
from jobs.schema import Batch

MAX_CLOCK_SKEW_SECONDS = 5.0  # log lines and rows are compared by people


def check(config: settings.Settings) -> Iterator[checks.Check]:
    db = database.connect(config)
    try:
        if missing := db.missing_file:
            advice = "`rushes up` or `rushes migrate` makes it"
            yield checks.fail("database", f"{missing} does not exist", advice)
            return
        with contextlib.closing(db):
            began = time.monotonic()
            with db.reading() as session:
                skew = abs((database.now(session) - datetime.now(UTC)).total_seconds())
                through = ", through a pooler" if database.is_pooled(session) else ""
            milliseconds = (time.monotonic() - began) * 1000
            revision, head = migrate.current(db), migrate.head()
            refused = None if revision is None else _refused_write(db)
    except (SQLAlchemyError, errors.RushesError) as error:
        advice = "start the server or correct DATABASE_URL"
        yield checks.fail("database", errors.first_line(error), advice)
        return
    seen = f"{db.url.get_backend_name()} answers in {milliseconds:.0f} ms{through}"
    yield checks.ok("database", seen)
    if refused is not None:
        advice = "lead DATABASE_URL to the primary, or give its disk room"
        yield checks.fail("database writes", refused, advice)
    if revision == head:
        yield checks.ok("database tables", f"revision {revision}")
    elif migrate.is_newer(revision):
        seen = f"at revision {revision} of a newer version, this one made {head}"
        advice = "none needed: older versions work on them; upgrade when you can"
        yield checks.warn("database tables", seen, advice)
    else:
        seen = f"at revision {revision or 'none'}, this version needs {head}"
        yield checks.fail("database tables", seen, "run `rushes migrate`")
    if skew > MAX_CLOCK_SKEW_SECONDS:
        seen = f"this machine and the database differ by {skew:.0f} s"
        yield checks.warn("clock", seen, "run NTP on both; leases use the database's clock only")


def _refused_write(db: database.Database) -> str | None:
    """Of a change of no row: what a standby or a disk that is read-only says to it."""
    if db.lacks_room():
        return f"less than {database.LEAST_FREE_BYTES >> 20} MiB are free for {db.url.database}"
    try:
        with db.transaction() as session:
            session.execute(update(Batch).where(false()).values(name=None))
    except DBAPIError as error:
        return errors.first_line(error)
    return None
