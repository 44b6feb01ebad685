"""A migration while work is queued and the version before it goes on working."""

import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from psycopg import errors
from sqlalchemy import MetaData, Table, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.orm import Session

import migrations
from jobs import database, migrate, states
from jobs.schema import Attempt, Job
from tests.integration.jobs.conftest import World
from tests.waiting import until

JOBS = 400
LONGEST_LOCK_WAIT = "10s"
"""For the statements of the old version. Migrations give way after migrate.LOCK_SECONDS."""


LATER = """
import sqlalchemy as sa
from alembic import op

revision = "later"
down_revision = "{head}"

def upgrade():
    for table in ("workers", "jobs", "attempts", "batches"):
        op.add_column(table, sa.Column("later", sa.Text(), nullable=False, server_default="me"))

def downgrade():
    pass
"""


def revision_before_head() -> str:
    config = Config()
    config.set_main_option("script_location", str(migrations.FOLDER))
    script = ScriptDirectory.from_config(config).get_revision(migrate.head() or "")
    assert script is not None
    assert isinstance(script.down_revision, str)
    return script.down_revision


class OldVersion:
    """Claims, beats and finishes with statements that know the old tables alone.

    They name every column that was there, as the mapped classes of that version did.
    """

    def __init__(self, db: database.Database, name: str) -> None:
        self._db = db
        self._name = name
        tables = MetaData()
        tables.reflect(db.engine)
        self.jobs, self.attempts = tables.tables["jobs"], tables.tables["attempts"]
        self.batches, self.workers = tables.tables["batches"], tables.tables["workers"]
        self.refusals = tables.tables["refusals"]
        self.rounds = 0

    def write(self, change: Callable[[Session], Any]) -> Any:
        def patiently(session: Session) -> Any:
            limit = {"at": LONGEST_LOCK_WAIT}
            session.execute(text("SELECT set_config('lock_timeout', :at, true)"), limit)
            return change(session)

        return self._db.write(patiently)

    def run(self, stop: threading.Event) -> int:
        """Until told to stop or nothing is queued; how many it finished."""
        done = 0
        while not stop.is_set():
            self.write(self.beat)
            claimed = self.write(self.claim)
            if claimed is None:
                break
            self.write(lambda session, ids=claimed: self.renew(session, ids))
            done += self.write(lambda session, ids=claimed: self.finish(session, ids))
            self.rounds += 1
        return done

    def beat(self, session: Session) -> None:
        now = database.now(session)
        mine = self.workers.c.name == self._name
        changed = session.execute(update(self.workers).where(mine).values(heartbeat_at=now))
        assert changed.rowcount == 1  # type: ignore[attr-defined]  # of an update
        session.execute(select(self.refusals)).all()
        session.execute(select(self.workers)).all()

    def claim(self, session: Session) -> tuple[int, int, str] | None:
        free = (
            select(self.jobs)
            .where(self.jobs.c.state == "queued")
            .order_by(self.jobs.c.id)
            .limit(1)
            .with_for_update(skip_locked=True)
        )
        job = session.execute(free).first()
        if job is None:
            return None
        now = database.now(session)
        row = {
            "job_id": job.id,
            "number": 1,
            "state": "running",
            "worker": self._name,
            "started_at": now,
            "heartbeat_at": now,
            "lease_until": now + timedelta(seconds=60),
            "step": 0,
            "steps": 0,
        }
        made = insert(self.attempts).values(row).returning(self.attempts.c.id)
        attempt_id = session.scalars(made).one()
        self._move(session, job.id, "queued", "running", attempt_id=attempt_id)
        self._count(session, job.batch_id, "queued", "running")
        return job.id, attempt_id, job.batch_id

    def renew(self, session: Session, ids: tuple[int, int, str]) -> None:
        until = database.now(session) + timedelta(seconds=60)
        mine = self.attempts.c.id == ids[1]
        session.execute(update(self.attempts).where(mine).values(lease_until=until))

    def finish(self, session: Session, ids: tuple[int, int, str]) -> bool:
        job_id, attempt_id, batch_id = ids
        now = database.now(session)
        if not self._move(session, job_id, "running", "succeeded", finished_at=now):
            return False
        self._count(session, batch_id, "running", "succeeded")
        mine = self.attempts.c.id == attempt_id
        ended = update(self.attempts).where(mine).values(state="succeeded", finished_at=now)
        session.execute(ended)
        return True

    def _move(self, session: Session, job_id: int, before: str, after: str, **values: Any) -> bool:
        one = (self.jobs.c.id == job_id) & (self.jobs.c.state == before)
        moved = session.execute(update(self.jobs).where(one).values(state=after, **values))
        return bool(moved.rowcount)  # type: ignore[attr-defined]  # of an update

    def _count(self, session: Session, batch_id: str, left: str, entered: str) -> None:
        table: Table = self.batches
        counts = {left: table.c[left] - 1, entered: table.c[entered] + 1}
        session.execute(update(table).where(table.c.id == batch_id).values(counts))


