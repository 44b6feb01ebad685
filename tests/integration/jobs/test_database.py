"""Transactions and the clock, on both databases."""

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url, select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError, ProgrammingError, StatementError

from jobs import cancelling, database, errors, migrate, orders, patience, servers, settings
from jobs.schema import Batch, Job
from tests.integration.jobs.conftest import World
from tests.waiting import until


def test_the_clock_is_the_databases_and_goes_on(world: World) -> None:
    with world.db.reading() as session:
        first, second = database.now(session), database.now(session)
    assert first.tzinfo is UTC
    assert first <= second
    assert abs(first - datetime.now(UTC)) < timedelta(seconds=30)


def test_a_moment_comes_back_as_it_was_stored(world: World) -> None:
    world.submit()
    berlin_summer = datetime.fromisoformat("2026-07-01T12:00:00.123+02:00")
    with world.db.transaction() as session:
        session.execute(update(Batch).values(finished_at=berlin_summer))
        stored = session.scalar(select(Batch.finished_at))
        assert session.scalar(select(Batch.id).where(Batch.finished_at == berlin_summer))
    assert stored == berlin_summer
    assert stored.tzinfo is UTC


@pytest.mark.parametrize("ahead", [0.0, 0.25, 90.0, -7.5, 1e6])
def test_a_statement_sets_the_time_as_the_clock_tells_it(world: World, ahead: float) -> None:
    """Also as it compares with times that were told."""
    world.submit()
    at = database.Clock(ahead) if ahead else database.Clock()
    with world.db.transaction() as session:
        before = database.now(session) + timedelta(seconds=ahead)
        session.execute(update(Batch).values(finished_at=at))
        after = database.now(session) + timedelta(seconds=ahead)
        stored = session.scalar(select(Batch.finished_at))
        assert stored is not None
        assert before <= stored <= after
        within = (Batch.finished_at >= before, Batch.finished_at <= after)
        assert session.scalar(select(Batch.id).where(*within))


@pytest.mark.parametrize("number", [0, 1, 5_000])
def test_any_number_of_ids_are_one_parameter(world: World, number: int) -> None:
    batch_id = world.submit(3)
    first, second, third = world.job_ids(batch_id)
    ids = [first, third, *range(10_000, 10_000 + number)][:number]
    with world.db.reading() as session:
        among = database.among(session, Job.id, ids)
        assert len(select(Job.id).where(among).compile(session.get_bind()).params) == 1
        found = set(session.scalars(select(Job.id).where(among)))
        others = set(session.scalars(select(Job.id).where(~among)))
    assert found == set(ids) & {first, second, third}
    assert others == {first, second, third} - found


@pytest.mark.parametrize("is_trusted", [True, False])
def test_a_read_asks_first_and_a_write_that_trusted_is_done_again(
    postgres_world: World, monkeypatch: pytest.MonkeyPatch, *, is_trusted: bool
) -> None:
    monkeypatch.setattr(database, "IDLE_SECONDS", 60.0 if is_trusted else -1.0)
    batch_id = postgres_world.submit()
    end = (
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
        "WHERE application_name = 'rushes' AND datname = current_database()"
    )
    other = database.Database(postgres_world.db.url.render_as_string(hide_password=False))

    def ended() -> None:
        with other.transaction() as session:
            session.execute(text(f"{end} AND pid <> pg_backend_pid()"))

    runs = itertools.count()

    def rename(session: database.Session) -> None:
        next(runs)
        session.execute(update(Batch).values(name="new"))

    ended()
    postgres_world.db.write(rename)
    assert next(runs) == (2 if is_trusted else 1)
    ended()
    assert postgres_world.batch(batch_id).name == "new"
    other.close()


def test_a_moment_without_a_zone_is_refused(world: World) -> None:
    with (
        world.db.transaction() as session,
        pytest.raises((AssertionError, StatementError), match="naive"),
    ):
        session.execute(update(Batch).values(finished_at=datetime(2026, 7, 1)))


