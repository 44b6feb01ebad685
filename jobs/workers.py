"""The register of render processes, kept by their launchers."""

from dataclasses import dataclass

from sqlalchemy import update
from sqlalchemy.orm import Session

from jobs import database
from jobs.schema import Worker

MIN_FREE_BYTES = 64 << 20  # with less on its scratch disk, a few videos, a worker takes no jobs
ALIVE_SECONDS = 30.0  # three missed beats of the launcher
BEAT_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True)
class Registration:
    """What a launcher knows about one of its processes."""

    name: str
    host: str
    device: str
    memory_bytes: int | None
    queues: tuple[str, ...]
    version: str
    pid: int
    restarts: int


def register(session: Session, registration: Registration) -> None:
    """Make or renew the row of a worker; also its heartbeat."""
    now = database.now(session)
    row = session.get(Worker, registration.name)
    if row is None or row.stopped_at is not None or row.pid != registration.pid:
        started_at = now
    else:
        started_at = row.started_at
    session.merge(
        Worker(
            name=registration.name,
            host=registration.host,
            device=registration.device,
            memory_bytes=registration.memory_bytes,
            queues=list(registration.queues),
            version=registration.version,
            pid=registration.pid,
            started_at=started_at,
            heartbeat_at=now,
            stopped_at=None,
            restarts=registration.restarts,
        )
    )


def stopped(session: Session, name: str) -> None:
    """The process has ended and will not come back by itself."""
    session.execute(
        update(Worker).where(Worker.name == name).values(stopped_at=database.now(session))
    )
