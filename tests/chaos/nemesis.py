"""Strikes at a farm, drawn from a seed: whom, how and when.

Each strike has an end, at which what it broke is mended. Strikes are spread over the work: the
next one comes when the next share of the jobs is done.
"""

import contextlib
import heapq
import itertools
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import kombu.exceptions
import psutil
import psycopg
import redis
import structlog
from celery import Celery
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from jobs import celery_app, database, orders, queues, states
from jobs.schema import Attempt, Batch
from tests.chaos import farm as farms
from tests.chaos.proxy import Fault, Proxy

log = structlog.get_logger()

LOOK_SECONDS = 0.1
LEAST_PAUSE_SECONDS = 0.4
BOMB_MARK = "bomb"
BUSY_SHARE = 0.8  # of the blows at a worker
END_SECONDS = 60.0  # for a launcher's drain
LONG_OUTAGES = 2  # of the store: as long as so many others
BAD_DEVICE_OUTAGES = 2
RESTART_SECONDS = (0.5, 3.0)  # until somebody starts again what was killed


@dataclass
class Bomb:
    """Unpickled, it leaves a mark."""

    mark: Path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.mark,)


@dataclass
class Strike:
    """One fault, from its beginning to its end."""

    what: str
    target: str
    at: datetime
    until: datetime
    workers: tuple[str, ...] = ()
    """Names of the workers whose attempts it may have ended."""

    def told(self) -> dict[str, Any]:
        return {
            "what": self.what,
            "target": self.target,
            "at": self.at.isoformat(),
            "seconds": round((self.until - self.at).total_seconds(), 2),
        }


@dataclass(frozen=True, kw_only=True)
class Struck:
    """What an action did: to whom, for how long, and how it is mended."""

    target: str
    workers: tuple[str, ...] = ()
    seconds: float = 0.0
    mend: Callable[[], None] | None = None
    restart: Callable[[], None] | None = None
    """A host is stopped beside that, and started again much sooner."""


@dataclass(frozen=True, kw_only=True)
class Pause:
    """When a batch was paused, by the database's clock."""

    batch_id: str
    since: datetime
    until: datetime


class NotYet(Exception):
    """It cannot be mended before something else is."""


class NothingToStrike(Exception):
    """Its victim is away already, or this machine cannot do it; the message says which."""


