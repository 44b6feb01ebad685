"""A fleet of sleeping devices on PostgreSQL: python -m benchmarks.fleet

Each worker does to Redis and the database what a render process, its publisher and its launcher do,
in the same order: takes a message, claims, reports progress, hands over, succeeds, tells what it
holds, kicks; and a beat every ten seconds. A few threads do this for all that are not asleep. The
dispatcher is the real process. There are no videos and no bucket.
"""

import argparse
import contextlib
import functools
import heapq
import itertools
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

import psutil
import redis
from sqlalchemy import text

from benchmarks import common
from jobs import broker, database, lifecycle, presets, queries, queues, reports, servers, settings
from jobs import workers as register

REPORT = reports.Report(
    renders=1, loads=1, lora_switches=0, resident=(), device_used_bytes=None, host_used_bytes=1
)
THREADS = 8  # of a process, for its workers: its pool has twelve connections
COUNTERS = ("xact_commit", "tup_inserted", "tup_updated", "tup_deleted", "tup_fetched")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=200_000)
    parser.add_argument("--workers", type=int, default=1_000)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--job-seconds", type=float, default=10.0)
    parser.add_argument("--beats", type=int, default=4, help="reports of progress per job")
    parser.add_argument("--seconds", type=float, default=300.0, help="then it ends, drained or not")
    parser.add_argument("--part", nargs=2, help="one process of several; used by itself")
    arguments = parser.parse_args()
    if arguments.part:
        Part(arguments, *arguments.part).run()
        return
    print(common.machine())
    with common.database_url("postgresql") as url, tempfile.TemporaryDirectory() as folder:
        batch_id = common.fill(url, arguments.jobs)
        with servers.RedisServer.start(Path(folder)) as server:
            os.environ |= {
                "DATABASE_URL": url,
                "CELERY_BROKER_URL": server.url,
                "RUSHES_HOME": folder,
                "LOG_LEVEL": "WARNING",
            }
            measure(arguments, batch_id)


def measure(arguments: argparse.Namespace, batch_id: str) -> None:
    db = database.connect(settings.load())
    before, began = counters(db), time.monotonic()
    usage = Usage()
    found = drain(arguments, usage)
    took, after = time.monotonic() - began, counters(db)
    with db.reading() as session:
        done = queries.find_batch(session, batch_id).succeeded
    with redis.Redis.from_url(os.environ["CELERY_BROKER_URL"]) as client:
        redis_bytes = client.info("memory")["used_memory"]  # type: ignore[index]  # of one server
    db.close()
    print(
        f"{arguments.workers:,} workers, {arguments.job_seconds:g} s a job, {arguments.jobs:,} "
        f"jobs: {done:,} done in {took:.0f} s, {done / took:.0f}/s; load {os.getloadavg()[0]:.1f}\n"
        f"claims: {common.spread(found)}; Redis {redis_bytes / 1e6:.1f} MB\n"
        f"CPU per job: {usage.told(max(done, 1))}\n"
        "database per job: "
        + ", ".join(f"{name} {(after[name] - before[name]) / max(done, 1):.1f}" for name in after)
    )


