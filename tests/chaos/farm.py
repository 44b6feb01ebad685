"""A farm on one machine that stands for several: each part a process that can be struck alone.

Hosts have their own name, scratch disk and clock; everything goes through proxies.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import psycopg

from jobs import database, migrate, servers, settings
from tests.chaos.cables import Cables, laid
from tests.chaos.proxy import HttpProxy, Network, Proxy
from tests.conftest import DURABLE, PostgresServer

REPOSITORY = Path(__file__).resolve().parents[2]
DATABASE_PASSWORD = "chaos-database-password"  # noqa: S105  # of a server that lives for minutes
SCRATCH_BYTES = 96 << 20  # a worker takes no jobs with less than 64 MiB free
STOP_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How large the farm is and how fast its clocks tick."""

    hosts: int = 2
    workers_per_host: int = 4
    dispatchers: int = 2
    step_seconds: float = 0.1
    lease_seconds: float = 50.0
    heartbeat_seconds: float = 10.0
    publish_lease_seconds: float = 600.0
    stall_seconds: float = 60.0
    tick_seconds: float = 2.0
    max_crashes: int = 6
    retry_seconds: float = 1.0
    skew_seconds: float = 300.0
    on_sqlite: bool = False


@dataclass
class Process:
    """One of ours, started again by hand: systemd, in a word."""

    name: str
    command: list[str]
    environment: dict[str, str]
    log: Path
    within: list[str] = field(default_factory=list)
    """What the command begins with, to run in a namespace."""
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                # To enter a namespace would break the tie.
                [*self.within, *servers.tied_to_parent(signal.SIGKILL), *self.command],
                env=self.environment,
                cwd=self.log.parent,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def is_alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def family(self) -> list[psutil.Process]:
        """It and all that it started."""
        with contextlib.suppress(psutil.NoSuchProcess):
            here = psutil.Process(self.pid)
            return [here, *here.children(recursive=True)]
        return []


@dataclass
class Host:
    """A launcher, its processes and its disk."""

    name: str
    launcher: Process
    scratch: Path
    is_small_disk: bool

    def render_parents(self) -> dict[str, psutil.Process]:
        """Worker name -> Celery's parent process."""
        found = {}
        for process in self.launcher.family():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                words = process.cmdline()
                if "--hostname" in words and "--pool=prefork" in words:
                    found[words[words.index("--hostname") + 1]] = process
        return found

    def publisher(self) -> psutil.Process | None:
        for process in self.launcher.family():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if "--pool=threads" in process.cmdline():
                    return process
        return None


def rendering_child(parent: psutil.Process) -> psutil.Process | None:
    """The process that owns the device."""
    with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
        for child in parent.children():
            if any("spawn_main" in word for word in child.cmdline()):
                return child
    return None