def test_an_exception_rolls_back(world: World) -> None:
    batch_id = world.submit()

    def change_and_stop() -> None:
        with world.db.transaction() as session:
            session.execute(update(Batch).values(name="half"))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        change_and_stop()
    assert world.batch(batch_id).name is None


def test_what_was_read_outlives_its_session(world: World) -> None:
    job = world.only_job(world.submit())
    assert job.prompt == "prompt 0"


def test_a_defect_of_ours_is_not_tried_again(world: World) -> None:
    runs = itertools.count()

    def broken(session: database.Session) -> None:
        next(runs)
        session.execute(text("SELECT nothing FROM nowhere"))

    with pytest.raises((OperationalError, ProgrammingError)):
        world.db.write(broken)
    assert next(runs) == 1


def test_a_job_cannot_belong_to_no_batch(world: World) -> None:
    world.submit()
    with pytest.raises(IntegrityError), world.db.transaction() as session:
        session.execute(update(Job).values(batch_id="none"))


def test_writers_of_sqlite_wait_for_each_other(sqlite_world: World) -> None:
    """Reading first and writing later in one transaction never fails for a writer in between."""
    start = threading.Barrier(4)
    sqlite_world.submit()

    def count_up() -> None:
        start.wait()
        for _ in range(25):
            with sqlite_world.db.transaction() as session:
                value = session.scalar(select(Batch.priority)) or 0
                session.execute(update(Batch).values(priority=value + 1))

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with sqlite_world.db.reading() as session:
        assert session.scalar(select(Batch.priority)) == 100


def test_sqlite_keeps_what_it_committed_through_a_power_cut(sqlite_world: World) -> None:
    with sqlite_world.db.transaction() as session:
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"
        assert session.scalar(text("PRAGMA synchronous")) == 2


def test_a_home_with_odd_characters_holds_its_own_database(tmp_path: object) -> None:
    home = settings.Path(str(tmp_path)) / "a?b%20c#d é"
    db = database.connect(settings.load(home=str(home)))
    with db.reading() as session:
        database.now(session)
    db.close()
    assert (home / "rushes.db").exists()


@pytest.mark.parametrize("url", ["nonsense", "postgresql//x", "://"])
def test_an_address_that_is_none_is_told_by_its_setting(url: str) -> None:
    with pytest.raises(errors.InvalidInput, match="DATABASE_URL is not a database URL"):
        _ = database.Database(url).url


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("postgresql://u:hunter2@127.0.0.1:abc/db", "is not a database URL"),
        ("postgresql://[::1/x", "is not a database URL"),
        ("postgresql://u:hunter@2@h/db", "has an @ too many"),
        ("sqlite://", "names no file"),
        ("sqlite:///:memory:", "names memory"),
        ("sqlite:///~nobody-of-this-name/x.db", "names ~nobody-of-this-name/x.db"),
    ],
)
def test_an_address_with_a_mistake_is_told_without_its_password(url: str, says: str) -> None:
    with pytest.raises(errors.InvalidInput, match=f"DATABASE_URL {says}") as caught:
        _ = database.Database(url).url
    assert "hunter" not in str(caught.value)


def test_a_parameter_that_postgresql_does_not_know_is_told() -> None:
    """Prisma's, say: left to the driver it is an error of each query."""
    url = "postgresql+psycopg://u:hunter2@h/db?schema=public&sslmode=require&pgbouncer=true"
    says = r"DATABASE_URL has schema=, pgbouncer=, which"
    with pytest.raises(errors.InvalidInput, match=says) as caught:
        _ = database.Database(url).engine
    assert "hunter2" not in str(caught.value)
    known = "postgresql+psycopg://u@/db?host=a,b&port=1,2&target_session_attrs=read-write"
    assert database.Database(known).engine


def test_a_file_in_the_home_of_the_user_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    db = database.Database("sqlite:///~/x.db")
    with db.reading() as session:
        database.now(session)
    db.close()
    assert (tmp_path / "x.db").exists()


