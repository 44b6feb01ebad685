"""Redis: it answers, takes what Celery needs, and keeps it."""

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from jobs import servers
from jobs.doctor import broker
from tests import waiting
from tests.told import told_by


@pytest.mark.usefixtures("no_broker")
def test_a_redis_that_is_down_fails() -> None:
    assert told_by(broker.check)["redis"].status == "fail"


def test_a_real_redis_passes(clean_redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", clean_redis_url)
    found = told_by(broker.check)
    assert {name: check.status for name, check in found.items()} == {
        "redis": "ok",
        "redis eviction": "ok",
        "redis persistence": "ok",
    }


def test_a_sentinel_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = servers.free_port()
    config = tmp_path / "sentinel.conf"
    config.write_text(f"bind 127.0.0.1\nport {port}\ndir {tmp_path}\n")
    command = [str(servers.redis_program()), str(config), "--sentinel"]
    monkeypatch.setenv("CELERY_BROKER_URL", f"redis://127.0.0.1:{port}/0")
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as sentinel:
        try:
            waiting.until(lambda: _is_open(port))
            found = told_by(broker.check)["redis"]
        finally:
            sentinel.kill()
    assert (found.status, "names a Sentinel" in found.seen) == ("fail", True), found


def _is_open(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("127.0.0.1", port)) == 0


def test_a_cluster_fails(redis_cluster_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CELERY_BROKER_URL", redis_cluster_url)
    found = told_by(broker.check)["redis"]
    assert (found.status, "Cluster" in found.seen) == ("fail", True), found


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ("REPLICAOF 127.0.0.1 1", "a replica of 127.0.0.1:1"),
        ("CONFIG SET maxmemory 1", "used memory > 'maxmemory'"),
        ("CONFIG SET min-replicas-to-write 1", "not enough good replicas"),
    ],
)
def test_a_redis_that_answers_and_takes_nothing_fails_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, seen: str
) -> None:
    with (
        servers.RedisServer.start(tmp_path / "redis") as server,
        redis.Redis.from_url(server.url) as client,
    ):
        monkeypatch.setenv("CELERY_BROKER_URL", server.url)
        assert told_by(broker.check)["redis"].status == "ok"
        assert client.keys() == []
        client.execute_command(*change.split())
        found = told_by(broker.check)["redis"]
    assert (found.status, seen.lower() in found.seen.lower()) == ("fail", True), found


def test_a_redis_that_cannot_write_to_its_disk_fails_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It refuses even a ping."""
    with (
        servers.RedisServer.start(tmp_path / "redis") as server,
        redis.Redis.from_url(server.url) as client,
    ):
        (server.folder / "dump.rdb").mkdir()  # it cannot replace a folder by a snapshot
        client.config_set("save", "3600 1")
        client.bgsave()
        while client.info("persistence")["rdb_last_bgsave_status"] == "ok":
            time.sleep(0.02)
        monkeypatch.setenv("CELERY_BROKER_URL", server.url)
        found = told_by(broker.check)["redis"]
        server.kill()  # asked to stop, it would wait for a snapshot
    assert found.seen.startswith("it answers, but takes no writes: "), found
    assert "MISCONF" in found.seen
    assert "Redis takes nothing" in found.advice


@pytest.fixture
def administrator(clean_redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(clean_redis_url) as client:
        yield client
        client.execute_command("ACL", "DELUSER", "me")


@pytest.mark.parametrize(
    ("rights", "name", "status", "seen"),
    [
        ("~rushes.* &* +@all", "redis", "fail", "the key _kombu.binding.rushes.pidbox, the key _"),
        ("~rushes.* ~_kombu.* &* +@all", "redis", "fail", "needs: the key trial.rushes.pidbox"),
        ("~* +@all", "redis", "fail", "Celery needs: the channel /0.rushes.pidbox"),
        ("~rushes.* &* +@all -@dangerous", "redis", "fail", "the key _kombu.binding.rushes.pidbox"),
        ("~rushes.* %R~* &* +@all", "redis", "fail", "needs: the key _kombu.binding.rushes.pidbox"),
        ("~* &* +@all -zrem", "redis", "fail", "Celery needs: the key rushes.unacked_index"),
        ("~* &* +@all -publish", "redis", "fail", "Celery needs: the channel /0.rushes.pidbox"),
        ("~* &* +@all -@scripting -@dangerous", "redis", "fail", "Celery needs: scripts"),
        ("~* &* +@all -@dangerous", "redis settings", "warn", "cannot tell eviction"),
    ],
)
def test_a_user_of_redis_that_may_too_little_is_told_what_to_allow(
    administrator: redis.Redis,
    redis_server: servers.RedisServer,
    monkeypatch: pytest.MonkeyPatch,
    rights: str,
    name: str,
    status: str,
    seen: str,
) -> None:
    administrator.execute_command("ACL", "SETUSER", "me", "on", ">pw", *rights.split())
    monkeypatch.setenv("CELERY_BROKER_URL", f"redis://me:pw@127.0.0.1:{redis_server.port}/0")
    (found,) = (check for check in told_by(broker.check).values() if "ACL SETUSER" in check.advice)
    assert (found.name, found.status, seen in found.seen) == (name, status, True), found
    administrator.execute_command(*found.advice.replace("NAME", "me").split())
    allowed = told_by(broker.check)
    assert (allowed["redis"].status, "redis eviction" in allowed) == ("ok", True), allowed
    assert administrator.keys() == []
