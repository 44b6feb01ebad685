"""`rushes up`: one per folder, found by the others, and its servers come back."""

import contextlib
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import redis
from sqlalchemy import text

from jobs import (
    database,
    migrate,
    queries,
    servers,
    settings,
    standalone,
    stores,
    supervisor,
    tokens,
)
from tests.waiting import until

UP = [sys.executable, "-m", "jobs", "up", "--devices", "cpu"]


@pytest.fixture
def home(tmp_path):
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def clock(monkeypatch):
    """Pauses pass at once."""
    monkeypatch.setattr(supervisor.Pauses, "is_over", property(lambda self: self.is_pausing))


def kept(start):
    return standalone.KeptServer(start(), start)


def test_a_dead_redis_comes_back_on_its_port_with_its_data(home, clock):
    one = kept(lambda **given: servers.RedisServer.start(home / "redis", **given))
    try:
        port = one.server.port
        with redis.Redis.from_url(one.server.url) as client:
            client.set("key", "value")
            client.execute_command("WAITAOF", 1, 0, 5_000)
        one.server.kill()
        for _ in range(2):
            one.revive()
        assert one.server.port == port
        with redis.Redis.from_url(one.server.url) as client:
            assert client.get("key") == b"value"
    finally:
        one.stop()


def test_a_dead_store_comes_back_on_its_port_with_its_objects(home, clock, monkeypatch):
    one = kept(lambda **given: servers.S3Server.start(home / "s3", **given))
    try:
        for name, value in one.server.environment().items():
            monkeypatch.setenv(name, value)
        store = stores.open_store(settings.load())
        store.put_bytes(b"data", "key", content_type="text/plain")
        one.server.kill()
        for _ in range(2):
            one.revive()
        assert store.read_bytes("key") == b"data"
    finally:
        one.stop()


def test_a_living_server_is_left_alone(home):
    one = kept(lambda **given: servers.RedisServer.start(home / "redis", **given))
    try:
        first = one.server
        one.revive()
        assert one.server is first
    finally:
        one.stop()


def test_a_server_whose_port_was_taken_is_tried_until_it_is_free(home, clock, capsys):
    """Its address is known to running workers: another port would be of no use."""
    one = kept(lambda **given: servers.RedisServer.start(home / "redis", **given))
    try:
        port = one.server.port
        one.server.kill()
        with socket.socket() as other:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            other.bind(("127.0.0.1", port))
            other.listen()
            for _ in range(3):
                one.revive()
            assert not one.server.is_alive()
            assert "server.not_started" in capsys.readouterr().out
        one.revive()
        assert one.server.is_alive()
        assert one.server.port == port
    finally:
        one.stop()


def test_servers_are_told_apart_from_those_that_the_environment_names(home, monkeypatch):
    """What is named already is not started."""
    monkeypatch.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("RUSHES_RESULTS_URL", "file:///nowhere/else")
    with contextlib.ExitStack() as stack:
        assert standalone._start_servers(settings.load(), stack, lambda _: None) == ({}, ())


def test_a_remembered_port_that_is_taken_now_is_given_up(home, monkeypatch):
    monkeypatch.setenv("RUSHES_RESULTS_URL", "file:///nowhere/else")
    config = settings.load(home=str(home))

    def redis_url():
        with contextlib.ExitStack() as stack:
            environment, _ = standalone._start_servers(config, stack, lambda _: None)
            return environment["CELERY_BROKER_URL"]

    first = redis_url()
    port = int(first.rpartition(":")[2].partition("/")[0])
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        assert redis_url() != first


