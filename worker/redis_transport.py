"""Celery's way to Redis, for which a message that is none of ours is not the end of the process."""

import base64
import functools
import json
import queue as queues
from typing import Any

import kombu.transport
import structlog
from kombu.transport import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as ConnectionLost
from redis.retry import Retry

from jobs import broker, celery_app, settings

log = structlog.get_logger()

OURS = "rushes."  # how the names of our queues begin
TASKS = (celery_app.RENDER_TASK, celery_app.PUBLISH_TASK)
SHOWN_CHARS = 200
READ_SECONDS = 5.0  # for the rest of a message that has begun to arrive
FOLLOW_SECONDS = 30.0


class Channel(redis.Channel):
    """Drops what is not JSON, and waits for nothing without end."""

    def _receive_one(self, c: Any) -> Any:
        """Of what is subscribed to. An error, if the connection breaks: Celery then begins anew.

        Left alone, redis-py makes a broken connection anew within its read, without subscribing
        again (kombu gave it the connection, so it does not know that it should), and reads on
        without a time limit: the process lives and consumes nothing any more.
        """
        c.connection.retry = Retry(NoBackoff(), 0)
        c.parse_response = functools.partial(
            type(c).parse_response, c, block=False, timeout=READ_SECONDS
        )
        return super()._receive_one(c)  # type: ignore[no-untyped-call]  # kombu's own

    def _brpop_read(self, **options: Any) -> Any:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # kombu's own
        except (ValueError, RecursionError) as error:
            log.warning("message.dropped", error=str(error)[:SHOWN_CHARS])
            raise queues.Empty from error


class Transport(redis.Transport):
    """Drops what Celery could not make a task of, and follows the address to another server."""

    Channel = Channel

    def register_with_event_loop(self, connection: Any, loop: Any) -> None:
        super().register_with_event_loop(connection, loop)  # type: ignore[no-untyped-call]  # kombu's own
        url = settings.load().broker_url.get_secret_value()
        loop.call_repeatedly(FOLLOW_SECONDS, self._follow, url, broker.server_at(url))

    def _follow(self, url: str, connected_to: str | None) -> None:
        """An error where what is connected lives on elsewhere: Celery then begins anew."""
        leads_to = broker.server_at(url)
        if leads_to and connected_to and leads_to != connected_to:
            log.warning("broker.moved", address=broker.shown(url))
            raise ConnectionLost("the address of Redis leads to another server now")

    def _deliver(self, message: Any, queue: str) -> None:
        if queue.startswith(OURS) and not is_ours(message):
            shown = repr(message)[:SHOWN_CHARS]
            log.warning("message.dropped", queue=queue, message=shown)
            return
        super()._deliver(message, queue)  # type: ignore[no-untyped-call]  # kombu's own


def install() -> None:
    """For connections that this process makes from now on, with and without TLS."""
    name = f"{__name__}:{Transport.__name__}"
    kombu.transport.TRANSPORT_ALIASES.update(redis=name, rediss=name)


def is_ours(message: Any) -> bool:
    """Whether it asks for one of our tasks with one number, as `broker.Broker` does."""
    try:
        properties, headers = message["properties"], message["headers"]
        encoded = properties["body_encoding"] == "base64" and isinstance(
            properties["delivery_tag"], str
        )
        plain = [headers.get(name) for name in ("eta", "expires", "group", "root_eta")]
        (subject,), keywords, _ = json.loads(base64.b64decode(message["body"], validate=True))
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError):
        return False
    return bool(
        encoded
        and message.get("content-type") == "application/json"
        and message.get("content-encoding") == "utf-8"
        and headers.get("task") in TASKS
        and isinstance(headers.get("id"), str)
        and plain == [None] * len(plain)
        and type(subject) is int
        and keywords == {}
    )
