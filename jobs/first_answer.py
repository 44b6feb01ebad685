"""What a service waits for at its start: an outage is sat out, a wrong setting is told."""

import threading
from collections.abc import Callable

import structlog
from sqlalchemy import select
from sqlalchemy.exc import DBAPIError

from jobs import database
from jobs.schema import Batch

log = structlog.get_logger()

AGAIN_SECONDS = 5.0


def wait(db: database.Database, *, stop: threading.Event, alive: Callable[[], None]) -> None:
    """Until the database answers and has tables, or `stop` is set; calls `alive` at each look.

    Raises what no waiting would mend: an address that is none, a wrong password or name of the
    database, tables that were never made. A host that is not found may be one that is away.
    Whoever started us would start us again and again for an outage, with growing pauses.
    """
    while not stop.is_set():
        alive()
        try:
            with db.reading() as session:
                session.execute(select(Batch.id).limit(1))
        except DBAPIError as error:
            if not database.is_away(error):
                raise
            log.warning("database.awaited", error=str(error.orig)[:300])
            stop.wait(AGAIN_SECONDS)
        else:
            return
