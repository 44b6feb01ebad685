"""Engine and transactions; the same calls on SQLite and PostgreSQL."""

import functools
import json
import math
import random
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import structlog
from sqlalchemy import (
    ARRAY,
    BigInteger,
    ColumnElement,
    Connection,
    CursorResult,
    DateTime,
    Engine,
    ExceptionContext,
    Float,
    any_,
    create_engine,
    event,
    func,
    literal,
    make_url,
    select,
    text,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.engine import URL
from sqlalchemy.exc import (
    ArgumentError,
    DBAPIError,
    InterfaceError,
    InvalidatePoolError,
    NoSuchModuleError,
    OperationalError,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, InstrumentedAttribute, Session
from sqlalchemy.pool import ConnectionPoolEntry
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from jobs import errors, settings

log = structlog.get_logger()

P = ParamSpec("P")
R = TypeVar("R")

SQLITE_BUSY_SECONDS = 60  # a million-row submit may hold the one write lock for half a minute
WRITE_TRIES = 6
CONNECT_SECONDS = 5
PING_SECONDS = 5.0  # it waits for no locks
POOL_SECONDS = 10.0  # until one of our connections is free
LATEST_TRY_SECONDS = 10.0  # after this a server that is out of reach is not tried again
IDLE_SECONDS = 1.0  # until then a write trusts that the connection still lives
TAKES_NOBODY = (
    *("starting up", "shutting down", "in recovery", "accepting connections"),
    *("too many clients", "connection slots", "too many connections for"),
    # A PgBouncer without its PostgreSQL, or with too many clients of its own.
    *("cannot connect to server", "server_login_retry", "query_wait_timeout"),
    *("no more connections allowed", "client_login_timeout"),
)
"""What a server says that refuses everybody, not just us."""
LOCK_NOT_AVAILABLE = "55P03"
READ_ONLY = "25006"
"""Of a write to a standby, or to a managed database whose disk is full."""
DISK_FULL = "53100"
STOOD_STILL = "25P03"
NOT_WRITABLE = (
    "database or disk is full",
    "attempt to write a readonly database",
    "disk I/O error",
)
"""What SQLite says."""
IDLE_TRANSACTION_SECONDS = 30.0
"""Between two statements of a change. Ours follow at once: whoever is silent for this long is
frozen or cut off, and others wait for the rows that it has locked."""
ANSWER_SECONDS = 120.0  # longer than a statement may wait for the locks of a million-row submit
LEAST_ANSWER_SECONDS = 0.5  # for whose time is nearly up


class DatabaseUnavailable(errors.RushesError):
    """The database does not answer, or was never migrated."""

    def __init__(self, url: URL, reason: str) -> None:
        self.url = shown(url)
        super().__init__(f"database {self.url}: {reason}")


def shown(url: URL) -> str:
    """For people: without the password, which may also be among the parameters."""
    hidden = {name: "hidden" for name in url.query if "pass" in name.lower()}
    return url.update_query_dict(hidden).render_as_string(hide_password=True)


def _wrong_url(what: str) -> errors.InvalidInput:
    message = f"DATABASE_URL {what}; give postgresql://user:password@host/name or sqlite:///file.db"
    return errors.invalid("settings", message)


def _of_user(file: str) -> str:
    try:
        return str(Path(file).expanduser())
    except RuntimeError:
        raise _wrong_url(f"names {file}: this machine has no such user with a home") from None


class Database:
    """One engine, made lazily; safe to share between threads, not between processes."""

    def __init__(self, url: str, *, answer_seconds: float = ANSWER_SECONDS) -> None:
        self._url_text = url
        self._answer_seconds = answer_seconds

    @functools.cached_property
    def url(self) -> URL:
        try:
            url = make_url(self._url_text)
        except (ArgumentError, ValueError):
            raise _wrong_url("is not a database URL") from None
        if "@" in (url.host or ""):
            raise _wrong_url("has an @ too many: in a password it is written %40")
        if url.get_backend_name() == "sqlite" and not url.database:
            raise _wrong_url("names no file")
        if url.get_backend_name() == "sqlite" and url.database == ":memory:":
            raise _wrong_url("names memory, which ends with each command")
        if url.get_backend_name() == "sqlite" and (url.database or "").startswith("~"):
            return url.set(database=_of_user(url.database or ""))
        return url

    @property
    def is_sqlite(self) -> bool:
        return self.url.get_backend_name() == "sqlite"

    @property
    def missing_file(self) -> Path | None:
        """SQLite's, where it is not there: connecting would make it."""
        file = self.url.database if self.is_sqlite else None
        return Path(file) if file and not Path(file).exists() else None

    def require_file(self) -> None:
        """DatabaseUnavailable instead of an empty SQLite file nobody asked for."""
        if self.missing_file is not None:
            raise DatabaseUnavailable(
                self.url,
                "there is no such file: run this in the folder of `rushes up`, or set RUSHES_HOME "
                "to its .rushes; where nothing runs yet, `rushes up` starts everything, and "
                "`rushes migrate` makes the database for services that you start yourself",
            )

    @functools.cached_property
    def engine(self) -> Engine:
        try:
            if self.is_sqlite:
                return _make_sqlite(self.url)
            return _make_server(self.url, self._answer_seconds)
        except (NoSuchModuleError, ImportError) as error:
            raise DatabaseUnavailable(
                self.url, f"no driver for it ({error}); use postgresql:// or sqlite:///"
            ) from None

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """Commits at the end, rolls back on any exception. Takes SQLite's write lock at once."""
        with Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """One consistent view; on SQLite it neither waits for a writer nor holds one up."""
        engine = self.engine.execution_options(rushes_reads=True)
        with Session(engine, expire_on_commit=False) as session:
            # Closing ends the transaction; a rollback would also expire what was read.
            yield session

    @contextmanager
    def snapshot(self) -> Iterator[Session]:
        """As `reading`; on PostgreSQL too all statements see the rows of one moment."""
        options: dict[str, Any] = {"rushes_reads": True}
        if not self.is_sqlite:
            options["isolation_level"] = "REPEATABLE READ"
        with Session(self.engine.execution_options(**options), expire_on_commit=False) as session:
            yield session

    def write(
        self, change: Callable[Concatenate[Session, P], R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Run `change(session, ...)` in a transaction, again after a deadlock or a lost connection.

        `change` must be safe to run twice: a connection may break after the commit took effect.
        A connection that is refused is tried again as well, for a server that starts anew.
        """
        began = time.monotonic()
        for wait in _waits(WRITE_TRIES):
            try:
                with _trusting(), self.transaction() as session:
                    return change(session, *args, **kwargs)
            except DBAPIError as error:
                # An address that swallows packets costs CONNECT_SECONDS each time.
                is_early = time.monotonic() - began < LATEST_TRY_SECONDS
                if wait is None or not (_may_heal(error) or (is_early and _is_unreachable(error))):
                    raise
                log.warning("database.again", change=change.__name__, error=str(error.orig)[:200])
                time.sleep(wait)
        raise AssertionError("unreachable: the last wait is None")

    @property
    def longest_write_seconds(self) -> float:
        """Until `write` gives up, each of its tries having waited as long as it may."""
        answer = SQLITE_BUSY_SECONDS if self.is_sqlite else self._answer_seconds + CONNECT_SECONDS
        return WRITE_TRIES * answer

    def close(self) -> None:
        self.engine.dispose()


def connect(config: settings.Settings, *, answer_seconds: float = ANSWER_SECONDS) -> Database:
    return Database(config.database_url.get_secret_value(), answer_seconds=answer_seconds)


def connect_service(config: settings.Settings) -> Database:
    """For what runs all night: gives a silent connection up while leases still last."""
    return connect(config, answer_seconds=min(ANSWER_SECONDS, config.lease_seconds / 3))


def wait_for_ever(connection: Connection) -> None:
    """For statements that may take hours, on this connection alone."""
    from jobs import patience

    driver_connection = connection.connection.driver_connection
    if isinstance(driver_connection, patience.PatientConnection):
        driver_connection.answer_seconds = None


def is_pooled(session: Session) -> bool:
    """Whether a pooler lies between us and PostgreSQL."""
    driver_connection = session.connection().connection.driver_connection
    return bool(getattr(driver_connection, "is_pooled", False))


def wait_briefly(connection: Session | Connection, seconds: float) -> None:
    """PostgreSQL: for each lock of this transaction; then `is_held_up` is true of the error."""
    limit = f"{seconds * 1000:.0f}ms"
    connection.execute(select(func.set_config("lock_timeout", limit, True)))


def now(session: Session) -> datetime:
    """The database's clock: the only one that leases and waits are measured with."""
    if session.get_bind().dialect.name == "sqlite":
        value = session.scalar(text("SELECT strftime('%Y-%m-%d %H:%M:%f', 'now')"))
        return datetime.fromisoformat(str(value)).replace(tzinfo=UTC)
    value = session.scalar(text("SELECT clock_timestamp()"))
    assert isinstance(value, datetime)
    return value.astimezone(UTC)


class Clock(FunctionElement[datetime]):
    """`now`, or so many seconds later, within a statement: it costs no round trip of its own."""

    type = DateTime(timezone=True)
    inherit_cache = True


@compiles(Clock, "postgresql")
def _server_clock(element: Clock, compiler: SQLCompiler, **options: Any) -> str:
    if not len(element.clauses):
        return "clock_timestamp()"
    seconds = compiler.process(element.clauses, **options)
    return f"(clock_timestamp() + make_interval(secs => {seconds}))"


@compiles(Clock, "sqlite")
def _sqlite_clock(element: Clock, compiler: SQLCompiler, **options: Any) -> str:
    ahead = ""
    if len(element.clauses):
        ahead = f", printf('%+.3f seconds', {compiler.process(element.clauses, **options)})"
    # Milliseconds, told in the microseconds in which SQLAlchemy writes and reads times.
    return f"(strftime('%Y-%m-%d %H:%M:%f', 'now'{ahead}) || '000')"


def seconds_between(session: Session, start: Any, end: Any) -> ColumnElement[float]:
    """Of two columns of times, as the database reckons."""
    if session.get_bind().dialect.name == "sqlite":
        return (func.julianday(end) - func.julianday(start)) * 86_400.0
    return func.date_part("epoch", end - start, type_=Float)


def among(
    session: Session, column: InstrumentedAttribute[int], ids: Iterable[int]
) -> ColumnElement[bool]:
    """`column IN (ids)` with one parameter for all of them: thousands cost no time to write out."""
    if session.get_bind().dialect.name == "sqlite":
        given = func.json_each(json.dumps(list(ids))).table_valued("value")
        return column.in_(select(given.c.value))
    return column == any_(literal(list(ids), ARRAY(BigInteger)))


def insert(session: Session, table: type[DeclarativeBase]) -> sqlite.Insert | postgresql.Insert:
    """One that may say what to do on a conflict."""
    if session.get_bind().dialect.name == "sqlite":
        return sqlite.insert(table)
    return postgresql.insert(table)


def row_count(result: Any) -> int:
    """Of a change: how many rows it met."""
    assert isinstance(result, CursorResult)
    return result.rowcount


def storable(text: str) -> str:
    """Messages of other programs may hold what no database takes: NUL, halves of characters."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "\\0")


def _waits(tries: int) -> Iterator[float | None]:
    for number in range(tries - 1):
        yield 0.05 * 2**number * random.uniform(0.5, 1.5)  # noqa: S311  # jitter, not a secret
    yield None


def is_away(error: DBAPIError) -> bool:
    """It may answer later as it is: nobody has to correct anything of ours."""
    return _may_heal(error) or _is_unreachable(error)


def is_held_up(error: DBAPIError) -> bool:
    """Somebody holds a lock for longer than `wait_briefly` waits."""
    return sqlstate(error.orig) == LOCK_NOT_AVAILABLE


def is_of_rows(error: DBAPIError) -> bool:
    """Those that it would change are damaged, or refused: others may be changed all the same."""
    # 22 data, 23 constraints, P0 triggers, XX damage.
    of_rows = ("22", "23", "P0", "XX")
    return not error.connection_invalidated and sqlstate(error.orig).startswith(of_rows)


def advice(error: DBAPIError, url: URL) -> str | None:
    """What it says and what to do about it; None when it is a defect of ours."""
    said = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else str(error.orig)
    state = sqlstate(error.orig)
    if state in ("42P01", "42703") or said.startswith(("no such table", "no such column")):
        what = "its tables are missing or older than this version; run `rushes migrate`"
    elif state.startswith("42501"):
        what = "this user has no right to its tables"
    elif state == READ_ONLY:
        what = "this is a standby, or a server that takes no writes because its disk is full"
    elif state == STOOD_STILL:
        what = "this command stood still in the middle of a change; run it again"
    elif state == DISK_FULL or said in NOT_WRITABLE:
        what = "is its disk full or read-only?"
    elif isinstance(error, OperationalError | InterfaceError) or "not a database" in said:
        what = "check DATABASE_URL, or start everything on this machine with `rushes up`"
    else:
        return None
    return f"database {shown(url)}: {said}: {what}"


def sqlstate(error: BaseException | None) -> str:
    """PostgreSQL's code in a driver's error; empty where it has none, as SQLite's."""
    return getattr(error, "sqlstate", None) or ""


def _may_heal(error: DBAPIError) -> bool:
    if error.connection_invalidated:
        return True
    state = sqlstate(error.orig)
    # 08 connection, 40 serialization and deadlock, 57P operator intervention, 53 resources.
    may_heal = ("08", "40", "57P", "53", READ_ONLY)
    return state.startswith(may_heal) or "database is locked" in str(error.orig)


def _is_unreachable(error: DBAPIError) -> bool:
    """No server was reached, so nothing was begun. One that answers has a code or says FATAL."""
    has_code = bool(sqlstate(error.orig))
    is_server = type(error.orig).__module__.startswith("psycopg")
    said = str(error.orig)
    takes_nobody = any(words in said for words in TAKES_NOBODY)
    return (
        isinstance(error, OperationalError)
        and is_server
        and not has_code
        and ("FATAL" not in said or takes_nobody)
    )


def _make_server(url: URL, answer_seconds: float) -> Engine:
    arguments: dict[str, Any] = {}
    if url.get_driver_name() == "psycopg":
        _refuse_unknown(url)
        # Keepalive and tcp_user_timeout: a half-open connection is noticed within half a minute.
        arguments = {
            "connect_timeout": CONNECT_SECONDS,
            "application_name": "rushes",
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        }
    engine = create_engine(
        url, pool_size=4, max_overflow=8, pool_timeout=POOL_SECONDS, connect_args=arguments
    )
    if url.get_driver_name() == "psycopg":
        _limit_waits(engine, answer_seconds)
    _ping_idle(engine)
    if engine.dialect.name == "postgresql":
        _limit_idle(engine)
        _leave_standbys(engine)
    return engine


def _refuse_unknown(url: URL) -> None:
    """Each parameter must be of PostgreSQL's own client: it would not even try to connect."""
    from psycopg.pq import Conninfo  # not at the top: SQLite needs no driver of PostgreSQL

    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    if unknown := [f"{name}=" for name in url.query if name not in known]:
        raise _wrong_url(f"has {', '.join(unknown)}, which PostgreSQL's own client does not know")


_is_trusted = ContextVar("_is_trusted", default=False)


@contextmanager
def _trusting() -> Iterator[None]:
    """For what is tried again when a connection turns out to be broken."""
    token = _is_trusted.set(True)
    try:
        yield
    finally:
        _is_trusted.reset(token)


_most_seconds = ContextVar("_most_seconds", default=math.inf)


@contextmanager
def answering_within(seconds: float) -> Iterator[None]:
    """Transactions that begin here wait no longer than this for an answer of a server."""
    token = _most_seconds.set(max(seconds, LEAST_ANSWER_SECONDS))
    try:
        yield
    finally:
        _most_seconds.reset(token)


def _ping_idle(engine: Engine) -> None:
    """As `pool_pre_ping`, but for writes over a connection that worked a moment ago."""

    @event.listens_for(engine, "checkin")
    def _rest(_connection: Any, record: ConnectionPoolEntry) -> None:
        record.info["idle_since"] = time.monotonic()

    @event.listens_for(engine, "checkout")
    def _ask(connection: Any, record: ConnectionPoolEntry, *_: object) -> None:
        idle_since = record.info.get("idle_since")
        if idle_since is None:
            return
        if _is_trusted.get() and time.monotonic() - idle_since < IDLE_SECONDS:
            return
        try:
            with _waiting_less(connection):
                engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as error:
            if engine.dialect.is_disconnect(error, connection, None):
                raise InvalidatePoolError from error  # another connection is made
            raise


@contextmanager
def _waiting_less(connection: Any) -> Iterator[None]:
    seconds = getattr(connection, "answer_seconds", None)
    if seconds is None:  # of another driver
        yield
        return
    connection.answer_seconds = min(seconds, PING_SECONDS)
    try:
        yield
    finally:
        connection.answer_seconds = seconds


def _only_reads(connection: Connection) -> bool:
    return bool(connection.get_execution_options().get("rushes_reads"))


def _limit_idle(engine: Engine) -> None:
    """The server ends a transaction whose client stays silent, and gives its locks free."""

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        if _only_reads(connection):
            return  # and holds up nobody
        # For the transaction, not the session: a pooler that lends connections for a transaction
        # keeps no settings of sessions.
        limit = f"{IDLE_TRANSACTION_SECONDS * 1000:.0f}"
        connection.exec_driver_sql(f"SET LOCAL idle_in_transaction_session_timeout = {limit}")


def _leave_standbys(engine: Engine) -> None:
    """The address may lead to the new primary by now, but connections that stand do not."""

    @event.listens_for(engine, "handle_error")
    def _judge(context: ExceptionContext) -> None:
        if sqlstate(context.original_exception) == READ_ONLY:
            context.is_disconnect = True


def _limit_waits(engine: Engine, answer_seconds: float) -> None:
    from jobs import patience  # not at the top: SQLite needs no driver of PostgreSQL

    @event.listens_for(engine, "do_connect")
    def _connect(
        _dialect: object, _record: object, arguments: list[Any], named: dict[str, Any]
    ) -> patience.PatientConnection:
        connection = patience.PatientConnection.connect(*arguments, **named)
        _set_again(connection)
        try:
            connection.beware_of_pooler()
        except BaseException:
            connection.close()
            raise
        return connection

    @event.listens_for(engine, "checkout")
    def _set_again(connection: patience.PatientConnection, *_: object) -> None:
        # After `wait_for_ever`, or for others who have more time.
        connection.answer_seconds = min(answer_seconds, _most_seconds.get())


def _make_sqlite(url: URL) -> Engine:
    if url.database:
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url,
        connect_args={"timeout": SQLITE_BUSY_SECONDS},
        # Those who wait for a connection wait for the same write lock.
        pool_timeout=2 * SQLITE_BUSY_SECONDS,
    )

    @event.listens_for(engine, "connect")
    def _prepare(connection: Any, _record: object) -> None:
        connection.isolation_level = None  # we say BEGIN ourselves
        _keep_private(Path(url.database or ""))
        _use_wal(connection)
        for pragma in ("foreign_keys=ON", "synchronous=FULL"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # IMMEDIATE: a transaction that reads first and writes later would fail at once
        # when another writer came between, without waiting for the busy timeout.
        connection.exec_driver_sql("BEGIN" if _only_reads(connection) else "BEGIN IMMEDIATE")

    return engine


def _keep_private(file: Path) -> None:
    """A new file, and those that SQLite puts beside it: it will hold the secrets of listeners."""
    with suppress(OSError):  # another user's, who makes it
        if file.stat().st_size == 0:
            file.chmod(0o600)


def _use_wal(connection: sqlite3.Connection) -> None:
    """Several who turn a new file to it at once are refused without the wait of all else."""
    until = time.monotonic() + SQLITE_BUSY_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)
        else:
            return
