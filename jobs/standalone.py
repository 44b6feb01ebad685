"""`rushes up`: everything on this machine, without Docker and without root, until Ctrl-C."""

import contextlib
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import psutil
import structlog
from pydantic import SecretStr
from sqlalchemy.exc import DBAPIError

from jobs import database, errors, migrate, parts, queries, servers, settings, supervisor, tokens

log = structlog.get_logger()

LOOK_SECONDS = 0.5
WORKER_SECONDS = 30.0  # until it is said to be ready, whether or not a worker is there
ADDRESSES = frozenset(
    {
        "database_url",
        "broker_url",
        "results_url",
        "s3_endpoint_url",
        "s3_public_endpoint_url",
        "s3_addressing_style",
        "aws_region",
        "models_dir",
        "presets_dir",
    }
)
"""Settings that say where things are; the store's come together or not at all, without keys."""
TINY_MODELS = ("tiny", "tiny_i2v")
LAUNCHER_SPARE_SECONDS = 60.0  # beyond the grace that it gives its own children
LOCK = "up.lock"  # in RUSHES_HOME; held while `rushes up` runs
DEFAULT_HOME: Path = settings.Settings.model_fields["home"].default
EXAMPLE = "examples/prompts.jsonl"

S = TypeVar("S", bound=servers.LocalServer)


@dataclass
class KeptServer:
    """A server of ours that is started again, on its port, when it ends by itself."""

    server: servers.LocalServer
    start: Callable[..., servers.LocalServer]
    _pauses: supervisor.Pauses = field(default_factory=supervisor.Pauses)

    def revive(self) -> None:
        """Call this often."""
        if self.server.is_alive():
            return
        name = self.server.name
        if not self._pauses.is_pausing:
            log.error("server.ended", name=name, again_in_seconds=self._pauses.ended())
        elif self._pauses.is_over:
            self._pauses.started()
            try:
                self.server = self.start(port=self.server.port)
            except (servers.ServerError, OSError) as error:
                seconds = self._pauses.ended()
                log.error(
                    "server.not_started", name=name, error=str(error), again_in_seconds=seconds
                )
            else:
                log.warning("server.restarted", name=name, port=self.server.port)

    def stop(self) -> None:
        self.server.stop()


@dataclass(frozen=True, kw_only=True)
class Farm:
    """What runs now, and the settings that lead to it."""

    config: settings.Settings
    children: tuple[supervisor.Child, ...]
    local_servers: tuple[servers.LocalServer, ...]
    """As they were started first; a restart changes neither their ports nor their folders."""
    kept_servers: tuple[KeptServer, ...] = ()


def up(config: settings.Settings, *, devices: str = "auto", say: Callable[[str], None]) -> int:
    """Run until SIGINT or SIGTERM; the second one ends it without grace."""
    stop, hurry = threading.Event(), threading.Event()

    def on_signal(_number: int, _frame: object) -> None:
        if stop.is_set():
            hurry.set()
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, on_signal)
    parts.DEVICE_SLOTS.load()(devices, cores=1)  # told here, not in the worker's log
    with running(config, devices=devices, hurry=hurry, say=say, with_web=True) as farm:
        say(f"results   {farm.config.results_url}")
        say(f"logs      {farm.config.home / 'logs'}")
        _await_workers(farm, stop)
        if not stop.is_set():
            say(_ready(farm.config.home))
        watch(farm, stop)
        say("stopping: workers may finish their job; Ctrl-C again to stop at once")
    return 0


def _ready(home: Path) -> str:
    here = "in this folder" if home == DEFAULT_HOME.absolute() else f"with RUSHES_HOME={home}"
    file = EXAMPLE if Path(EXAMPLE).is_file() else "FILE"
    return f"ready: in another terminal, {here}: `rushes submit {file} --preset tiny`"


@contextmanager
def running(
    config: settings.Settings,
    *,
    devices: str,
    hurry: threading.Event | None = None,
    say: Callable[[str], None],
    with_web: bool = False,
) -> Iterator[Farm]:
    """Start servers, tables, dispatcher and workers; stop them again, in the other order."""
    with ExitStack() as stack:
        refusal = f"`rushes up` already runs in {config.home}; stop it first, or set RUSHES_HOME"
        stack.enter_context(supervisor.only_one(config.home / LOCK, refusal))
        parts.RENDERING_SETTINGS.load()()  # a bad value is told here, not in the worker's log
        environment, kept_servers = _start_servers(config, stack, say)
        _write_up_file(config.home, _own_addresses(config) | environment)
        stack.callback((config.home / settings.UP_FILE).unlink, missing_ok=True)
        here = settings.load(home=str(config.home))
        db = database.connect(here)
        stack.callback(db.close)
        before, after = migrate.upgrade(db)
        if before != after:
            say(f"database  {database.shown(db.url)} migrated to {after}")
        place_tiny_models(here, say)
        children = _children(here, devices, environment)
        if with_web:
            port = _web_port(here)
            served = {"RUSHES_WEB_HOST": here.web_host, "RUSHES_WEB_PORT": str(port)}
            _write_up_file(config.home, _own_addresses(config) | environment | served)
            children = (*children, _web(here, port, environment))
            say(f"web       {_web_place(here, db, port)}")
        for child in children:
            child.start()
            stack.callback(_stop_child, child, here.grace_seconds, hurry or threading.Event())
        yield Farm(
            config=here,
            children=children,
            local_servers=tuple(kept.server for kept in kept_servers),
            kept_servers=kept_servers,
        )


def watch(farm: Farm, stop: threading.Event) -> None:
    """Start again what ends by itself."""
    while not stop.wait(LOOK_SECONDS):
        _revive(farm)


def _revive(farm: Farm) -> None:
    for kept in farm.kept_servers:
        kept.revive()
    for child in farm.children:
        child.revive()


