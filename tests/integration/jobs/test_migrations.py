"""The tables of this version, from nothing and from every earlier one, on both databases."""

import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import (
    JSON,
    Column,
    Enum,
    MetaData,
    Table,
    insert,
    inspect,
    select,
    text,
)

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


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(migrations.FOLDER))
    return ScriptDirectory.from_config(config)


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
    assert scripts().get_heads() == [migrate.head()]
    assert scripts().get_bases() == ["0001"]


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


def test_rows_of_every_table_survive_each_step_up_and_down(db: database.Database) -> None:
    from_the_newest = [script.revision for script in scripts().walk_revisions()]
    steps = ["base", *reversed(from_the_newest)]
    there: dict[str, Sequence[Table]] = {"base": []}
    shapes: dict[str, set[str]] = {"base": set()}
    for number, (before, revision) in enumerate(pairwise(steps)):
        rows = rows_of(db, there[before])
        migrate.upgrade(db, revision=revision)
        assert rows_of(db, there[before]) == rows, revision
        there[revision], shapes[revision] = reflected(db), shape_of(db)
        fill_all(db, there[revision], first=3 * number)
    check(db)
    with db.reading() as session:
        for mapper in Base.registry.mappers:
            assert session.scalars(select(mapper.class_)).all()
    for revision in [*from_the_newest[1:], "base"]:
        rows = rows_of(db, there[revision])
        migrate.downgrade(db, revision=revision)
        assert rows_of(db, there[revision]) == rows, revision
        assert shape_of(db) == shapes[revision], revision
    migrate.upgrade(db)
    check(db)
    assert shape_of(db) == shapes[from_the_newest[0]]
    with db.engine.begin() as connection:
        Base.metadata.drop_all(connection)
        Base.metadata.create_all(connection)
    assert shape_of(db) == shapes[from_the_newest[0]]


def reflected(db: database.Database) -> list[Table]:
    """Parents first."""
    found = MetaData()
    found.reflect(db.engine)
    return [table for table in found.sorted_tables if table.name != "alembic_version"]


def fill_all(db: database.Database, there: Sequence[Table], *, first: int) -> None:
    """Three rows in each, the first of them without what may be left out."""
    with db.transaction() as session:
        for table in there:
            for number in range(first, first + 3):
                is_full = number > first
                columns = [column for column in table.columns if is_full or not column.nullable]
                row = {column.name: value_of(column, number) for column in columns}
                session.execute(insert(table).values(row))


def value_of(column: Column[Any], number: int) -> Any:
    for key in column.foreign_keys:
        return value_of(key.column, number)
    mapped = Base.metadata.tables[column.table.name].columns.get(column.name)
    if mapped is not None and isinstance(mapped.type, Enum):
        return mapped.type.enums[number % len(mapped.type.enums)]
    if isinstance(column.type, JSON):
        return {"number": number}
    if column.type.python_type is datetime:
        return datetime(2026, 1, 2, tzinfo=UTC) + timedelta(minutes=number)
    return column.type.python_type(number)


def rows_of(db: database.Database, there: Sequence[Table]) -> dict[str, list[tuple[Any, ...]]]:
    with db.reading() as session:
        return {
            table.name: sorted(map(tuple, session.execute(select(table))), key=repr)
            for table in there
        }


def shape_of(db: database.Database) -> set[str]:
    """`alembic check` looks at less: not at defaults, keys and the conditions of indexes."""
    found = inspect(db.engine)
    asked: dict[str, Mapping[Any, Any]] = {
        "column": found.get_multi_columns(),
        "key": found.get_multi_pk_constraint(),
        "unique": found.get_multi_unique_constraints(),
        "foreign key": found.get_multi_foreign_keys(),
        "index": found.get_multi_indexes(),
        "options": found.get_multi_table_options(),
    }
    shape = {
        f"{table} {what}: {told(thing)}"
        for what, by_table in asked.items()
        for (_, table), things in by_table.items()
        for thing in (things if isinstance(things, list) else [things])
        if table != "alembic_version"
    }
    # SQLite has kept it: see 0011.
    return {line for line in shape if not (db.is_sqlite and "fk_jobs_look_id_looks" in line)}


def told(thing: dict[str, Any]) -> dict[str, str]:
    options = thing.get("dialect_options", {})
    where = options.get("sqlite_where", options.get("postgresql_where", ""))
    return {
        name: str(value) for name, value in sorted((thing | {"dialect_options": where}).items())
    }


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
