"""What happened, as the database itself saw it: triggers write down every move of a job.

They run inside the transaction that moves it, so that nothing is missed and nothing is written of
what was rolled back.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select, text

from jobs import database
from jobs.schema import Attempt

TABLE = """
CREATE TABLE chaos_moves (
    id {serial} PRIMARY KEY, at {stamp} NOT NULL DEFAULT {now}, job_id BIGINT NOT NULL,
    before TEXT NOT NULL, after TEXT NOT NULL, fence_before BIGINT, fence_after BIGINT
)"""
LATE = """
CREATE TABLE chaos_late_writes (id {serial} PRIMARY KEY, attempt_id BIGINT NOT NULL)
"""
POSTGRESQL = """
CREATE FUNCTION chaos_write_move() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO chaos_moves (job_id, before, after, fence_before, fence_after)
    VALUES (NEW.id, OLD.state, NEW.state, OLD.attempt_id, NEW.attempt_id);
    RETURN NULL;
END $$;
CREATE TRIGGER chaos_move AFTER UPDATE ON jobs FOR EACH ROW
WHEN (OLD.state IS DISTINCT FROM NEW.state OR OLD.attempt_id IS DISTINCT FROM NEW.attempt_id)
EXECUTE FUNCTION chaos_write_move();
CREATE FUNCTION chaos_write_late() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
    INSERT INTO chaos_late_writes (attempt_id) VALUES (NEW.id); RETURN NULL;
END $$;
CREATE TRIGGER chaos_late AFTER UPDATE ON attempts FOR EACH ROW
WHEN (OLD.state NOT IN ('running', 'rendered'))
EXECUTE FUNCTION chaos_write_late();
"""
SQLITE = (
    """
CREATE TRIGGER chaos_move AFTER UPDATE ON jobs
WHEN OLD.state <> NEW.state OR OLD.attempt_id IS NOT NEW.attempt_id BEGIN
    INSERT INTO chaos_moves (job_id, before, after, fence_before, fence_after)
    VALUES (NEW.id, OLD.state, NEW.state, OLD.attempt_id, NEW.attempt_id);
END""",
    """
CREATE TRIGGER chaos_late AFTER UPDATE ON attempts
WHEN OLD.state NOT IN ('running', 'rendered') BEGIN
    INSERT INTO chaos_late_writes (attempt_id) VALUES (NEW.id);
END""",
)


@dataclass(frozen=True, kw_only=True)
class Move:
    """One change of a job's state or holder."""

    job_id: int
    before: str
    after: str
    fence_before: int | None
    fence_after: int | None


def install(db: database.Database) -> None:
    """From here on every move is written down."""
    kinds = (
        {"serial": "INTEGER", "stamp": "TEXT", "now": "(strftime('%Y-%m-%d %H:%M:%f', 'now'))"}
        if db.is_sqlite
        else {"serial": "BIGSERIAL", "stamp": "TIMESTAMPTZ", "now": "clock_timestamp()"}
    )
    with db.engine.connect() as connection, connection.begin():
        for table in (TABLE, LATE):
            connection.exec_driver_sql(table.format(**kinds))
        for statement in SQLITE if db.is_sqlite else (POSTGRESQL,):
            connection.exec_driver_sql(statement)


def moves(db: database.Database) -> Iterator[Move]:
    """All of them; those of one job in the order in which they happened."""
    statement = "SELECT job_id, before, after, fence_before, fence_after FROM chaos_moves"
    with db.reading() as session:
        for row in session.execute(text(f"{statement} ORDER BY id")):
            yield Move(
                job_id=row[0],
                before=row[1],
                after=row[2],
                fence_before=row[3],
                fence_after=row[4],
            )


def late_writes(db: database.Database) -> list[int]:
    """Attempts that were changed after their end."""
    with db.reading() as session:
        return list(session.scalars(text("SELECT attempt_id FROM chaos_late_writes ORDER BY id")))


def since(db: database.Database, when: datetime) -> datetime | None:
    """When the first job was claimed after this moment."""
    with db.reading() as session:
        return session.scalar(select(func.min(Attempt.started_at)).where(Attempt.started_at > when))