def test_no_password_is_shown_wherever_it_stands() -> None:
    for address in ("postgresql://u:hunter2@h/db", "postgresql://h/db?user=u&password=hunter2"):
        shown = database.shown(database.Database(address).url)
        assert "hunter2" not in shown
        assert "u" in shown


def test_a_database_without_a_driver_is_told(tmp_path: object) -> None:
    with pytest.raises(database.DatabaseUnavailable, match=r"no driver.*postgresql://") as caught:
        _ = database.Database("mysql+nothing://u:hunter2@h/db").engine
    assert "hunter2" not in str(caught.value)


def behind(url: str, folder: Path) -> database.Database:
    """The same database at the socket in another folder."""
    elsewhere = make_url(url)
    assert elsewhere.query["host"]
    return database.Database(
        elsewhere.update_query_dict({"host": str(folder)}).render_as_string(hide_password=False)
    )


def watch_connects(monkeypatch: pytest.MonkeyPatch, seen: Callable[[], object]) -> None:
    """Calls `seen` before each try to connect to PostgreSQL."""
    connect = patience.PatientConnection.connect

    def watched(*arguments: Any, **named: Any) -> patience.PatientConnection:
        seen()
        return connect(*arguments, **named)

    monkeypatch.setattr(patience.PatientConnection, "connect", watched)