def test_a_home_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    done = subprocess.run(
        UP,
        env=os.environ | {"RUSHES_HOME": str(tmp_path / "file" / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "cannot be written" in done.stderr


def test_the_address_of_a_dead_farm_is_nobodys(home):
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    state = {"pid": process.pid, "process_started": 1.0, "environment": {"REDIS_URL": "redis://x"}}
    (home / settings.UP_FILE).write_text(json.dumps(state))
    assert settings.read_up_file(home) == {}


ENDS_WHEN_ASKED_TWICE = """
import signal, threading
stop, hurry = threading.Event(), threading.Event()
def ask(*_):
    (hurry if stop.is_set() else stop).set()
signal.signal(signal.SIGTERM, ask)
print("up", flush=True)
while not hurry.wait(0.01): pass
"""


def test_a_second_ctrl_c_reaches_a_child_whose_turn_comes_after_it(tmp_path, monkeypatch):
    monkeypatch.setattr(standalone, "LOOK_SECONDS", 0.1)
    path = tmp_path / "child.log"
    command = [sys.executable, "-S", "-c", ENDS_WHEN_ASKED_TWICE]
    child = supervisor.Child(name="child", command=command, log_path=path)
    child.start()
    until(lambda: "up" in path.read_text())
    hurry = threading.Event()
    hurry.set()
    began = time.monotonic()
    standalone._stop_child(child, 60.0, hurry)
    assert time.monotonic() - began < 30
    assert not child.is_alive


class Farms:
    """Two `rushes up` started at once in one folder with the `up.json` of a dead one.

    Its tables are those of a newer version, as after a step back from an upgrade.
    """

    def __init__(self, home):
        self.home = home
        with contextlib.closing(database.connect(settings.load(home=str(home)))) as db:
            migrate.upgrade(db)
            with db.transaction() as session:
                session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        (home / settings.UP_FILE).write_text(
            json.dumps(
                {"pid": 2**22 + 1, "process_started": 1.0, "environment": {"REDIS_URL": "x"}}
            )
        )
        environment = {
            name: value for name, value in os.environ.items() if name not in settings.given_names()
        }
        self.log = home / "up.log"
        with self.log.open("ab") as log:
            self.started = [
                subprocess.Popen(
                    [*servers.tied_to_parent(), *UP],
                    env=environment | {"RUSHES_HOME": str(home), "RUSHES_GRACE_SECONDS": "5"},
                    cwd=home,
                    stdout=log,
                    stderr=subprocess.PIPE,
                    start_new_session=True,
                )
                for _ in range(2)
            ]

    def split(self):
        def ended():
            return [one for one in self.started if one.poll() is not None]

        until(ended, seconds=60)
        (self.loser,) = ended()
        (self.winner,) = [one for one in self.started if one is not self.loser]
        # Nobody reads its log else, and a full pipe would stop it.
        self.said = bytearray()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self):
        while data := os.read(self.winner.stderr.fileno(), 4096):
            self.said += data

    def live_queues(self):
        with (
            contextlib.closing(database.connect(settings.load(home=str(self.home)))) as db,
            db.reading() as session,
        ):
            return queries.live_workers_by_queue(session)

    def interrupt_twice(self):
        """Status of the end, and who of its family outlives it."""
        family = psutil.Process(self.winner.pid).children(recursive=True)
        self.winner.send_signal(signal.SIGINT)
        until(lambda: b"Ctrl-C again" in self.log.read_bytes())
        self.winner.send_signal(signal.SIGINT)
        return self.winner.wait(60), [one for one in family if one.is_running()]

    def stop(self):
        for one in self.started:
            if one.poll() is None:
                one.kill()
            one.wait()
        self._reader.join(30)
        for one in self.started:
            one.stderr.close()


@pytest.fixture(scope="module")
def farms(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[3]))
        started = Farms(tmp_path_factory.mktemp("farm"))
    started.split()
    try:
        until(lambda: settings.read_up_file(started.home), seconds=60)
        until(lambda: b"ready:" in started.log.read_bytes(), seconds=90)
        started.ready_with = started.live_queues()
        yield started
        # Ctrl-C twice: a start costs too much for a test of its own.
        assert started.interrupt_twice() == (0, [])
        assert not (started.home / settings.UP_FILE).exists()
        with supervisor.only_one(started.home / standalone.LOCK, "busy"):
            pass
    finally:
        started.stop()


def test_of_two_that_start_at_once_one_is_refused_in_a_line(farms):
    assert farms.loser.returncode == 1
    assert farms.winner.poll() is None
    said = farms.loser.stderr.read().decode()
    assert "already runs in" in said
    assert len(said.splitlines()) == 1


def test_it_is_ready_when_somebody_takes_jobs(farms):
    """A submit would say that nobody does."""
    assert farms.ready_with["rushes.render.tiny"] == 1


def test_the_address_book_is_for_its_owner_alone(farms):
    mode = stat.S_IMODE((farms.home / settings.UP_FILE).stat().st_mode)
    assert mode == 0o600


def test_the_address_book_names_the_web_service_where_it_listens(farms):
    book = settings.read_up_file(farms.home)
    address = f"web       http://{book['RUSHES_WEB_HOST']}:{book['RUSHES_WEB_PORT']}"
    assert address.encode() in farms.log.read_bytes()


def test_a_server_that_dies_under_it_comes_back(farms):
    address = settings.read_up_file(farms.home)["CELERY_BROKER_URL"]

    def answers():
        with redis.Redis.from_url(address) as client:
            try:
                return client.ping()
            except redis.RedisError:
                return False

    until(answers)
    servers_of = psutil.Process(farms.winner.pid).children(recursive=True)
    (victim,) = [one for one in servers_of if "valkey" in one.name() or "redis" in one.name()]
    victim.kill()
    until(lambda: b"server.restarted" in farms.said)
    until(answers)
    assert settings.read_up_file(farms.home)["CELERY_BROKER_URL"] == address


def test_addresses_that_it_was_given_are_found_by_other_terminals(tmp_path, monkeypatch):
    """`DATABASE_URL=... rushes up` here, a bare `rushes list` there: the same database."""
    for name, value in {
        "DATABASE_URL": "postgres://me:secret@db.example/rushes",
        "RUSHES_RESULTS_URL": "s3://mine/results",
        "AWS_ENDPOINT_URL_S3": "https://s3.example",
        "S3_ADDRESSING_STYLE": "virtual",
        "AWS_ACCESS_KEY_ID": "mine",
        "AWS_SECRET_ACCESS_KEY": "nobody's business",
        "RUSHES_WINDOW": "5",
    }.items():
        monkeypatch.setenv(name, value)
    found = standalone._own_addresses(settings.load())
    assert found == {
        "DATABASE_URL": "postgresql+psycopg://me:secret@db.example/rushes",
        "RUSHES_RESULTS_URL": "s3://mine/results",
        "AWS_ENDPOINT_URL_S3": "https://s3.example",
        "S3_ADDRESSING_STYLE": "virtual",
    }
    monkeypatch.delenv("RUSHES_RESULTS_URL")
    assert set(standalone._own_addresses(settings.load())) == {"DATABASE_URL"}


def test_two_that_begin_at_once_have_a_page_each():
    """Neither of them listens yet."""
    config = settings.load(web_port=servers.free_port())
    with contextlib.ExitStack() as second:
        with contextlib.ExitStack() as first:
            assert standalone._web_port(config, first) == config.web_port
            assert standalone._web_port(config, second) != config.web_port
        assert standalone._web_port(config, second) == config.web_port


def test_a_page_that_nobody_may_reach_is_not_said_to_be_served(sqlite_database_url):
    """Until there is a token: then it begins by itself."""
    here = settings.load(database_url=sqlite_database_url)
    open_to_all = settings.load(web_host="0.0.0.0", database_url=sqlite_database_url)
    with contextlib.closing(database.connect(here)) as db:
        migrate.upgrade(db)
        assert standalone._web_place(here, db, 8001) == "http://127.0.0.1:8001"
        said = standalone._web_place(open_to_all, db, 8001)
        assert said.startswith("not served yet: 0.0.0.0 is reached by others")
        assert "`rushes token create NAME`" in said
        with db.transaction() as session:
            tokens.create(session, name="x", owner="", scopes=[tokens.Scope.READ])
        assert standalone._web_place(open_to_all, db, 8001) == "http://0.0.0.0:8001"


def test_another_terminal_is_told_where_to_go_and_a_file_that_is_there(tmp_path):
    said = standalone._ready(settings.load(home=".rushes").home)
    assert said.endswith("in this folder: `rushes submit FILE --preset tiny`")
    Path("examples").mkdir()
    Path("examples/prompts.jsonl").touch()
    said = standalone._ready(tmp_path)
    assert f"with RUSHES_HOME={tmp_path}: `rushes submit examples/prompts.jsonl" in said
