"""What Redis is used for: a few messages per worker that say "this job may start", and a kick."""

import contextlib
import json
import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

import kombu.exceptions
import redis
from redis.client import Pipeline

from jobs import celery_app, errors, settings

KICK_KEY = "rushes.kick"
TRIAL_KEY = "rushes.trial"
MOST_READ = 5_000  # messages looked at per queue; dispatch never keeps more there
SEND_SECONDS = 2.0
ANEW_SECONDS = 30.0  # a connection lives longer than an address may lead to its server

SCHEMES = ("redis://", "rediss://")
ESCAPES = "in a password, / is written %2F, : %3A, ; %3B, @ %40, [ %5B, # %23 and ? %3F"

TLS_WORDS = (
    *("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile", "ssl_password"),
    *("ssl_cert_reqs", "ssl_check_hostname", "ssl_ciphers"),
)
"""Of redis-py's, those that Celery reads alike."""
TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")

UNAVAILABLE = (redis.RedisError, OSError, kombu.exceptions.OperationalError)


class BrokerUnavailable(errors.RushesError):
    """Redis does not answer. Nothing is lost: the dispatcher sends again when it does."""

    def __init__(self, url: str, reason: str) -> None:
        self.address = shown(url)
        super().__init__(f"broker {self.address}: {reason}")


class Message(NamedTuple):
    """What lies in a queue."""

    subject: int
    mark: str
    """Of whoever it was sent for; of older versions none."""