def drain(arguments: argparse.Namespace, usage: "Usage") -> list[float]:
    """Seconds of each claim."""
    command = [sys.executable, "-m", "benchmarks.fleet", *sys.argv[1:], "--part"]
    if arguments.workers % arguments.processes:
        raise SystemExit("--workers must be a multiple of --processes")
    share = str(arguments.workers // arguments.processes)
    with started([sys.executable, "-m", "jobs", "dispatcher"]) as dispatcher:
        workers = [
            subprocess.Popen([*command, str(number), share], stdout=subprocess.PIPE)
            for number in range(arguments.processes)
        ]
        usage.watch(dispatcher=[dispatcher.pid], workers=[worker.pid for worker in workers])
        found: list[float] = []
        for worker in workers:
            told, _ = worker.communicate()
            if worker.returncode:
                usage.stop()
                raise SystemExit("a part of the fleet failed")
            found += json.loads(told)
    usage.stop()
    if not found:
        raise SystemExit(f"no worker got a job in {arguments.seconds:g} s: give it more --seconds")
    return found


class Part:
    """Some of the workers: who sleeps waits in a heap, and a few threads do what is due."""

    def __init__(self, arguments: argparse.Namespace, number: str, share: str) -> None:
        self._arguments = arguments
        self._config = settings.load(lease_seconds=600)
        self._db = database.connect(self._config)
        self._bell = broker.Broker(self._config)
        self._queue = queues.of_model(presets.load(str(common.PRESET)).look.model_path)
        self._names = [f"gpu{index}@host{number}" for index in range(int(share))]
        self._until = time.monotonic() + arguments.seconds
        self._drained = threading.Event()
        self._found: list[float] = []
        self._idle: SimpleQueue[str] = SimpleQueue()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()

    def run(self) -> None:
        for name in self._names:
            self._db.write(register.register, self._registration(name))
            self._idle.put(name)
        loops = [self._beat, self._feed, *[self._work] * THREADS]
        with ThreadPoolExecutor(len(loops)) as pool:
            running = [pool.submit(loop) for loop in loops]
            for one in as_completed(running):
                if one.exception() is not None:
                    self._drained.set()  # the others would go on with fewer
        for one in running:
            one.result()
        print(json.dumps(self._found))

    def _is_over(self) -> bool:
        return self._drained.is_set() or time.monotonic() > self._until

    def _beat(self) -> None:
        """As launchers do; the end is seen here."""
        while not self._is_over():
            for name in self._names:
                self._db.write(register.register, self._registration(name))
            with self._db.reading() as session:
                if not session.scalar(text("SELECT sum(queued + running) FROM batches")):
                    self._drained.set()
            self._drained.wait(register.BEAT_SECONDS)

    def _feed(self) -> None:
        """A message for each worker that has none."""
        client = redis.Redis.from_url(self._bell.url)
        while not self._is_over():
            with contextlib.suppress(Empty):
                name = self._idle.get(timeout=1)
                message = None
                while message is None and not self._is_over():
                    message = client.brpop([self._queue], timeout=1)
                if message is not None:
                    subject = json.loads(message[1])["headers"]["id"]  # type: ignore[index]
                    job_id = int(subject.partition(":")[0])
                    self._after(0, functools.partial(self._claim, name, job_id))
        client.close()

    def _after(self, seconds: float, do: Callable[[], None]) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + seconds, next(self._order), do))
            self._changed.notify()

    def _work(self) -> None:
        while not self._is_over():
            with self._changed:
                wait = self._due[0][0] - time.monotonic() if self._due else 1.0
                if wait > 0:
                    self._changed.wait(min(wait, 1.0))
                    continue
                _, _, do = heapq.heappop(self._due)
            do()

    def _claim(self, name: str, job_id: int) -> None:
        began = time.perf_counter()
        claim = self._db.write(lifecycle.claim, job_id, worker=name, lease_seconds=600)
        self._found.append(time.perf_counter() - began)
        if claim is None:
            self._idle.put(name)
            return
        seconds = self._arguments.job_seconds * random.uniform(0.8, 1.2)  # noqa: S311  # no secret
        self._render(name, claim, seconds, 0)

    def _render(self, name: str, claim: lifecycle.Claim, seconds: float, step: int) -> None:
        beats = self._arguments.beats
        if step:
            place = {"stage": "denoise", "step": step, "steps": beats}
            self._db.write(lifecycle.heartbeat, claim.attempt_id, lease_seconds=600, **place)
        if step == beats:
            self._finish(name, claim, seconds)
        else:
            again = functools.partial(self._render, name, claim, seconds, step + 1)
            self._after(seconds / beats, again)

    def _finish(self, name: str, claim: lifecycle.Claim, seconds: float) -> None:
        self._db.write(register.accept, name, queue=claim.queue)
        for _ in range(2):  # the render process, then its publisher before it uploads
            told = {"seconds": {"denoise": seconds}, "peak_memory_bytes": 1, "lease_seconds": 600}
            self._db.write(lifecycle.rendered, claim.attempt_id, **told)
        video = lifecycle.StoredVideo(key="video.mp4", size_bytes=1, sha256="0" * 64)
        self._db.write(lifecycle.succeed, claim.attempt_id, video=video)
        self._db.write(register.report, name, REPORT)
        self._bell.kick()
        self._idle.put(name)

    def _registration(self, name: str) -> register.Registration:
        return register.Registration(
            name=name,
            host=name.partition("@")[2],
            device="sleeps",
            memory_bytes=None,
            queues=(self._queue,),
            version="0",
            pid=1,
            restarts=0,
            launcher="benchmark",
        )


class Usage:
    """CPU seconds of the three kinds of processes: they say what a larger machine would carry."""

    def __init__(self) -> None:
        self._seconds: dict[str, dict[int, float]] = {"postgresql": {}}
        self._done = threading.Event()

    def watch(self, **pids: list[int]) -> None:
        self._postgres = {
            child.pid: _cpu(child)
            for child in psutil.Process().children(recursive=True)
            if child.name() == "postgres"
        }
        self._thread = threading.Thread(target=self._run, args=(pids,))
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _run(self, pids: dict[str, list[int]]) -> None:
        while not self._done.wait(0.5):
            for child in psutil.Process().children(recursive=True):
                kind = next((kind for kind, those in pids.items() if child.pid in those), None)
                try:
                    kind = kind or ("postgresql" if child.name() == "postgres" else "redis")
                    self._seconds.setdefault(kind, {})[child.pid] = _cpu(child)
                except psutil.NoSuchProcess:
                    continue

    def told(self, jobs: int) -> str:
        before = sum(self._postgres.values())
        sums = {kind: sum(those.values()) for kind, those in self._seconds.items()}
        sums["postgresql"] -= before
        return ", ".join(f"{kind} {sums[kind] / jobs * 1e3:.2f} ms" for kind in sorted(sums))


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def counters(db: database.Database) -> dict[str, int]:
    with db.reading() as session:
        row = session.execute(
            text(
                f"SELECT {', '.join(COUNTERS)} FROM pg_stat_database "  # noqa: S608  # ours
                "WHERE datname = current_database()"
            )
        ).one()
    return dict(zip(COUNTERS, row, strict=True))


@contextmanager
def started(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


if __name__ == "__main__":
    main()
