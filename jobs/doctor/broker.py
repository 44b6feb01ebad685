"""Redis: it answers, takes what Celery needs, and keeps it."""

import time
from collections.abc import Iterator
from typing import Any

import redis

from jobs import broker, errors, settings
from jobs.doctor import checks

SLOW_BROKER_SECONDS = 0.1


def check(config: settings.Settings) -> Iterator[checks.Check]:
    try:
        connection = broker.Broker(config)
        client = connection.redis
        info = _info(client)
        broker.refuse_wrong_kind(info)
        began = time.monotonic()
        client.echo("")  # unlike a ping it is answered by one whose disk is full
        seconds = time.monotonic() - began
        unfit = _unfit(connection, info)
    except (*broker.UNAVAILABLE, errors.RushesError, ValueError) as error:
        seen = errors.first_line(error)
        advice = f"{_advice_on_redis(seen)}; submitted jobs are safe meanwhile"
        yield checks.fail("redis", seen, advice)
        return
    version = info.get("valkey_version") or info.get("redis_version", "unknown")
    seen = f"version {version} answers in {seconds * 1000:.1f} ms"
    if unfit:
        yield unfit
    elif seconds > SLOW_BROKER_SECONDS:
        yield checks.warn("redis", seen, "it is slow or far away; put it near the dispatcher")
    else:
        yield checks.ok("redis", seen)
    if not info:
        seen = "this user may not ask (INFO): cannot tell eviction and persistence"
        advice = _rights(connection)
        if unfit is None or unfit.advice != advice:
            yield checks.warn("redis settings", seen, advice)
        return
    yield _eviction(client, info)
    yield _persistence(client, info)


def _advice_on_redis(problem: str) -> str:
    if "CERTIFICATE_VERIFY_FAILED" in problem:  # in the words of OpenSSL, as the next
        return "ssl_ca_certs must name the file of its authority; or correct the certificate"
    if "CERTIFICATE_REQUIRED" in problem or "EOF occurred" in problem:
        return "it may want a certificate from us: ssl_certfile and ssl_keyfile; or start Redis"
    return "start Redis or correct CELERY_BROKER_URL"


def _info(client: redis.Redis) -> dict[str, Any]:
    """Empty where this user may not ask."""
    try:
        return _answer(client.info())
    except redis.exceptions.NoPermissionError:
        return {}


def _unfit(connection: broker.Broker, info: dict[str, Any]) -> checks.Check | None:
    """It answers, but nothing would be rendered."""
    if info.get("role") == "slave":
        primary = f"{info.get('master_host')}:{info.get('master_port')}"
        advice = "name the primary in CELERY_BROKER_URL, by a name that follows it"
        return checks.fail("redis", f"it is a replica of {primary}", advice)
    if refusal := connection.refusal():
        advice = "docs/operations.md, Redis takes nothing; submitted jobs are safe meanwhile"
        return checks.fail("redis", f"it answers, but takes no writes: {refusal}", advice)
    if withheld := connection.withheld():
        seen = f"this user may not use what Celery needs: {', '.join(withheld)}"
        return checks.fail("redis", seen, _rights(connection))
    return None


def _rights(connection: broker.Broker) -> str:
    return f"ACL SETUSER NAME {connection.rights}"


def _answer(value: Any) -> dict[str, Any]:
    assert isinstance(value, dict)
    return value


def _eviction(client: redis.Redis, info: dict[str, Any]) -> checks.Check:
    policy = info.get("maxmemory_policy") or _configured(client, "maxmemory-policy")
    if policy == "noeviction":
        return checks.ok("redis eviction", "maxmemory-policy noeviction")
    seen = f"maxmemory-policy is {policy or 'unknown'}: messages may vanish when memory is full"
    return checks.warn("redis eviction", seen, "set maxmemory-policy noeviction")


def _configured(client: redis.Redis, name: str) -> str | None:
    """None where a managed Redis does not tell its configuration."""
    try:
        return str(_answer(client.config_get(name)).get(name, ""))
    except redis.RedisError:
        return None


def _persistence(client: redis.Redis, info: dict[str, Any]) -> checks.Check:
    if info.get("aof_enabled"):
        return checks.ok("redis persistence", "append-only file")
    saves = _configured(client, "save")
    if saves:
        return checks.ok("redis persistence", "snapshots")
    seen = "neither append-only file nor snapshots: a restart empties the queues"
    if saves is None:
        seen = "no append-only file, snapshots unknown: a restart may empty the queues"
    advice = "appendonly yes; without it nothing is lost, the dispatcher sends the messages again"
    return checks.warn("redis persistence", seen, advice)