@dataclass
class Nemesis:
    """Does `quotas[what]` strikes of each kind."""

    farm: farms.Farm
    db: database.Database
    quotas: Counter[str]
    seed: int
    outage_seconds: tuple[float, float]
    stuck_seconds: float
    """After so long without progress the next strike comes all the same."""
    strikes: list[Strike] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    pauses: list[Pause] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._rng = random.Random(self.seed)
        self._mends: list[tuple[float, int, Strike, str, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._busy: set[str] = set()
        self._planned = sum(self.quotas.values())
        self._actions: Mapping[str, tuple[str, Callable[[], Struck]]] = {
            "kill child": ("", self._kill_child),
            "kill parent": ("", self._kill_parent),
            "kill launcher": ("host", self._kill_launcher),
            "kill publisher": ("", self._kill_publisher),
            "kill dispatcher": ("", self._kill_dispatcher),
            "stop child past its lease": ("", self._stop_child),
            "stop host past its lease": ("host", self._stop_host),
            "drain host": ("host", self._drain_host),
            "terminate parent": ("", self._terminate_parent),
            "redis flushed": ("server", self._flush_redis),
            "redis lost": ("server", self._lose_redis),
            "redis restarted": ("server", self._restart_redis),
            "redis stopped": ("server", self._stop_redis),
            "redis half open": ("server", lambda: self._network("redis", Fault.HALF_OPEN)),
            "postgresql restarted": ("server", self._restart_postgres),
            "postgresql backends ended": ("server", self._end_backends),
            "postgresql half open": ("server", lambda: self._network("postgres", Fault.HALF_OPEN)),
            "redis connections forgotten": ("", lambda: self._forget("redis")),
            "redis connections cut": ("", self._cut_redis),
            "postgresql connections forgotten": ("", lambda: self._forget("postgres")),
            "postgresql stopped": ("server", self._stop_postgres),
            "messages of strangers": ("", self._send_strange),
            "store busy": ("store", lambda: self._network("store", Fault.BUSY)),
            "store denies": ("store", lambda: self._network("store", Fault.DENIED)),
            "store answers lost": ("store", lambda: self._network("store", Fault.LOST_ANSWER)),
            "store half open": ("store", lambda: self._network("store", Fault.HALF_OPEN)),
            "store away over a restart": ("store", self._away_over_restart),
            "disk full": ("disk", self._fill_disk),
            "device bad": ("device", self._break_device),
            "batch paused": ("batch", self._pause_batch),
        }
        assert set(self.quotas) <= set(self._actions)

    def run(self, *, done_share: Callable[[], float], is_over: Callable[[], bool]) -> None:
        """Until all strikes are done and mended, or it is over; then all is mended."""
        struck_at = time.monotonic()
        while not is_over() and (self._left() or self._mends):
            self._mend_due()
            self.farm.start_failed()
            pause = time.monotonic() - struck_at
            done = len(self.strikes) + len(self.skipped)
            is_due = done_share() >= 0.9 * (done + 0.5) / self._planned
            is_due = (is_due and pause > LEAST_PAUSE_SECONDS) or pause > self.stuck_seconds
            if self._left() and is_due and self._strike():
                struck_at = time.monotonic()
            time.sleep(LOOK_SECONDS)
        self.mend_all()

    def mend_all(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        while self._mends and time.monotonic() < deadline:
            self._mend_next()

    def _left(self) -> list[str]:
        return [what for what, number in self.quotas.items() if number > 0]

    def _strike(self) -> bool:
        ready = [what for what in self._left() if self._actions[what][0] not in self._busy]
        if not ready:
            return False
        (what,) = self._rng.choices(ready, [self.quotas[what] for what in ready])
        resource, action = self._actions[what]
        at = datetime.now(UTC)
        try:
            struck = action()
        except NothingToStrike as error:
            if str(error):
                self.skipped[what] = str(error)
                self.quotas[what] = 0
            return False
        self.quotas[what] -= 1
        strike = Strike(
            what=what, target=struck.target, at=at, until=datetime.now(UTC), workers=struck.workers
        )
        self.strikes.append(strike)
        log.info("strike", what=what, target=struck.target, seconds=round(struck.seconds, 1))
        if struck.mend is not None:
            self._mend_later(struck.seconds, strike, resource, struck.mend)
        if struck.restart is not None:
            self._mend_later(self._rng.uniform(*RESTART_SECONDS), strike, "host", struck.restart)
        return True

    def _mend_due(self) -> None:
        while self._mends and self._mends[0][0] <= time.monotonic():
            self._mend_next()

    def _mend_next(self) -> None:
        _, _, strike, resource, mend = heapq.heappop(self._mends)
        try:
            mend()
        except NotYet:
            self._mend_later(LEAST_PAUSE_SECONDS, strike, resource, mend)
            return
        strike.until = datetime.now(UTC)
        self._busy.discard(resource)

    def _mend_later(
        self, seconds: float, strike: Strike, resource: str, mend: Callable[[], None]
    ) -> None:
        if resource:
            self._busy.add(resource)
        item = (time.monotonic() + seconds, next(self._numbers), strike, resource, mend)
        heapq.heappush(self._mends, item)

    # Processes

    def _live_hosts(self) -> list[farms.Host]:
        hosts = [host for host in self.farm.hosts if host.launcher.is_alive]
        if not hosts:
            raise NothingToStrike
        return hosts

    def _parent(self) -> tuple[str, psutil.Process]:
        parents = {
            name: process
            for host in self._live_hosts()
            for name, process in host.render_parents().items()
        }
        if not parents:
            raise NothingToStrike
        busy = sorted(parents.keys() & self._busy_workers())
        # An idle victim proves little.
        is_among_busy = busy and self._rng.random() < BUSY_SHARE
        name = self._rng.choice(busy if is_among_busy else sorted(parents))
        return name, parents[name]

    def _busy_workers(self) -> set[str]:
        if "server" in self._busy:
            return set()  # perhaps the database does not answer, and only we can mend it
        running = select(Attempt.worker).where(Attempt.state == states.AttemptState.RUNNING)
        with contextlib.suppress(SQLAlchemyError), self.db.reading() as session:
            return set(session.scalars(running))
        return set()

    def _child(self) -> tuple[str, psutil.Process]:
        name, parent = self._parent()
        child = farms.rendering_child(parent)
        if child is None:
            raise NothingToStrike
        return name, child

    def _kill_child(self) -> Struck:
        name, child = self._child()
        _send(child, signal.SIGKILL)
        return Struck(target=name, workers=(name,))

    def _kill_parent(self) -> Struck:
        name, parent = self._parent()
        _send(parent, signal.SIGKILL)
        return Struck(target=name, workers=(name,))

    def _terminate_parent(self) -> Struck:
        """As an operator may, past the launcher: Celery's warm shutdown."""
        name, parent = self._parent()
        _send(parent, signal.SIGTERM)
        return Struck(target=name, workers=(name,))

    def _kill_launcher(self) -> Struck:
        host = self._rng.choice(self._live_hosts())
        names = tuple(host.render_parents())
        os.kill(host.launcher.pid, signal.SIGKILL)
        return self._until_restart(host.launcher, names)

    def _drain_host(self) -> Struck:
        host = self._rng.choice(self._live_hosts())
        names = tuple(host.render_parents())
        os.kill(host.launcher.pid, signal.SIGTERM)
        return self._until_restart(host.launcher, names)

    def _kill_publisher(self) -> Struck:
        publisher = self._rng.choice(self._live_hosts()).publisher()
        if publisher is None:
            raise NothingToStrike
        _send(publisher, signal.SIGKILL)
        return Struck(target=f"pid {publisher.pid}")

    def _kill_dispatcher(self) -> Struck:
        alive = [process for process in self.farm.dispatchers if process.is_alive]
        if not alive:
            raise NothingToStrike
        process = self._rng.choice(alive)
        os.kill(process.pid, signal.SIGKILL)
        return self._until_restart(process, ())

    def _until_restart(self, process: farms.Process, workers: tuple[str, ...]) -> Struck:
        seconds = self._rng.uniform(*RESTART_SECONDS)
        start = lambda: _start_again(process)  # noqa: E731
        return Struck(target=process.name, workers=workers, seconds=seconds, mend=start)

    def _break_device(self) -> Struck:
        """Whatever it renders fails, and its self-test too, until it is mended."""
        name, _ = self._parent()
        fault = self._rng.choice(("device", "internal", "crash"))
        self.farm.bad_devices.write_text(f"{name} {fault}\n")
        mend = lambda: self.farm.bad_devices.unlink(missing_ok=True)  # noqa: E731
        seconds = BAD_DEVICE_OUTAGES * self._outage()
        return Struck(target=f"{name}: {fault}", workers=(name,), seconds=seconds, mend=mend)

    # Batches

    def _pause_batch(self) -> Struck:
        if "server" in self._busy:
            raise NothingToStrike
        try:
            with self.db.reading() as session:
                running = select(Batch.id).where(Batch.finished_at.is_(None), Batch.queued > 0)
                batch_id = self._rng.choice(session.scalars(running.order_by(Batch.id)).all())
            if not self.db.write(orders.pause_batch, batch_id):
                raise NothingToStrike
            since = self._now()
        except (SQLAlchemyError, IndexError):
            raise NothingToStrike from None
        until: list[datetime] = []

        def resume() -> None:
            if "server" in self._busy:
                raise NotYet  # only we can mend it
            try:
                until.append(self._now())
                self.db.write(orders.resume_batch, batch_id)
            except SQLAlchemyError:
                raise NotYet from None
            self.pauses.append(Pause(batch_id=batch_id, since=since, until=until[0]))

        return Struck(target=batch_id, seconds=self._outage(), mend=resume)

    def _now(self) -> datetime:
        with self.db.reading() as session:
            return database.now(session)

    def _stop_child(self) -> Struck:
        """The zombie: it sleeps until its lease is over, then goes on as if nothing had been."""
        name, child = self._child()
        _send(child, signal.SIGSTOP)
        return Struck(
            target=name,
            workers=(name,),
            seconds=self._past_lease(),
            mend=lambda: _send(child, signal.SIGCONT, may_be_gone=True),
        )

    def _stop_host(self) -> Struck:
        host = self._rng.choice(self._live_hosts())
        names = tuple(host.render_parents())
        family = host.launcher.family()
        for process in family:
            _send(process, signal.SIGSTOP, may_be_gone=True)

        def wake() -> None:
            for process in family:
                _send(process, signal.SIGCONT, may_be_gone=True)

        return Struck(target=host.name, workers=names, seconds=self._past_lease(), mend=wake)

    def _past_lease(self) -> float:
        return self.farm.plan.lease_seconds * self._rng.uniform(1.2, 1.5)

    # Servers and what leads to them

    def _outage(self) -> float:
        return self._rng.uniform(*self.outage_seconds)

    def _flush_redis(self) -> Struck:
        with redis.Redis.from_url(self.farm.redis.url) as client:
            client.flushall()
        return Struck(target="redis")

    def _send_strange(self) -> Struck:
        """Somebody has got into Redis: pickled code, and what is no message at all."""
        queue = queues.of_model(queues.SIMULATED)
        stranger = Celery(broker=self.farm.redis.url, set_as_current=False)
        bomb = Bomb(self.farm.folder / BOMB_MARK)
        try:
            for body in (["1; DROP TABLE jobs"], [], [{"id": 1}], [-1]):
                stranger.send_task(celery_app.RENDER_TASK, args=body, queue=queue, retry=False)
            stranger.send_task(
                celery_app.RENDER_TASK, args=[bomb], queue=queue, serializer="pickle", retry=False
            )
            stranger.send_task("os.system", args=["true"], queue=queue, retry=False)
            with redis.Redis.from_url(self.farm.redis.url) as client:
                client.lpush(queue, b"\xff no message")
        except (redis.RedisError, OSError, kombu.exceptions.OperationalError):
            raise NothingToStrike from None  # Redis is away
        finally:
            stranger.close()
        # The process that takes the last one ends, and is started again.
        workers = tuple(name for host in self.farm.hosts for name in host.render_parents())
        return Struck(target=queue, workers=workers)

    def _lose_redis(self) -> Struck:
        self.farm.redis.kill()
        return Struck(
            target="redis",
            seconds=self._outage(),
            mend=lambda: self.farm.restart_redis(empty=True),
        )

    def _restart_redis(self) -> Struck:
        self.farm.redis.kill()
        return Struck(
            target="redis",
            seconds=self._outage(),
            mend=lambda: self.farm.restart_redis(empty=False),
        )

    def _stop_redis(self) -> Struck:
        process = psutil.Process(self.farm.redis.pid)
        process.suspend()
        return Struck(target="redis", seconds=self._outage(), mend=process.resume)

    def _restart_postgres(self) -> Struck:
        server = self.farm.postgres
        if server is None:
            raise NothingToStrike("no server: the database is SQLite")
        server.stop()
        return Struck(target="postgresql", seconds=self._outage(), mend=server.start_again)

    def _end_backends(self) -> Struck:
        if self.farm.postgres is None:
            raise NothingToStrike("no server: the database is SQLite")
        with psycopg.connect(self.farm.postgres.url("postgres"), autocommit=True) as admin:
            ended = admin.execute(
                "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                "WHERE datname = 'chaos'"
            ).fetchone()
        return Struck(target=f"{ended[0] if ended else 0} connections")

    def _stop_postgres(self) -> Struck:
        """Longer than leases last: nobody could renew one, and nobody is to lose one."""
        if self.farm.postgres is None:
            raise NothingToStrike("no server: the database is SQLite")
        family = [self.farm.postgres.process]
        family += family[0].children(recursive=True)
        for process in family:
            _send(process, signal.SIGSTOP, may_be_gone=True)

        def wake() -> None:
            for process in family:
                _send(process, signal.SIGCONT, may_be_gone=True)

        return Struck(target="postgresql", seconds=self._past_lease(), mend=wake)

    def _cut_redis(self) -> Struck:
        """As a proxy's time limit does it: the server is there all the time."""
        self._proxy("redis").cut()
        return Struck(target="redis")

    def _forget(self, name: str) -> Struck:
        self._proxy(name).forget()
        return Struck(target=name)

    def _proxy(self, name: str) -> Proxy:
        proxies: dict[str, Proxy | None] = {
            "redis": self.farm.redis_proxy,
            "postgres": self.farm.postgres_proxy,
            "store": self.farm.s3_proxy,
        }
        proxy = proxies[name]
        if proxy is None:
            raise NothingToStrike("no server: the database is SQLite")
        return proxy

    def _network(self, name: str, fault: Fault) -> Struck:
        proxy = self._proxy(name)
        proxy.fault = fault

        def mend() -> None:
            proxy.fault = Fault.NONE

        return Struck(target=name, seconds=self._outage(), mend=mend)

    def _away_over_restart(self) -> Struck:
        """Finished videos pile up, and the processes that know of them end."""
        if "host" in self._busy:
            raise NothingToStrike
        host = self._rng.choice(self._live_hosts())
        names = tuple(host.render_parents())
        away = self._network("store", Fault.BUSY)
        os.kill(host.launcher.pid, signal.SIGTERM)
        return Struck(
            target=host.name,
            workers=names,
            seconds=LONG_OUTAGES * away.seconds + RESTART_SECONDS[1],
            mend=away.mend,
            restart=lambda: _start_again(host.launcher),
        )

    def _fill_disk(self) -> Struck:
        hosts = [host for host in self.farm.hosts if host.is_small_disk]
        if not hosts:
            raise NothingToStrike("no right to mount a small disk here")
        host = self._rng.choice(hosts)
        filler = host.scratch / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 20))

        names = tuple(host.render_parents())
        mend = lambda: filler.unlink(missing_ok=True)  # noqa: E731
        return Struck(target=host.name, workers=names, seconds=self._outage(), mend=mend)


def _start_again(process: farms.Process) -> None:
    assert process.process is not None
    process.process.wait(END_SECONDS)
    process.start()


def _send(process: psutil.Process, number: signal.Signals, *, may_be_gone: bool = False) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        if not may_be_gone:
            raise NothingToStrike from None
