"""Runs the service, and refuses what would leave it open to the network."""

import ipaddress
from collections.abc import Callable

import structlog
import uvicorn

from jobs import database, errors, settings, tokens
from jobs.web import app
from jobs.web.service import Service, names

log = structlog.get_logger()

LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "::1"})
STOP_SECONDS = 10  # event streams do not end by themselves


class Refused(errors.RushesError):
    """The service would be open to everybody."""

    exit_code = 2


def run(config: settings.Settings, *, say: Callable[[str], None]) -> None:
    """Until SIGTERM or SIGINT."""
    db = database.connect(config)
    serving = make_service(config, db)
    address = address_of(config)
    say(f"web       {address}" + (" (with tokens)" if serving.needs_token else ""))
    uvicorn.run(
        app.make(serving),
        host=config.web_host,
        port=config.web_port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=STOP_SECONDS,
    )
    db.close()


def make_service(config: settings.Settings, db: database.Database) -> Service:
    """On loopback one person needs no token; elsewhere everybody does. Refused without any."""
    is_local = is_loopback(config.web_host)
    needs_token = config.web_require_token or not is_local
    if needs_token:
        with db.reading() as session:
            if not tokens.any_valid(session):
                raise Refused(
                    f"{config.web_host} is reached by others, and there is no token: make one with "
                    "`rushes token create NAME`, or listen on 127.0.0.1"
                    if not is_local
                    else "RUSHES_WEB_REQUIRE_TOKEN is set, and there is no token: make one with "
                    "`rushes token create NAME`"
                )
    allowed = names(config.web_names)
    host_names = None if needs_token and not allowed else LOOPBACK_NAMES | allowed
    serving = Service(config=config, db=db, needs_token=needs_token, host_names=host_names)
    _ = serving.prompt_check  # one that cannot be loaded is told now
    return serving


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def address_of(config: settings.Settings) -> str:
    host = f"[{config.web_host}]" if ":" in config.web_host else config.web_host
    return f"http://{host}:{config.web_port}"
