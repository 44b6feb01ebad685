"""The tables of this version, from nothing and from every earlier one, on both databases."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import inspect, select, text

import migrations
from jobs import database, migrate, states
from jobs.schema import Attempt, Base, Batch, Job
from tests.integration.jobs.conftest import World

BATCH_CHANGE = """
import sqlalchemy as sa
from alembic import op

revision = "later"
down_revision = "{head}"

def upgrade():
    with op.batch_alter_table("batches", recreate="auto") as table:
        table.alter_column("preset", existing_type=sa.Text(), type_=sa.String(300))
        table.add_column(sa.Column("later_owner", sa.Text(), nullable=False, server_default="me"))
    with op.batch_alter_table("jobs") as table:
        table.alter_column("prompt", existing_type=sa.Text(), type_=sa.String(20000))

def downgrade():
    with op.batch_alter_table("jobs") as table:
        table.alter_column("prompt", existing_type=sa.String(20000), type_=sa.Text())
    with op.batch_alter_table("batches") as table:
        table.drop_column("later_owner")
        table.alter_column("preset", existing_type=sa.String(300), type_=sa.Text())
"""


@pytest.fixture
def db(database_url: str) -> Iterator[database.Database]:
    db = database.Database(database_url)
    yield db
    db.close()


def tables(db: database.Database) -> set[str]:
    return set(inspect(db.engine).get_table_names()) - {"alembic_version"}


def check(db: database.Database) -> None:
    """`alembic check`: raises when the tables are not those of schema.py."""
    config = Config()
    config.set_main_option("script_location", str(migrations.FOLDER))
    with db.engine.begin() as connection:
        config.attributes["connection"] = connection
        command.check(config)


def fill(world: World) -> None:
    """A batch with a job in each state and an attempt in each of its own."""
    batch_id = world.submit([{"prompt": f"p{n}", "metadata": {"n": str(n)}} for n in range(8)])
    queued, running, rendered, succeeded, failed, cancelled, lost, asked = world.job_ids(batch_id)
    world.release(world.claimed(queued))
    world.claimed(running)
    world.rendered(world.claimed(rendered))
    world.succeed(world.claimed(succeeded))
    world.fail(world.claimed(failed), states.FailureKind.INPUT, error="schlecht 日")
    world.cancel_job(cancelled)
    world.expire(world.claimed(lost))
    world.end_lost()
    attempt_id = world.claimed(asked)
    world.cancel_job(asked)
    world.cancel_attempt(attempt_id)
    world.register()
    with world.db.reading() as session:
        assert set(session.scalars(select(Job.state))) == set(states.JobState)
        assert set(session.scalars(select(Attempt.state))) == set(states.AttemptState)


def contents(db: database.Database) -> dict[str, list[dict[str, Any]]]:
    found = {}
    with db.reading() as session:
        for table in Base.metadata.sorted_tables:
            rows = session.execute(select(table)).mappings().all()
            found[table.name] = sorted((dict(row) for row in rows), key=repr)
    return found


def test_there_is_one_head_and_every_step_down_has_an_end() -> None:
    config = Config()
    config.set_main_option("script_location", str(migrations.FOLDER))
    scripts = ScriptDirectory.from_config(config)
    assert scripts.get_heads() == [migrate.head()]
    assert scripts.get_bases() == ["0001"]


def test_up_down_and_up_again_gives_the_tables_of_the_schema(db: database.Database) -> None:
    assert migrate.current(db) is None
    assert migrate.upgrade(db) == (None, migrate.head())
    assert migrate.current(db) == migrate.head()
    check(db)
    assert tables(db) == set(Base.metadata.tables)
    assert migrate.downgrade(db, revision="base") == (migrate.head(), None)
    assert tables(db) == set()
    assert migrate.upgrade(db) == (None, migrate.head())
    check(db)


def test_a_second_upgrade_changes_nothing(world: World) -> None:
    fill(world)
    before = contents(world.db)
    assert migrate.upgrade(world.db) == (migrate.head(), migrate.head())
    assert contents(world.db) == before


def test_tables_of_a_newer_version_are_left_alone(
    world: World, with_a_later_migration: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way back from an upgrade: the version before starts on them and works."""
    migrate.upgrade(world.db)
    assert not migrate.is_newer("later")
    monkeypatch.setattr(migrations, "FOLDER", Path(migrations.__file__).parent)
    assert migrate.is_newer("later")
    assert migrate.upgrade(world.db) == ("later", "later")
    batch_id = world.submit()
    assert world.succeed(world.claimed(world.only_job(batch_id).id))


def test_tables_of_something_else_are_not_taken_for_newer_ones(world: World) -> None:
    with world.db.transaction() as session:
        session.execute(text("UPDATE alembic_version SET version_num = 'ae1027a6acf3'"))
        session.execute(text("DROP TABLE notices"))
    with pytest.raises(migrate.TablesUnknown, match=r"ae1027a6acf3.* has no table notices"):
        migrate.upgrade(world.db)