def _await_workers(farm: Farm, stop: threading.Event) -> None:
    """Until somebody takes jobs: a submit would say that nobody does. Not for ever, for a GPU."""
    deadline = time.monotonic() + WORKER_SECONDS
    with contextlib.closing(database.connect(farm.config)) as db:
        while time.monotonic() < deadline:
            with contextlib.suppress(DBAPIError), db.reading() as session:
                if queries.live_workers_by_queue(session):
                    return
            if stop.wait(LOOK_SECONDS):
                return
            _revive(farm)


def place_tiny_models(
    config: settings.Settings, say: Callable[[str], None], names: Iterable[str] = TINY_MODELS
) -> None:
    """The demo's models, copied from the package where there is nothing of these names."""
    copy = parts.COPY_TINY_MODEL.load()
    for name in names:
        folder = config.models_dir / name
        try:
            is_new = copy(name, folder)
        except OSError as error:
            raise errors.RushesError(f"{folder} could not be written: {error}") from error
        if is_new:
            say(f"model     {name}, trained, copied to {folder}")


def _start_servers(
    config: settings.Settings, stack: ExitStack, say: Callable[[str], None]
) -> tuple[dict[str, str], tuple[KeptServer, ...]]:
    """What the environment does not name already, we start ourselves."""
    environment: dict[str, str] = {}
    kept: list[KeptServer] = []

    def keep(start: Callable[..., S]) -> S:
        server = start()
        kept.append(KeptServer(server, start))
        stack.callback(kept[-1].stop)
        return server

    given = settings.given_names()
    if given.isdisjoint(("CELERY_BROKER_URL", "REDIS_URL")):
        redis = keep(functools.partial(servers.RedisServer.start, config.home / "redis"))
        environment |= redis.environment()
        say(f"redis     127.0.0.1:{redis.port}")
    if "RUSHES_RESULTS_URL" not in given:
        store = keep(functools.partial(servers.S3Server.start, config.home / "s3"))
        environment |= store.environment()
        say(f"s3        {store.endpoint_url}, files in {store.bucket_folder}")
    return environment, tuple(kept)


def _children(
    config: settings.Settings, devices: str, environment: Mapping[str, str]
) -> tuple[supervisor.Child, ...]:
    logs = config.home / "logs"
    rushes = [sys.executable, "-m", "jobs"]
    common = {**environment, "RUSHES_HOME": str(config.home)}
    return (
        supervisor.Child(
            name="dispatcher",
            command=[*rushes, "dispatcher"],
            environment=common,
            log_path=logs / "dispatcher.log",
        ),
        supervisor.Child(
            name="notifier",
            command=[*rushes, "notify", "run"],
            environment=common,
            log_path=logs / "notifier.log",
        ),
        supervisor.Child(
            name="worker",
            command=[*rushes, "worker", "--devices", devices],
            environment=common,
            log_path=logs / "worker.log",
        ),
    )


def _web(config: settings.Settings, port: int, environment: Mapping[str, str]) -> supervisor.Child:
    return supervisor.Child(
        name="web",
        command=[sys.executable, "-m", "jobs", "web", "--port", str(port)],
        environment=_default_presets() | {**environment, "RUSHES_HOME": str(config.home)},
        log_path=config.home / "logs" / "web.log",
    )


def _web_place(config: settings.Settings, db: database.Database, port: int) -> str:
    """Its address, or what it waits for: without tokens it ends, and is started again and again."""
    address = f"http://{config.web_host}:{port}"
    with db.reading() as session:
        if not tokens.are_needed(config) or tokens.any_valid(session):
            return address
    why = tokens.none_there(config)
    return f"not served yet: {why}; within a minute of that it is at {address}"


def _web_port(config: settings.Settings) -> int:
    """The usual one, or another when somebody listens there already."""
    for port in (config.web_port, 0):
        with contextlib.closing(socket.socket()) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((config.web_host, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise errors.RushesError(
        f"the web service cannot listen on {config.web_host}: correct RUSHES_WEB_HOST"
    )


def _default_presets() -> dict[str, str]:
    """The models that are there for certain, unless somebody said which ones to take."""
    given = settings.given_names()
    tiny = {"RUSHES_DEFAULT_PRESET": "tiny", "RUSHES_DEFAULT_IMAGE_PRESET": "tiny_i2v"}
    return {name: preset for name, preset in tiny.items() if name not in given}


def _stop_child(child: supervisor.Child, grace_seconds: float, hurry: threading.Event) -> None:
    child.send(signal.SIGTERM)
    deadline = time.monotonic() + grace_seconds + LAUNCHER_SPARE_SECONDS
    while not child.wait(LOOK_SECONDS) and time.monotonic() < deadline:
        if hurry.is_set():
            # At each look: of two that come at once, a process sees only one.
            child.send(signal.SIGTERM)
    child.kill()


def _own_addresses(config: settings.Settings) -> dict[str, str]:
    """What our environment names: other terminals need not name it again."""
    given = settings.given_names()
    if "RUSHES_RESULTS_URL" not in given:
        given -= set(settings.RESULTS_NAMES)
    found: dict[str, str] = {}
    for setting, names in settings.environment_names().items():
        value = getattr(config, setting)
        if setting not in ADDRESSES or given.isdisjoint(names) or value is None:
            continue
        found[names[0]] = value.get_secret_value() if isinstance(value, SecretStr) else str(value)
    return found


def _write_up_file(home: Path, environment: Mapping[str, str]) -> None:
    """How other commands in this folder find us. Readable by this user only: it holds keys."""
    state = {
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "environment": dict(environment),
    }
    part = home / f"{settings.UP_FILE}.part"
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(state, file, indent=2)
    part.rename(home / settings.UP_FILE)