class Broker:
    """Sends job ids to queues and can tell which ones still lie there."""

    def __init__(self, config: settings.Settings) -> None:
        self.url = config.broker_url.get_secret_value()
        _check(self.url)
        _check_files(self.url)
        self._app = celery_app.make(config, answer_seconds=SEND_SECONDS)
        self.redis: redis.Redis = redis.Redis.from_url(
            self.url,
            socket_connect_timeout=SEND_SECONDS,
            socket_timeout=SEND_SECONDS,
            socket_keepalive=True,
        )
        self._anew_at = self._celery_anew_at = time.monotonic() + ANEW_SECONDS

    def send_renders(self, queue: str, job_ids: Iterable[int], *, mark: str = "") -> int:
        """One message per job; how many were sent before Redis stopped answering, if it does.

        `mark`: for whom they are, without a colon; `lying` tells it.
        """
        sent = 0
        with self._asking():
            for job_id in job_ids:
                self._send(celery_app.RENDER_TASK, job_id, queue, mark=mark)
                sent += 1
        return sent

    def send_publish(self, host: str, attempt_id: int) -> None:
        with self._asking():
            self._send(celery_app.PUBLISH_TASK, attempt_id, publish_queue(host))

    def steer(self, worker: str, *, take: Iterable[str] = (), leave: Iterable[str] = ()) -> None:
        """Let a worker's Celery begin or cease to take from queues. Safe to repeat."""
        with self._asking():
            for queue in leave:
                self._order(worker, "cancel_consumer", queue)
            for queue in take:
                self._order(worker, "add_consumer", queue)

    def waiting(self, queue: str) -> set[int]:
        """Ids of the messages that no worker has taken from this queue yet."""
        return {message.subject for message in self.lying(queue)}

    def lying(self, queue: str) -> list[Message]:
        """The messages that no worker has taken from this queue yet."""
        with self._asking():
            pipeline = self.redis.pipeline(transaction=False)
            pipeline.lrange(queue, 0, MOST_READ - 1)
            pipeline.delete(TRIAL_KEY)  # refused by a replica, which answers who only reads
            messages = pipeline.execute()[0]
        return _read(messages)

    def recall(self, queue: str) -> set[int]:
        """Take back all messages that no worker has taken; what they were about."""
        with self._asking():
            pipeline = self.redis.pipeline(transaction=True)
            pipeline.lrange(queue, 0, -1)
            pipeline.delete(queue)
            messages = pipeline.execute()[0]
        return {message.subject for message in _read(messages)}

    def kick(self) -> str | None:
        """Wake the dispatchers; else why it could not, which costs a tick and nothing more."""
        pipeline = self.redis.pipeline()
        pipeline.lpush(KICK_KEY, "1")
        pipeline.ltrim(KICK_KEY, 0, 0)
        return self._refusal_of(pipeline)

    def refusal(self) -> str | None:
        """Why it takes no writes: a replica, or one that is full, answers all the same."""
        pipeline = self.redis.pipeline()
        pipeline.lpush(TRIAL_KEY, "1")
        pipeline.delete(TRIAL_KEY)
        return self._refusal_of(pipeline)

    def withheld(self) -> list[str]:
        """Of what Celery needs, keys and all: what this user may not use. Changes nothing."""
        unacked, index, mutex = celery_app.UNACKED_KEYS.values()
        asked: dict[str, tuple[str, ...]] = {  # as Celery does it, of members that are not there
            unacked: ("HDEL", "trial"),
            index: ("ZREM", "trial"),
            mutex: ("EXISTS",),
            f"_kombu.binding.{celery_app.PIDBOX}": ("SREM", "trial"),
            "_kombu.binding_deadlines": ("ZREM", "trial"),
            f"trial.{celery_app.PIDBOX}": ("LREM", "0", "trial"),
        }
        pipeline = self.redis.pipeline(transaction=False)
        for key, (command, *values) in asked.items():
            pipeline.execute_command(command, key, *values)  # type: ignore[no-untyped-call]  # as below
        answers = zip(asked, pipeline.execute(raise_on_error=False), strict=True)
        found = [f"the key {key}" for key, answer in answers if isinstance(answer, Exception)]
        return found + self._withheld_channel() + self._withheld_scripts()

    def _withheld_channel(self) -> list[str]:
        with self.redis.pubsub() as heard:  # type: ignore[no-untyped-call]  # redis-py says no types
            try:
                self.redis.publish(self._channel, "")  # workers pass over what is empty
                heard.psubscribe(self._channel)
                heard.get_message(timeout=SEND_SECONDS)
            except redis.exceptions.NoPermissionError:
                return [f"the channel {self._channel}"]
        return []

    def _withheld_scripts(self) -> list[str]:
        """A lock is let go by a script, also in Celery."""
        lock = self.redis.lock(f"{TRIAL_KEY}_lock", timeout=10)
        try:
            if lock.acquire(blocking=False):
                lock.release()
        except redis.exceptions.NoPermissionError:
            self.redis.delete(lock.name)
            return ["scripts"]
        return []

    @property
    def rights(self) -> str:
        """Of a user of Redis, as ACL SETUSER takes them: all that rushes needs."""
        keys = f"resetkeys ~rushes.* ~_kombu.binding* ~*.{celery_app.PIDBOX}*"
        channels = f"resetchannels &{self._channel}"
        return f"{keys} {channels} +@all -@dangerous +info +client|list"

    @property
    def _channel(self) -> str:
        return f"/{urlsplit(self.url).path[1:] or 0}.{celery_app.PIDBOX}"

    def refuse_wrong_kind(self) -> None:
        """As `refuse_wrong_kind` of what the server tells of itself; nothing while it is away."""
        try:
            info = self.redis.info()
        except UNAVAILABLE:
            return
        assert isinstance(info, dict)
        refuse_wrong_kind(info)

    def wait_for_kick(self, seconds: float) -> bool:
        """True when kicked. Raises BrokerUnavailable at once when Redis is down."""
        try:
            with _new_connection(self.url, answer_seconds=seconds + SEND_SECONDS) as client:
                return client.blpop([KICK_KEY], timeout=seconds) is not None
        except UNAVAILABLE as error:
            raise BrokerUnavailable(self.url, str(error)) from error

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """BrokerUnavailable: the next try makes new connections, which may lead elsewhere."""
        if time.monotonic() >= self._anew_at:  # or now: the old server may live on without error
            self._anew_at = time.monotonic() + ANEW_SECONDS
            self._hang_up()
        try:
            yield
        except UNAVAILABLE as error:
            self._hang_up()
            raise BrokerUnavailable(self.url, str(error)) from error

    def _refusal_of(self, pipeline: Pipeline) -> str | None:
        try:
            with self._asking():
                pipeline.execute()
        except BrokerUnavailable as error:
            return str(error.__cause__)
        return None

    def _hang_up(self) -> None:
        """Ours; Celery does it by itself."""
        self.redis.connection_pool.disconnect(inuse_connections=False)

    @contextlib.contextmanager
    def _producer(self) -> Iterator[Any]:
        """Celery's, which hangs up in time as well."""
        with self._app.producer_or_acquire() as producer:
            if time.monotonic() >= self._celery_anew_at:
                self._celery_anew_at = time.monotonic() + ANEW_SECONDS
                with producer.channel.conn_or_acquire() as client:
                    client.connection_pool.disconnect(inuse_connections=False)
            yield producer

    def _send(self, task: str, subject: int, queue: str, *, mark: str = "") -> None:
        with self._producer() as producer:
            self._app.send_task(
                task,
                args=[subject],
                queue=queue,
                # So that `lying` can read it back.
                task_id=f"{subject}:{uuid.uuid4().hex}:{mark}",
                retry=False,
                producer=producer,
            )

    def _order(self, worker: str, method: str, queue: str) -> None:
        """As Celery's own `control` does it, which waits without end for a Redis that is away."""
        exchange = self._app.control.mailbox.exchange
        with self._producer() as producer:
            with producer.channel.conn_or_acquire() as client:
                client.delete(TRIAL_KEY)  # a replica takes orders too, and nobody hears them
            producer.publish(
                {"method": method, "arguments": {"queue": queue}, "destination": [worker]},
                exchange=exchange.name,
                declare=[exchange],
                serializer="json",
                retry=False,
            )