def test_the_check_finds_a_table_that_differs(db: database.Database) -> None:
    migrate.upgrade(db)
    with db.transaction() as session:
        session.execute(text("ALTER TABLE jobs ADD COLUMN forgotten TEXT"))
    with pytest.raises(command.util.AutogenerateDiffsDetected):
        check(db)


def test_indexes_and_unique_rows_are_as_the_schema_says(db: database.Database) -> None:
    """`alembic check` does not look at the conditions of indexes."""
    migrate.upgrade(db)
    migrated = {
        (table, index["name"], tuple(index["column_names"]), _condition(index))
        for table in Base.metadata.tables
        for index in inspect(db.engine).get_indexes(table)
        if not index.get("duplicates_constraint")
    }
    with db.engine.begin() as connection:
        Base.metadata.drop_all(connection)
        Base.metadata.create_all(connection)
    made = {
        (table, index["name"], tuple(index["column_names"]), _condition(index))
        for table in Base.metadata.tables
        for index in inspect(db.engine).get_indexes(table)
        if not index.get("duplicates_constraint")
    }
    assert migrated == made


def _condition(index: Any) -> str:
    options = index.get("dialect_options", {})
    return str(options.get("sqlite_where", options.get("postgresql_where", "")))


@pytest.fixture
def with_a_later_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the next version may bring it: SQLite must make two tables anew for it."""
    folder = tmp_path / "later"
    (folder / "versions").mkdir(parents=True)
    for path in migrations.FOLDER.glob("versions/*.py"):
        (folder / "versions" / path.name).write_bytes(path.read_bytes())
    for name in ("env.py", "script.py.mako"):
        (folder / name).write_bytes((migrations.FOLDER / name).read_bytes())
    later = BATCH_CHANGE.format(head=migrate.head())
    (folder / "versions" / "9999_later.py").write_text(later)
    monkeypatch.setattr(migrations, "FOLDER", folder)


def test_rows_in_every_state_survive_a_change_of_their_tables(
    world: World, with_a_later_migration: None
) -> None:
    head = migrate.current(world.db)
    fill(world)
    before = contents(world.db)
    assert migrate.upgrade(world.db) == (head, "later")
    assert contents(world.db) == before
    with world.db.reading() as session:
        assert session.scalar(text("SELECT later_owner FROM batches")) == "me"
    assert migrate.downgrade(world.db, revision=str(head)) == ("later", head)
    assert contents(world.db) == before
    world.check()
    with world.db.reading() as session:
        free = session.scalars(select(Job.id).where(Job.state == states.JobState.QUEUED)).all()
    for job_id in free:
        assert world.succeed(world.claimed(job_id))
    world.check()


def test_foreign_keys_are_kept_after_a_migration(sqlite_world: World) -> None:
    with sqlite_world.db.transaction() as session:
        assert session.scalar(text("PRAGMA foreign_keys")) == 1


def test_a_migration_that_fails_leaves_the_tables_as_they_were(
    world: World, with_a_later_migration: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(world)
    head, before = migrate.current(world.db), contents(world.db)
    path = migrations.FOLDER / "versions" / "9999_later.py"
    path.write_text(path.read_text().replace("def downgrade", "    1 / 0\n\ndef downgrade"))
    with pytest.raises(ZeroDivisionError):
        migrate.upgrade(world.db)
    assert migrate.current(world.db) == head
    assert contents(world.db) == before
    check_columns = {c["name"] for c in inspect(world.db.engine).get_columns("batches")}
    assert check_columns == {c.name for c in Batch.__table__.columns}


def test_several_migrators_at_once_are_no_quarrel(database_url: str) -> None:
    start = threading.Barrier(4)

    def upgrade() -> tuple[str | None, str | None]:
        db = database.Database(database_url)
        start.wait()
        try:
            return migrate.upgrade(db)
        finally:
            db.close()

    with ThreadPoolExecutor(4) as pool:
        done = [f.result() for f in [pool.submit(upgrade) for _ in range(4)]]
    assert sorted(before or "" for before, _ in done) == ["", *[migrate.head()] * 3]
    assert {after for _, after in done} == {migrate.head()}


def test_several_migrating_processes_at_once_are_no_quarrel(database_url: str) -> None:
    script = "import sys; from jobs import database, migrate; d = database.Database(sys.argv[1]); "
    script += "sys.stdin.readline(); print(migrate.upgrade(d)[1]); d.close()"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=60)[0] for process in processes] == [
        f"{migrate.head()}\n"
    ] * 3


def test_asking_for_the_revision_waits_for_no_writer(world: World) -> None:
    with world.db.transaction() as session:
        session.execute(text("UPDATE batches SET priority = 1"))
        assert migrate.current(world.db) == migrate.head()


def test_the_alembic_command_line_works_too(
    sqlite_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = Path(__file__).resolve().parents[3]
    monkeypatch.chdir(repository)
    monkeypatch.setenv("DATABASE_URL", sqlite_database_url)
    for words in (["upgrade", "head"], ["check"], ["downgrade", "base"]):
        subprocess.run([sys.executable, "-m", "alembic", *words], check=True, capture_output=True)
    db = database.Database(sqlite_database_url)
    with db.engine.connect() as connection:
        assert MigrationContext.configure(connection).get_current_revision() is None
    db.close()