@pytest.fixture
def before(postgres_world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Queued work at the revision before this one, two workers, and a next version to come.

    The newest migration may change no table that workers use, the one of the next version does.
    """
    for name in ("gpu0@here", "gpu1@here"):
        postgres_world.register(name)
    postgres_world.submit(JOBS)
    migrate.downgrade(postgres_world.db, revision=revision_before_head())
    later = LATER.format(head=migrate.head())
    shutil.copytree(migrations.FOLDER, tmp_path / "migrations")
    (tmp_path / "migrations" / "versions" / "9999_later.py").write_text(later)
    monkeypatch.setattr(migrations, "FOLDER", tmp_path / "migrations")
    return postgres_world


def test_the_version_before_works_on_while_the_tables_are_changed(before: World) -> None:
    """Nothing is lost or done twice, and no statement waits for long; then this version goes on."""
    old = [OldVersion(before.db, name) for name in ("gpu0@here", "gpu1@here")]
    stop = threading.Event()
    with ThreadPoolExecutor(2) as pool:
        running = [pool.submit(one.run, stop) for one in old]
        wait_for_rounds(old, 10)
        started = migrate.current(before.db)
        assert migrate.upgrade(before.db) == (started, "later")
        wait_for_rounds(old, 10)
        stop.set()
        done = sum(each.result() for each in running)
    assert 0 < done < JOBS
    with before.db.reading() as session:
        finished = select(func.count()).where(Job.state == states.JobState.SUCCEEDED)
        assert session.scalar(finished) == done
        attempts = session.scalars(select(Attempt.job_id)).all()
        left = session.scalars(select(Job.id).where(Job.state == states.JobState.QUEUED)).all()
    assert len(attempts) == len(set(attempts)) == done
    assert len(left) == JOBS - done
    before.check()
    for job_id in left[:20]:
        assert before.succeed(before.claimed(job_id))
    before.check()


def wait_for_rounds(old: list[OldVersion], number: int) -> None:
    """Each makes so many more."""
    goals = [one.rounds + number for one in old]
    until(lambda: all(one.rounds >= goal for one, goal in zip(old, goals, strict=True)), seconds=60)


def test_a_table_in_use_is_waited_for_without_holding_others_up(
    before: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever comes after the migration for the same table would wait behind it."""
    monkeypatch.setattr(migrate, "LOCK_SECONDS", 0.1)
    old = OldVersion(before.db, "gpu0@here")
    with ThreadPoolExecutor(1) as pool:
        with before.db.transaction() as session:
            session.execute(select(old.workers)).all()  # a backup, say, or a forgotten session
            upgrade = pool.submit(migrate.upgrade, before.db)
            began = time.monotonic()
            while time.monotonic() - began < 1.0:
                old.write(old.beat)
            assert not upgrade.done()
        assert upgrade.result(60)[1] == "later"


def test_a_table_that_is_never_free_ends_the_migration_with_words(
    before: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "LOCK_SECONDS", 0.05)
    monkeypatch.setattr(migrate, "TRIES", 2)
    started = migrate.current(before.db)
    old = OldVersion(before.db, "gpu0@here")
    with before.db.transaction() as session:
        session.execute(select(old.workers)).all()
        with pytest.raises(migrate.TablesBusy, match="pg_stat_activity"):
            migrate.upgrade(before.db)
    assert migrate.current(before.db) == started
    assert migrate.upgrade(before.db)[1] == "later"


def test_a_deadlock_is_tried_again(sqlite_world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A claim locks a job and then its batch, a migration may have come between."""
    really = migrate._try
    ended = [OperationalError("ALTER TABLE batches", {}, errors.DeadlockDetected())]

    def try_once(*arguments: Any, **options: Any) -> Any:
        if ended:
            raise ended.pop()
        return really(*arguments, **options)

    monkeypatch.setattr(migrate, "_try", try_once)
    monkeypatch.setattr(migrate, "LONGEST_PAUSE_SECONDS", 0.0)
    assert migrate.upgrade(sqlite_world.db) == (migrate.head(), migrate.head())


def test_other_failures_of_a_migration_are_not_taken_for_a_lock(
    postgres_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DBAPIError) as raised, postgres_world.db.transaction() as session:
        session.execute(text("SELECT 1 / 0"))

    def fail(*_: object, **__: object) -> None:
        raise raised.value

    monkeypatch.setattr(migrate, "_try", fail)
    with pytest.raises(DBAPIError, match="division"):
        migrate.upgrade(postgres_world.db)