def server_at(url: str) -> str | None:
    """Which server the address leads to now, by the id of its run; None where it does not say."""
    try:
        with _new_connection(url, answer_seconds=SEND_SECONDS) as client:
            info = client.info("server")
    except UNAVAILABLE:
        return None
    assert isinstance(info, dict)
    return info.get("run_id")


def _new_connection(url: str, *, answer_seconds: float) -> redis.Redis:
    return redis.Redis.from_url(
        url, socket_connect_timeout=SEND_SECONDS, socket_timeout=answer_seconds
    )


def refuse_wrong_kind(info: Mapping[str, Any]) -> None:
    """InvalidInput for a Cluster, since Celery reads several keys at once, and for a Sentinel,
    which keeps nothing. `info`: of the server, empty where it does not say.
    """
    if "sentinel" in (info.get("redis_mode"), info.get("server_mode")):  # the latter: Valkey's
        raise _wrong("names a Sentinel: name the primary, or a proxy that follows it")
    if info.get("cluster_enabled"):
        raise _wrong("names a Cluster: it must be one Redis or Valkey, with or without replicas")


def shown(url: str) -> str:
    """For people: without the password, which may be anywhere in an address with a mistake."""
    if _mistake(url) is not None:
        return "not an address of Redis"
    parts = urlsplit(url)
    host = parts.hostname or "localhost"  # as clients of Redis take it
    host = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{host}:{parts.port or 6379}{parts.path}"


def _check(url: str) -> None:
    if (mistake := _mistake(url)) is not None:
        raise _wrong(mistake)


def _check_files(url: str) -> None:
    """The clients' own words about one that is missing do not name it."""
    for name, (path, *_) in parse_qs(urlsplit(url).query).items():
        if name in TLS_FILES:
            try:
                Path(path).open("rb").close()
            except (OSError, ValueError) as error:
                raise _wrong(f"names in {name} what cannot be read: {error}") from error


def _mistake(url: str) -> str | None:
    """Of two clients, Celery's and ours, each must read the same from it."""
    if url.startswith("sentinel"):
        return "names Sentinel, whose protocol is not spoken: name the primary, or what follows it"
    if ";" in url:  # Celery's would take it for several
        return f"may have no ;: {ESCAPES}"
    try:
        parts = urlsplit(url)
    except ValueError:  # as below
        return "is no address: an IPv6 address is written [::1]"
    try:
        port = parts.port
    except ValueError:  # its words may show a part of the password
        return f"has no port: {ESCAPES}"
    if port == 0:  # both would take the usual one
        return "has port 0, where nobody can listen"
    try:
        unquote(parts.hostname or "").encode("idna")
    except UnicodeError:
        return f"has a host whose name cannot be one: {ESCAPES}"
    if not url.startswith(SCHEMES):
        return f"must begin with redis:// or rediss://, got {url[: len(parts.scheme)]!r}"
    if parts.fragment or not re.fullmatch("(/[0-9]*)?", parts.path):
        return f"may have only the number of a database behind host and port, as /0: {ESCAPES}"
    options = parse_qs(parts.query, keep_blank_values=True)
    if options and parts.scheme == "redis":
        return f"may have a ? only with rediss://: {ESCAPES}"
    if not options.keys() <= set(TLS_WORDS):
        return f"may say only {', '.join(TLS_WORDS)} behind the ?: {ESCAPES}"
    asked = options.get("ssl_cert_reqs", ["required"])[0]
    if asked not in ("required", "optional", "none"):
        return f"has ssl_cert_reqs={asked}: must be required, optional or none"
    if options.get("ssl_check_hostname", ["true"])[0].lower() not in ("true", "false"):
        return "has an ssl_check_hostname that is neither true nor false"
    return None


def _wrong(message: str) -> errors.InvalidInput:
    return errors.invalid("settings", f"CELERY_BROKER_URL {message}")


def publish_queue(host: str) -> str:
    """Finished videos lie on one host's disk: only its own publisher takes them up."""
    return f"rushes.publish.{host}"


def _read(messages: Iterable[object]) -> list[Message]:
    return [read for read in map(_message, messages) if read is not None]


def _message(message: object) -> Message | None:
    try:
        task_id = json.loads(message)["headers"]["id"]  # type: ignore[arg-type]  # bytes or str
        subject, _, rest = task_id.partition(":")
        return Message(int(subject), rest.partition(":")[2])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # written by somebody else; the worker that takes it drops it
