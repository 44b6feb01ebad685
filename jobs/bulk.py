"""Rows of jobs by the million: kept on disk while a file is checked, then stored in one stream."""

import json
import marshal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from jobs import states
from jobs.schema import Job

if TYPE_CHECKING:
    from psycopg import Cursor

ROWS_AT_ONCE = 2_000
COPIED_AT_ONCE = 25 * ROWS_AT_ONCE
"""PostgreSQL checks foreign keys at the end of a COPY, in silence and from a list in its memory: of
a million rows, a busy server was silent for longer than a connection waits for an answer."""
COLUMNS = (
    "batch_id",
    "position",
    "custom_id",
    "look_id",
    "prompt",
    "negative_prompt",
    "image_key",
    "seed",
    "meta",
    "rank",
    "queue",
)
"""What the tuples of `store` hold, in this order; `meta` as JSON text or None."""
CONSTANTS: dict[str, Any] = {"state": states.JobState.QUEUED.value} | {
    column.name: column.default.arg
    for column in Job.__table__.columns
    if column.default is not None and column.default.is_scalar
}
"""What a new job has in the columns that its submitter does not fill."""
MARSHAL_VERSION = 2  # later ones look for equal objects, which costs more than it saves
LENGTH_BYTES = 8
COPY_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n", "\r": r"\r", "\t": r"\t"})


class Spool:
    """Tuples of plain values in a temporary file, read back in their order."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="rushes-rows-")  # noqa: SIM115  # closed below
        self._chunk: list[tuple[Any, ...]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        _error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def add(self, row: tuple[Any, ...]) -> None:
        self._chunk.append(row)
        if len(self._chunk) == ROWS_AT_ONCE:
            self._flush()

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        self._flush()
        self._file.seek(0)
        while length := self._file.read(LENGTH_BYTES):
            # Our own file, without a name: nobody else can have written it.
            yield from marshal.loads(self._file.read(int.from_bytes(length, "little")))  # noqa: S302

    def _flush(self) -> None:
        if self._chunk:
            data = marshal.dumps(self._chunk, MARSHAL_VERSION)
            self._file.write(len(data).to_bytes(LENGTH_BYTES, "little") + data)
            self._chunk.clear()


def store(session: Session, rows: Iterable[tuple[Any, ...]]) -> int:
    """Insert jobs, COLUMNS each, within the transaction of the session; how many."""
    connection = session.connection()
    insert = _insert if connection.dialect.name == "sqlite" else _copy
    return insert(connection, iter(rows))


def meta_text(meta: dict[str, str] | None) -> str | None:
    return None if meta is None else json.dumps(meta)


def _insert(connection: Connection, rows: Iterator[tuple[Any, ...]]) -> int:
    constants = ", ".join(_literal(value) for value in CONSTANTS.values())
    statement = (
        f"INSERT INTO jobs ({', '.join((*COLUMNS, *CONSTANTS))}) "  # noqa: S608  # names of ours
        f"VALUES ({', '.join('?' * len(COLUMNS))}, {constants})"
    )
    stored = 0
    while chunk := list(islice(rows, ROWS_AT_ONCE)):
        connection.exec_driver_sql(statement, chunk)
        stored += len(chunk)
    return stored


def _copy(connection: Connection, rows: Iterator[tuple[Any, ...]]) -> int:
    """PostgreSQL's own way for many rows: half the time of the fastest INSERT."""
    import psycopg

    driver = connection.connection.driver_connection
    assert isinstance(driver, psycopg.Connection)
    statement = f"COPY jobs ({', '.join((*COLUMNS, *CONSTANTS))}) FROM STDIN"
    line_of, stored = _copy_line(CONSTANTS.values()), 0
    try:
        with driver.cursor() as cursor:
            while copied := _copy_some(cursor, statement, map(line_of, rows)):
                stored += copied
    except psycopg.Error as error:
        raise DBAPIError.instance(
            statement, None, error, psycopg.Error, dialect=connection.dialect
        ) from error
    return stored


def _copy_some(cursor: "Cursor[Any]", statement: str, lines: Iterator[str]) -> int:
    copied = 0
    with cursor.copy(statement) as copy:
        while copied < COPIED_AT_ONCE and (chunk := list(islice(lines, ROWS_AT_ONCE))):
            copy.write("".join(chunk))
            copied += len(chunk)
    return copied


def _copy_line(constants: Iterable[Any]) -> Callable[[tuple[Any, ...]], str]:
    end = "".join(f"\t{_field(value)}" for value in constants) + "\n"

    def line(row: tuple[Any, ...]) -> str:
        return "\t".join(map(_field, row)) + end

    return line


def _field(value: Any) -> str:
    """In the text format of COPY."""
    if value is None:
        return "\\N"
    if not isinstance(value, str):
        return str(value)
    if "\\" in value or "\n" in value or "\r" in value or "\t" in value:
        return value.translate(COPY_ESCAPES)
    return value  # nearly always, and twenty times as fast


def _literal(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else str(int(value))
