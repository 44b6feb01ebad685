"""Runs the service, and refuses what would leave it open to the network."""

import contextlib
import errno
import socket
from collections.abc import Callable

import structlog
import uvicorn
from sqlalchemy.exc import DBAPIError

from jobs import broker, database, direct, errors, presets, settings, tokens
from jobs.web import app
from jobs.web.service import Service, names

log = structlog.get_logger()

BACKLOG = 2048  # as uvicorn has it
STOP_SECONDS = 10  # event streams do not end by themselves
KEEP_ALIVE_SECONDS = 130
"""How long a connection may be idle: longer than proxies keep theirs (nginx and AWS 60, Caddy 120).

Who ends it first decides: what a proxy sends at the moment when we end it is lost, and no proxy
sends a POST twice. A stop ends idle connections at once.
"""


class Refused(errors.RushesError):
    """The service would be open to everybody."""

    exit_code = 2


def run(config: settings.Settings, *, say: Callable[[str], None]) -> None:
    """Until SIGTERM or SIGINT."""
    db = database.connect(config)
    serving = make_service(config, db)
    address = address_of(config)
    listening = _listen(config)
    say(f"web       {address}" + (" (with tokens)" if serving.needs_token else ""))
    server = uvicorn.Server(uvicorn_config(serving))
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
        forwarded_allow_ips=serving.config.forwarded_allow_ips,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=STOP_SECONDS,
    )


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
