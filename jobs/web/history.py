"""How long the queue was: looked at now and then by this process, and kept in its memory."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import structlog
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from jobs import database, queries

log = structlog.get_logger()

EVERY_SECONDS = 15.0
SHORTEST = timedelta(seconds=EVERY_SECONDS / 2)  # visitors ask more often
KEPT = 24 * 3600 // 15  # a day
GAP = timedelta(seconds=3 * EVERY_SECONDS)  # longer, and nobody knows what was between
IDLE = timedelta(seconds=60)  # shorter: between two jobs, or before the first of them begins


@dataclass(frozen=True, kw_only=True, slots=True)
class Sample:
    """What was open at a moment of the database's clock."""

    at: datetime
    queued: int
    running: int
    is_idle: bool
    """Jobs wait that live workers would take, and none runs."""


@dataclass(frozen=True, kw_only=True)
class History:
    """Oldest first. A restart begins a new one."""

    samples: deque[Sample] = field(default_factory=lambda: deque(maxlen=KEPT))

    def look(self, db: database.Database) -> Sample:
        """What is open now; remembered if the last one is old enough."""
        with db.reading() as session:
            queued, running = queries.open_jobs(session)
            is_idle = queued > 0 and running == 0 and queries.could_start(session)
            at = database.now(session)
            sample = Sample(at=at, queued=queued, running=running, is_idle=is_idle)
        if not self.samples or sample.at - self.samples[-1].at >= SHORTEST:
            self.samples.append(sample)
        return sample

    @property
    def idle_since(self) -> datetime | None:
        """When it began, if it lasts: a dispatcher would have sent something."""
        idle: list[Sample] = []
        for sample in reversed(list(self.samples)):
            if not sample.is_idle or (idle and idle[-1].at - sample.at > GAP):
                break
            idle.append(sample)
        is_long = bool(idle) and idle[0].at - idle[-1].at >= IDLE
        return idle[-1].at if is_long else None

    @asynccontextmanager
    async def kept(self, db: database.Database) -> AsyncIterator[None]:
        """While a service runs. Where the database is away, there is a gap."""
        keeper = asyncio.create_task(self._keep(db))
        try:
            yield
        finally:
            keeper.cancel()

    async def _keep(self, db: database.Database) -> None:
        while True:
            try:
                await run_in_threadpool(self.look, db)
            except (SQLAlchemyError, database.DatabaseUnavailable) as error:
                log.warning("web.queue_not_seen", error=str(error)[:200])
            await asyncio.sleep(EVERY_SECONDS)
