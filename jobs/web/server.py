"""Runs the service, and refuses what would leave it open to the network."""

import asyncio
import contextlib
import errno
import resource
import socket
import time
from collections.abc import Callable
from typing import Any

import structlog
import uvicorn
from sqlalchemy.exc import DBAPIError

from jobs import broker, database, direct, errors, presets, settings, tokens
from jobs.web import app
from jobs.web.service import Service, names

log = structlog.get_logger()

BACKLOG = 2048  # connections that wait for us, as uvicorn has it
ACCEPTS = 100  # of them at once, as asyncio has it: so often it tries, too, when it is out of files
STOP_SECONDS = 10  # event streams do not end by themselves
KEEP_ALIVE_SECONDS = 130
"""How long a connection may be idle: longer than proxies keep theirs (nginx and AWS 60, Caddy 120).

Who ends it first decides: what a proxy sends at the moment when we end it is lost, and no proxy
sends a POST twice. A stop ends idle connections at once.
"""
MOST_FILES = 65_536  # a connection is one, of some 20 kB of memory
OUT_OF_FILES = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
ROOM_SECONDS = 0.5  # until requests that are on their way are read
TELL_SECONDS = 60.0


class Refused(errors.RushesError):
    """The service would be open to everybody."""

    exit_code = 2


def run(config: settings.Settings, *, say: Callable[[str], None]) -> None:
    """Until SIGTERM or SIGINT."""
    db = database.connect(config)
    serving = make_service(config, db)
    address = address_of(config)
    listening = _listen(config)
    allow_many_files()
    say(f"web       {address}" + (" (with tokens)" if serving.needs_token else ""))
    server = Server(uvicorn_config(serving))
    with contextlib.suppress(KeyboardInterrupt):  # told again, after all has ended
        server.run(sockets=listening)
    for each in (db, serving.checked_db):
        each.close()
    if not server.started:
        raise errors.RushesError("the service did not start: the lines above say why")


def uvicorn_config(serving: Service) -> uvicorn.Config:
    """How it speaks HTTP, wherever it listens."""
    return uvicorn.Config(
        app.make(serving),
        log_config=None,
        access_log=False,
        server_header=False,
        backlog=ACCEPTS,
        forwarded_allow_ips=serving.config.forwarded_allow_ips,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )


class Server(uvicorn.Server):
    """Out of files for one more connection, it ends those that are idle."""

    _makes_room = False
    _told_at = float("-inf")

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        asyncio.get_running_loop().set_exception_handler(self._on_problem)
        await super().startup(sockets)
        for each in sockets or []:
            each.listen(BACKLOG)  # asyncio knows one number for both

    def _on_problem(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if "socket" not in context or getattr(error, "errno", None) not in OUT_OF_FILES:
            loop.default_exception_handler(context)
        elif not self._makes_room:  # asyncio tells it ACCEPTS times, then tries in a second again
            self._makes_room = True
            loop.call_later(ROOM_SECONDS, self._make_room)
            if time.monotonic() - self._told_at >= TELL_SECONDS:
                self._told_at = time.monotonic()
                log.warning("web.out_of_files", error=str(error))

    def _make_room(self) -> None:
        self._makes_room = False
        for connection in list(self.server_state.connections):
            connection.shutdown()  # one with a request ends after its answer


def allow_many_files() -> None:
    """Every connection is a file, and most systems begin with 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(ValueError, OSError):  # macOS says "infinity" and has a limit
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _listen(config: settings.Settings) -> list[socket.socket]:
    """At every address of the host's name; RushesError when another one has the port."""
    host, port = config.web_host, config.web_port
    listening: list[socket.socket] = []
    why = "no such name"
    with contextlib.ExitStack() as failed:
        with contextlib.suppress(socket.gaierror, UnicodeError):
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
            for family, kind, protocol, _, address in dict.fromkeys(found):
                try:
                    one = failed.enter_context(socket.socket(family, kind, protocol))
                    one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    if family == socket.AF_INET6:
                        one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                    one.bind(address)
                    one.listen(BACKLOG)  # until then another one could bind it too
                except OSError as error:
                    why = error.strerror or str(error)
                    if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                        continue  # localhost may have a name of IPv6 on a machine without it
                    listening.clear()
                    break
                listening.append(one)
        if not listening:
            raise errors.RushesError(
                f"cannot listen at {address_of(config)}: {why}; give another --port or --host"
            )
        failed.pop_all()
    return listening


def make_service(config: settings.Settings, db: database.Database) -> Service:
    """On loopback one person needs no token; elsewhere everybody does. Refused without any."""
    _check(config, db)
    needs_token = tokens.are_needed(config)
    if needs_token and not _may_have_token(db):
        raise Refused(tokens.none_there(config))
    allowed = names(config.web_names)
    host_names = None if needs_token and not allowed else direct.LOOPBACK | allowed
    serving = Service(config=config, db=db, needs_token=needs_token, host_names=host_names)
    # What cannot be loaded or opened is told now, and not to the first who asks.
    _ = serving.prompt_check, serving.store, serving.limiter
    return serving


def _check(config: settings.Settings, db: database.Database) -> None:
    """InvalidInput for a setting that every request would suffer from. Nothing is asked."""
    broker.Broker(config)
    _ = db.engine
    problems = presets.problems_of(config.default_presets, folder=config.presets_dir)
    if problems := [*settings.problems_of_proxies(config.forwarded_allow_ips), *problems]:
        raise errors.InvalidInput("settings", problems)


def _may_have_token(db: database.Database) -> bool:
    """True also where the database is away: nobody is let in by a token that it does not know."""
    try:
        with db.reading() as session:
            return tokens.any_valid(session)
    except DBAPIError as error:
        if not database.is_away(error):
            raise
        log.warning("database.awaited", error=str(error.orig)[:300])
        return True


def address_of(config: settings.Settings) -> str:
    host = f"[{config.web_host}]" if ":" in config.web_host else config.web_host
    return f"http://{host}:{config.web_port}"