@dataclass
class Farm:
    """All of it. Start with `running`."""

    plan: Plan
    folder: Path
    network: Network
    postgres: PostgresServer | None
    redis: servers.RedisServer
    s3: servers.S3Server
    postgres_proxy: Proxy | None
    redis_proxy: Proxy
    s3_proxy: HttpProxy
    environment: dict[str, str]
    hosts: list[Host] = field(default_factory=list)
    dispatchers: list[Process] = field(default_factory=list)
    cables: Cables | None = None

    @property
    def bad_devices(self) -> Path:
        """Says which simulated devices are broken."""
        return self.folder / "bad-devices"

    @property
    def secrets(self) -> dict[str, str]:
        """What no log may ever show."""
        return {
            "database password": DATABASE_PASSWORD,
            "redis password": self.redis.url.rpartition("@")[0].rpartition(":")[2],
            "s3 secret key": self.s3.secret_access_key,
        }

    @property
    def config(self) -> settings.Settings:
        """For clients: people submit and look through the same network."""
        return settings.Settings(**self.environment)  # type: ignore[arg-type]  # checked by pydantic

    def direct_database(self) -> database.Database:
        """For those who judge: past the network."""
        if self.postgres is None:
            return database.Database(self.environment["DATABASE_URL"])
        return database.Database(settings.sqlalchemy_url(self.postgres.url("chaos")))

    def logs(self) -> list[Path]:
        return sorted(self.folder.glob("*.log"))

    def restart_redis(self, *, empty: bool) -> None:
        """Kill it and start it on the same port, with or without what it had written."""
        self.redis.kill()
        if empty:
            shutil.rmtree(self.redis.folder / "appendonlydir", ignore_errors=True)
        self.redis = servers.RedisServer.start(self.redis.folder, port=self.redis.port)

    def start_failed(self) -> None:
        """As systemd does: what ended with an error, such as for a database away at its start."""
        for process in [host.launcher for host in self.hosts] + self.dispatchers:
            if process.process is not None and (process.process.poll() or 0) > 0:
                process.start()

    def stop(self) -> dict[str, int | None]:
        """SIGTERM to all, as at a shutdown; exit status per process."""
        processes = [host.launcher for host in self.hosts] + self.dispatchers
        for process in processes:
            if process.is_alive:
                os.kill(process.pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_SECONDS
        status: dict[str, int | None] = {}
        for process in processes:
            if process.process is None:
                continue
            family = process.family()
            try:
                status[process.name] = process.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                status[process.name] = None
            for left in family:
                with contextlib.suppress(psutil.NoSuchProcess):
                    left.kill()
            process.process.wait(5)
        return status


@contextlib.contextmanager
def running(plan: Plan, folder: Path, *, on_cables: bool = False) -> Iterator[Farm]:
    """Servers, tables, dispatchers and hosts; all of it is gone at the end.

    `on_cables`: each host in a network namespace of its own.
    """
    with contextlib.ExitStack() as stack:
        network = Network()
        stack.callback(network.close)
        farm = _start_servers(plan, folder, network, stack)
        _make_tables(farm)
        stack.callback(farm.stop)
        for number in range(plan.dispatchers):
            farm.dispatchers.append(_dispatcher(farm, number))
        for number in range(plan.hosts):
            farm.hosts.append(_host(farm, number, stack))
        if on_cables:
            farm.cables = stack.enter_context(laid(plan.hosts))
            _plug_in(farm, farm.cables)
        for process in [*farm.dispatchers, *(host.launcher for host in farm.hosts)]:
            process.start()
        yield farm


def _start_servers(plan: Plan, folder: Path, network: Network, stack: contextlib.ExitStack) -> Farm:
    redis = servers.RedisServer.start(folder / "redis")
    s3 = servers.S3Server.start(folder / "s3")
    stack.callback(s3.stop)
    redis_proxy, s3_proxy = Proxy(network, redis.port), HttpProxy(network, s3.port)
    postgres = postgres_proxy = None
    database_url = f"sqlite:///{folder / 'rushes.db'}"
    if not plan.on_sqlite:
        # Short, because a socket's path has some 100 characters at most.
        place = Path(tempfile.mkdtemp(prefix="rushes-chaos-", dir="/tmp"))
        stack.callback(shutil.rmtree, place, ignore_errors=True)
        postgres = PostgresServer(place, options=DURABLE)
        postgres.start()
        stack.callback(postgres.stop)
        with psycopg.connect(postgres.url("postgres"), autocommit=True) as admin:
            admin.execute("CREATE DATABASE chaos")
        postgres_proxy = Proxy(network, postgres.socket)
        database_url = (
            f"postgresql+psycopg://postgres:{DATABASE_PASSWORD}@127.0.0.1:{postgres_proxy.port}"
            "/chaos?sslmode=disable&gssencmode=disable"
        )
    through = f"http://127.0.0.1:{s3_proxy.port}"
    environment = {
        **s3.environment(),
        "AWS_ENDPOINT_URL_S3": through,
        "S3_PUBLIC_ENDPOINT_URL": through,
        "DATABASE_URL": database_url,
        "CELERY_BROKER_URL": redis.url.replace(f":{redis.port}/", f":{redis_proxy.port}/"),
        "RUSHES_HOME": str(folder / "home"),
    }
    farm = Farm(
        plan=plan,
        folder=folder,
        network=network,
        postgres=postgres,
        redis=redis,
        s3=s3,
        postgres_proxy=postgres_proxy,
        redis_proxy=redis_proxy,
        s3_proxy=s3_proxy,
        environment=environment,
    )
    stack.callback(lambda: farm.redis.stop())  # the one at the end
    return farm


def _make_tables(farm: Farm) -> None:
    db = farm.direct_database()
    migrate.upgrade(db)
    db.close()


def _environment(farm: Farm, *, home: Path, skew_seconds: float) -> dict[str, str]:
    plan = farm.plan
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    path = [str(REPOSITORY)]
    if skew_seconds:
        path.insert(0, str(Path(__file__).parent / "skewed"))
        kept["RUSHES_CHAOS_SKEW_SECONDS"] = str(skew_seconds)
    return (
        kept
        | farm.environment
        | {
            "PYTHONPATH": os.pathsep.join(path),
            "RUSHES_HOME": str(home),
            "RUSHES_LEASE_SECONDS": str(plan.lease_seconds),
            "RUSHES_HEARTBEAT_SECONDS": str(plan.heartbeat_seconds),
            "RUSHES_PUBLISH_LEASE_SECONDS": str(plan.publish_lease_seconds),
            "RUSHES_STALL_SECONDS": str(plan.stall_seconds),
            "RUSHES_TICK_SECONDS": str(plan.tick_seconds),
            "RUSHES_MAX_CRASHES": str(plan.max_crashes),
            "RUSHES_RETRY_SECONDS": str(plan.retry_seconds),
            "RUSHES_SIM_STEP_SECONDS": str(plan.step_seconds),
            "RUSHES_SIM_BAD_DEVICES": str(farm.bad_devices),
            "RUSHES_GRACE_SECONDS": "2",
            "RUSHES_LOG_FORMAT": "json",
            "LOG_LEVEL": "DEBUG",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
        }
    )


def _dispatcher(farm: Farm, number: int) -> Process:
    """The second one's clock is slow."""
    name = f"dispatcher{number}"
    skew = -farm.plan.skew_seconds if number else 0.0
    return Process(
        name=name,
        command=[sys.executable, "-m", "jobs", "dispatcher"],
        environment=_environment(farm, home=farm.folder / name, skew_seconds=skew),
        log=farm.folder / f"{name}.log",
    )


def _host(farm: Farm, number: int, stack: contextlib.ExitStack) -> Host:
    """The second one's clock is fast, and its scratch disk is small where we may make such."""
    name = f"host{number}"
    home = farm.folder / name
    scratch = home / "scratch"
    scratch.mkdir(parents=True)
    is_small = bool(number) and _mount(scratch)
    if is_small:
        stack.callback(_unmount, scratch)
    skew = farm.plan.skew_seconds if number else 0.0
    environment = _environment(farm, home=home, skew_seconds=skew) | {
        "RUSHES_HOST": name,
        "RUSHES_SCRATCH_DIR": str(scratch),
    }
    devices = f"sim:{farm.plan.workers_per_host}"
    launcher = Process(
        name=name,
        command=[sys.executable, "-m", "jobs", "worker", "--devices", devices],
        environment=environment,
        log=farm.folder / f"{name}.log",
    )
    return Host(name=name, launcher=launcher, scratch=scratch, is_small_disk=is_small)


def _plug_in(farm: Farm, cables: Cables) -> None:
    """Hosts reach the servers through their cables, past the proxies of this machine."""
    assert farm.postgres_proxy is not None
    ports = [farm.postgres_proxy.port, farm.redis_proxy.port, farm.s3_proxy.port]
    doors = {port: cables.proxy(farm.network, port).port for port in ports}
    for number, host in enumerate(farm.hosts):
        host.launcher.within = cables.hosts[number].enter
        for name, value in host.launcher.environment.items():
            for port, door in doors.items():
                there = f"{cables.address_for(number)}:{door}"
                value = value.replace(f"127.0.0.1:{port}", there)
            host.launcher.environment[name] = value


def _mount(folder: Path) -> bool:
    """A disk that can be filled without harm. False: we may not make one."""
    options = f"size={SCRATCH_BYTES}"
    command = ["mount", "-t", "tmpfs", "-o", options, "rushes-chaos", str(folder)]
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)