def test_a_server_that_is_back_soon_costs_no_write(
    postgres_world: World,
    postgres_database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """While it starts anew it refuses connections: nothing was begun, so nothing is done twice."""
    socket, refused = tmp_path / "socket", threading.Event()
    db = behind(postgres_database_url, socket)
    real_folder = str(make_url(postgres_database_url).query["host"])

    def come_back() -> None:
        refused.wait(10)
        socket.symlink_to(real_folder)

    coming = threading.Thread(target=come_back)
    coming.start()
    watch_connects(monkeypatch, refused.set)
    batch_id = postgres_world.submit()
    cancelling.cancel_batch(db, batch_id)
    coming.join()
    db.close()
    assert refused.is_set()
    assert postgres_world.batch(batch_id).cancelled == 1


def test_a_server_that_stays_away_is_told_soon(
    postgres_world: World,
    postgres_database_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    db = behind(postgres_database_url, tmp_path / "nowhere")
    runs: list[int] = []
    watch_connects(monkeypatch, lambda: runs.append(1))
    with pytest.raises(OperationalError):
        db.write(orders.request_cancel, "none")
    assert 1 < len(runs) <= database.WRITE_TRIES


def test_a_server_that_answers_no_is_not_asked_again(
    postgres_world: World, postgres_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = make_url(postgres_database_url).set(database="no-such-database")
    db = database.Database(unknown.render_as_string(hide_password=False))
    runs: list[int] = []
    watch_connects(monkeypatch, lambda: runs.append(1))
    with pytest.raises(OperationalError, match="does not exist"):
        db.write(orders.request_cancel, "none")
    assert len(runs) == 1


def prepared(session: database.Session, times: int = 7) -> int:
    """How many statements the server keeps prepared for us, after one was given again and again."""
    for _ in range(times):
        session.execute(text("SELECT CAST(:number AS int)"), {"number": 1})
    return session.scalar(text("SELECT count(*) FROM pg_prepared_statements")) or 0


def test_a_server_without_a_pooler_keeps_statements_prepared(postgres_world: World) -> None:
    with postgres_world.db.reading() as session:
        assert not database.is_pooled(session)
        assert prepared(session) > 0


def test_behind_a_pooler_no_statement_is_prepared(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tells a number that is not that of the server's process."""
    monkeypatch.setattr(psycopg.ConnectionInfo, "backend_pid", property(lambda _: -1))
    with (
        contextlib.closing(database.Database(postgres_database_url)) as db,
        db.reading() as session,
    ):
        assert database.is_pooled(session)
        assert prepared(session) == 0


def test_a_question_for_a_pooler_that_fails_leaves_no_connection_open(
    postgres_database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[patience.PatientConnection] = []

    def fail(connection: patience.PatientConnection) -> None:
        opened.append(connection)
        raise psycopg.OperationalError("query_wait_timeout")

    monkeypatch.setattr(patience.PatientConnection, "beware_of_pooler", fail)
    with (
        contextlib.closing(database.Database(postgres_database_url)) as db,
        pytest.raises(OperationalError, match="query_wait_timeout") as caught,
        db.reading() as session,
    ):
        session.connection()
    assert database.is_away(caught.value)
    assert [connection.closed for connection in opened] == [True]


@pytest.fixture
def pooled_url(postgres_database_url: str) -> Iterator[str]:
    """Through a PgBouncer that lends for a transaction and keeps track of no statements."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("needs pgbouncer")
    there, port = make_url(postgres_database_url), servers.free_port()
    # Not in the test's own folder: it refuses to run as root, and that is private to root.
    with tempfile.TemporaryDirectory(prefix="rushes-pgbouncer-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "users").write_text('"postgres" ""\n')
        (folder / "ini").write_text(
            f"[databases]\n* = host={there.query['host']}\n"
            f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
            f"auth_type = trust\nauth_file = {folder}/users\npool_mode = transaction\n"
            # 0 where it can keep track of them at all; older ones know no such line.
            + ("max_prepared_statements = 0\n" if _keeps_track(program) else "")
        )
        user = ("--user", "nobody") if os.geteuid() == 0 else ()
        with subprocess.Popen(
            [*servers.tied_to_parent(), program, "--quiet", *user, str(folder / "ini")]
        ) as process:
            try:
                until(lambda: _listens(port), seconds=30)
                yield f"postgresql+psycopg://postgres@127.0.0.1:{port}/{there.database}"
            finally:
                process.terminate()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _keeps_track(program: str) -> bool:
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout
    major, minor = said.split()[1].split(".")[:2]
    return (int(major), int(minor)) >= (1, 21)


def test_no_statement_of_another_client_runs_behind_a_pooler(
    postgres_world: World, pooled_url: str
) -> None:
    """Both would call their statement the same, each at another process of the server."""
    batch_id = postgres_world.submit()

    def put(session: database.Session, **values: str) -> None:
        session.execute(update(Batch).where(Batch.id == batch_id).values(**values))

    with contextlib.ExitStack() as stack:
        first, second, third = (
            stack.enter_context(contextlib.closing(database.Database(pooled_url))) for _ in range(3)
        )
        for _ in range(7):
            first.write(put, name="old")
        with third.transaction() as session:  # has the process that the first one had
            assert database.is_pooled(session)
            for _ in range(7):
                second.write(put, owner="somebody")
            first.write(put, name="new")
    batch = postgres_world.batch(batch_id)
    assert (batch.name, batch.owner) == ("new", "somebody")


def test_a_new_file_is_read_by_its_user_alone(tmp_path: Path) -> None:
    file = tmp_path / "rushes.db"
    db = database.Database(f"sqlite:///{file}")
    migrate.upgrade(db)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.glob("rushes.db*")} == {0o600}
    db.close()
    file.chmod(0o660)
    with db.reading():
        pass
    assert file.stat().st_mode & 0o777 == 0o660


def test_many_who_open_a_new_file_at_once_wait_for_each_other(tmp_path: Path) -> None:
    """SQLite's own wait does not hold for the change to WAL."""
    for number in range(30):
        url, start = f"sqlite:///{tmp_path}/{number}.db", threading.Barrier(8)

        def write(url: str = url, start: threading.Barrier = start) -> None:
            db = database.Database(url)
            start.wait()
            with db.transaction() as session:
                session.execute(text("CREATE TABLE IF NOT EXISTS t (x INTEGER)"))
            db.close()

        with ThreadPoolExecutor(8) as pool:
            for done in [pool.submit(write) for _ in range(8)]:
                done.result()
