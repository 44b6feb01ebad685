"""Connections that stand and say nothing, and servers that sleep: noticed, and nobody blamed."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import kombu
import limits
import psutil
import psycopg
import pytest
import redis
from kombu.asynchronous import Hub
from sqlalchemy import make_url, select, text, update
from sqlalchemy.exc import OperationalError, ProgrammingError

from jobs import (
    broker,
    database,
    dispatch,
    first_answer,
    lifecycle,
    migrate,
    patience,
    s3_clients,
    servers,
    settings,
    states,
    storage,
    stores,
    watch,
)
from jobs.schema import Batch
from jobs.web import rates
from tests.chaos.proxy import Fault, HttpProxy, Network, Proxy
from tests.integration.jobs.conftest import World
from worker import redis_transport

R = TypeVar("R")


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    yield network
    network.close()


@pytest.fixture
def postgres_proxy(network: Network, postgres_database_url: str) -> Proxy:
    folder = make_url(postgres_database_url).query["host"]
    return Proxy(network, Path(str(folder)) / ".s.PGSQL.5432")


@pytest.fixture
def through(postgres_proxy: Proxy, postgres_database_url: str) -> Iterator[database.Database]:
    """The database, but through a proxy and with little patience."""
    name = make_url(postgres_database_url).database
    address = f"postgres@127.0.0.1:{postgres_proxy.port}/{name}"
    options = "sslmode=disable&gssencmode=disable"
    db = database.Database(f"postgresql+psycopg://{address}?{options}", answer_seconds=1.0)
    yield db
    db.close()


@pytest.mark.parametrize(
    ("said", "is_away"),
    [
        ("the database system is starting up", True),
        ("sorry, too many clients already", True),
        ("pgbouncer cannot connect to server", True),
        ("server login has been failing, try again later (server_login_retry)", True),
        ("query_wait_timeout", True),
        ("no more connections allowed (max_client_conn)", True),
        ('too many connections for role "rushes"', True),
        ('too many connections for database "rushes"', True),
        ("the database system is not yet accepting connections", True),
        ("client_login_timeout", True),
        ('password authentication failed for user "rushes"', False),
        ('database "ruhses" does not exist', False),
    ],
)
def test_a_server_that_takes_nobody_is_away(said: str, is_away: bool) -> None:
    refused = psycopg.OperationalError(f"connection failed: FATAL:  {said}")
    assert database.is_away(OperationalError("SELECT 1", None, refused)) is is_away


def test_a_service_begins_when_the_database_is_there(
    postgres_database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until then it says that it lives; a wrong name, or no tables, it says at once."""
    monkeypatch.setattr(first_answer, "AGAIN_SECONDS", 0.01)
    there = make_url(postgres_database_url)
    folder, stop, looks = tmp_path / "server", threading.Event(), 0

    def wait(name: str) -> None:
        url = there.set(database=name, query={"host": str(folder)})
        with contextlib.closing(database.Database(url.render_as_string(False))) as db:
            first_answer.wait(db, stop=stop, alive=look)

    def look() -> None:
        nonlocal looks
        looks += 1
        if looks == 3:
            folder.symlink_to(str(there.query["host"]))

    with pytest.raises(ProgrammingError, match="batches"):
        wait(str(there.database))
    assert looks == 3
    with pytest.raises(OperationalError, match="does not exist"):
        wait("another")
    with contextlib.closing(database.Database(postgres_database_url)) as db:
        migrate.upgrade(db)
    wait(str(there.database))
    folder.unlink()
    looks = 3
    threading.Timer(0.1, stop.set).start()
    wait(str(there.database))
    assert looks > 4


def test_a_forgotten_connection_to_postgresql_is_given_up_for_a_new_one(
    through: database.Database, postgres_proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However late that is found out."""
    monkeypatch.setattr(database, "LATEST_TRY_SECONDS", 0.5)

    def ask(session: database.Session) -> int:
        return int(session.scalar(text("SELECT 7")) or 0)

    assert through.write(ask) == 7
    postgres_proxy.forget()
    began = time.monotonic()
    assert through.write(ask) == 7
    assert time.monotonic() - began > 0.9  # else the connection was not the forgotten one


def test_a_wait_for_a_batch_ends_in_time_on_a_database_that_hangs(
    through: database.Database, postgres_world: World, postgres_proxy: Proxy
) -> None:
    address = through.url.render_as_string(hide_password=False)
    batch_id = postgres_world.submit()
    with contextlib.closing(database.Database(address)) as patient:
        snapshots = watch.until_finished(
            patient, batch_id, timeout_seconds=1.5, interval_seconds=0.1
        )
        next(snapshots)
        began = time.monotonic()
        postgres_proxy.fault = Fault.HALF_OPEN
        with pytest.raises(watch.WaitTimeout):
            list(snapshots)
        assert time.monotonic() - began < 30


def test_a_transaction_on_a_forgotten_connection_fails_and_may_be_tried_again(
    through: database.Database, postgres_proxy: Proxy
) -> None:
    def broken_off() -> None:
        with through.transaction() as session:
            session.execute(text("SELECT 1"))
            postgres_proxy.forget()
            session.execute(text("SELECT 2"))

    with pytest.raises(OperationalError, match="no answer within 1 s") as error:
        broken_off()
    assert error.value.connection_invalidated


def test_a_service_leaves_a_standby_for_the_primary(postgres_world: World) -> None:
    """A connection that stood before a failover leads to a server that takes no more writes."""
    db, batch_id, tries = postgres_world.db, postgres_world.submit(), 0

    def rename(session: database.Session) -> None:
        nonlocal tries
        tries += 1
        session.execute(update(Batch).where(Batch.id == batch_id).values(name="new"))

    with db.engine.connect() as connection:
        connection.execute(text("SET default_transaction_read_only = on"))
        connection.commit()
    db.write(rename)
    assert tries == 2
    assert postgres_world.batch(batch_id).name == "new"


def test_a_statement_that_is_given_up_waits_on_for_no_lock(
    through: database.Database, postgres_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor keeps those that it has: what is tried again would wait for them."""
    monkeypatch.setattr(database, "WRITE_TRIES", 1)
    first, second = (postgres_world.submit() for _ in range(2))

    def rename_both(session: database.Session) -> None:
        session.execute(update(Batch).where(Batch.id == second).values(name="new"))
        session.execute(update(Batch).where(Batch.id == first).values(name="new"))

    def waiting(session: database.Session) -> int:
        blocked = (
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE datname = current_database() AND wait_event_type = 'Lock'"
        )
        return session.scalar(text(blocked)) or 0

    with postgres_world.db.transaction() as session:
        session.execute(update(Batch).where(Batch.id == first).values(name="held"))
        with pytest.raises(OperationalError, match="no answer within 1 s"):
            through.write(rename_both)
        with postgres_world.db.transaction() as other:
            other.execute(text("SET LOCAL lock_timeout = '3s'"))
            other.execute(update(Batch).where(Batch.id == second).values(name="other"))
            assert waiting(other) == 0


def test_a_transaction_of_somebody_frozen_holds_its_locks_no_longer_than_it_may_be_idle(
    through: database.Database, postgres_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who wakes up later does all of it again."""
    monkeypatch.setattr(database, "IDLE_TRANSACTION_SECONDS", 0.3)
    batch_id = postgres_world.submit()
    runs = 0

    def rename(session: database.Session, name: str, pause: float) -> None:
        nonlocal runs
        runs += 1
        session.execute(update(Batch).where(Batch.id == batch_id).values(name=name))
        if runs == 1:
            postgres_world.db.write(rename, "of another", 0.0)
            time.sleep(pause)
        session.execute(text("SELECT 1"))

    through.write(rename, "of the frozen", 0.5)
    assert runs == 3
    assert postgres_world.batch(batch_id).name == "of the frozen"


def test_a_statement_of_a_migration_may_take_as_long_as_it_needs(
    through: database.Database,
) -> None:
    with through.engine.connect() as connection:
        database.wait_for_ever(connection)
        connection.execute(text("SELECT pg_sleep(1.5)"))
    with pytest.raises(OperationalError, match="no answer"), through.engine.connect() as again:
        again.execute(text("SELECT pg_sleep(1.5)"))


def test_a_forgotten_connection_to_redis_is_given_up_for_a_new_one(
    network: Network, clean_redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(broker, "SEND_SECONDS", 0.5)
    proxy, bell = _bell_through(network, clean_redis_url)
    bell.send_renders("queue", [1])
    assert bell.waiting("queue") == {1}
    proxy.forget()
    # Two clients, Celery's and ours: each may first have to find out.
    assert _in_the_end(lambda: bell.send_renders("queue", [2])) == 1
    assert 2 in _in_the_end(lambda: bell.waiting("queue"))


def test_a_redis_that_hangs_holds_up_who_sends_for_one_wait_only(
    network: Network, clean_redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On connections that stand, and on the new ones of the second try."""
    monkeypatch.setattr(broker, "SEND_SECONDS", 0.5)
    proxy, bell = _bell_through(network, clean_redis_url)
    calls: list[Callable[[], object]] = [
        lambda: bell.steer("sim0@here", take=["queue"], leave=["other"]),
        lambda: bell.send_renders("queue", [1]),
    ]
    for call in calls:
        call()
        call()
        proxy.fault = Fault.HALF_OPEN
        for _ in range(2):
            began = time.monotonic()
            with pytest.raises(broker.BrokerUnavailable):
                call()
            assert time.monotonic() - began < 0.9
        proxy.fault = Fault.NONE
        _in_the_end(call)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[servers.RedisServer, servers.RedisServer]]:
    """Two that take any password."""
    with (
        servers.RedisServer.start(tmp_path / "one") as one,
        servers.RedisServer.start(tmp_path / "two") as two,
    ):
        for server in (one, two):
            with redis.Redis.from_url(server.url) as client:
                client.config_set("requirepass", "")
        yield one, two


@pytest.mark.parametrize("doing", ["look", "take back", "kick", "try", "steer"])
def test_who_is_connected_to_what_became_a_replica_finds_the_new_primary(
    network: Network, pair: tuple[servers.RedisServer, servers.RedisServer], doing: str
) -> None:
    """It answers whoever reads, with what it had, and takes orders that nobody hears."""
    one, two = pair
    proxy, bell = _bell_through(network, one.url)

    def steer() -> bool:
        with contextlib.suppress(broker.BrokerUnavailable):
            bell.steer("sim0@here", take=["queue"])
        return heard.get_message(ignore_subscribe_messages=True, timeout=0.2) is not None

    tries: dict[str, Callable[[], bool]] = {
        "look": lambda: _in_the_end(lambda: bell.waiting("queue")) == {2},
        "take back": lambda: _in_the_end(lambda: bell.recall("queue")) == {2},
        "kick": lambda: bell.kick() is None,
        "try": lambda: bell.refusal() is None,
        "steer": steer,
    }
    with (
        redis.Redis.from_url(one.url) as old,
        redis.Redis.from_url(two.url) as new,
        new.pubsub() as heard,
    ):
        heard.psubscribe("/0.rushes.pidbox")
        broker.Broker(settings.load(broker_url=one.url)).send_renders("queue", [1])
        broker.Broker(settings.load(broker_url=two.url)).send_renders("queue", [2])
        assert not tries[doing]() or doing in ("kick", "try")
        old.replicaof("127.0.0.1", 1)  # where it will find no primary to learn from
        proxy.lead_to(two.port)
        assert any(tries[doing]() for _ in range(3))


@pytest.mark.parametrize("doing", ["look", "send", "kick", "steer"])
def test_who_is_connected_to_one_that_lives_on_follows_the_address(
    network: Network,
    pair: tuple[servers.RedisServer, servers.RedisServer],
    monkeypatch: pytest.MonkeyPatch,
    doing: str,
) -> None:
    """As a proxy does it that was told of another server, and lets old connections be."""
    monkeypatch.setattr(broker, "ANEW_SECONDS", 0.0)
    one, two = pair
    proxy, bell = _bell_through(network, one.url)
    with (
        redis.Redis.from_url(one.url) as old,
        redis.Redis.from_url(two.url) as new,
        new.pubsub() as heard,
    ):
        heard.psubscribe("/0.rushes.pidbox")
        broker.Broker(settings.load(broker_url=two.url)).send_renders("queue", [2])
        tries: dict[str, Callable[[], bool]] = {
            "look": lambda: bell.waiting("queue") == {2},
            "send": lambda: bell.send_renders("other", [3]) == new.llen("other"),
            "kick": lambda: bell.kick() is None and new.exists(broker.KICK_KEY) == 1,
            "steer": lambda: (
                bell.steer("sim0@here", take=["queue"]) is None
                and heard.get_message(ignore_subscribe_messages=True, timeout=0.5) is not None
            ),
        }
        assert not tries[doing]()
        proxy.lead_to(two.port)
        assert tries[doing]()
        assert old.ping()


def test_a_worker_leaves_a_server_that_the_address_leads_to_no_more(
    network: Network,
    pair: tuple[servers.RedisServer, servers.RedisServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(redis_transport, "FOLLOW_SECONDS", 0.01)
    one, two = pair
    proxy, bell = _bell_through(network, one.url)
    monkeypatch.setenv("CELERY_BROKER_URL", bell.url)
    hub = Hub()
    with kombu.Connection(bell.url, transport=redis_transport.Transport) as connection:
        connection.transport.register_with_event_loop(connection.connection, hub)

        def look() -> None:
            time.sleep(0.1)
            hub.fire_timers(propagate=connection.connection_errors)

        look()
        proxy.lead_to(two.port)
        with pytest.raises(connection.connection_errors, match="leads to another server now"):
            look()
    hub.close()


def test_requests_are_counted_on_the_new_primary(
    network: Network,
    pair: tuple[servers.RedisServer, servers.RedisServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "AWAY_SECONDS", 0.0)
    one, two = pair
    proxy, bell = _bell_through(network, one.url)
    limiter = rates.Limiter(limits.parse("9/minute"), redis_url=bell.url)
    limiter.seconds_to_wait("ada")
    with redis.Redis.from_url(one.url) as old, redis.Redis.from_url(two.url) as new:
        assert old.dbsize() == 1
        old.replicaof("127.0.0.1", 1)
        proxy.lead_to(two.port)
        for _ in range(2):
            limiter.seconds_to_wait("ada")
        assert new.dbsize() == 1


def _bell_through(network: Network, url: str) -> tuple[Proxy, broker.Broker]:
    address, _, port = url.rpartition("/")[0].rpartition(":")
    proxy = Proxy(network, int(port))
    return proxy, broker.Broker(settings.load(broker_url=f"{address}:{proxy.port}/0"))


def _in_the_end(call: Callable[[], R]) -> R:
    for _ in range(3):
        with contextlib.suppress(broker.BrokerUnavailable):
            return call()
    return call()


def test_a_store_that_takes_everything_and_says_nothing_is_unavailable(
    network: Network,
    s3: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(s3_clients, "READ_SECONDS", 0.3)
    proxy = HttpProxy(network, int(s3["AWS_ENDPOINT_URL_S3"].rpartition(":")[2]))
    for name, value in (s3 | {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{proxy.port}"}).items():
        monkeypatch.setenv(name, value)
    store = stores.open_store(settings.load())
    for fault in (Fault.HALF_OPEN, Fault.LOST_ANSWER, Fault.BUSY):
        proxy.fault = fault
        with pytest.raises(storage.StorageUnavailable):
            store.put_bytes(b"a video", "video.mp4", content_type="video/mp4")
    proxy.fault = Fault.DENIED
    with pytest.raises(storage.StorageDenied):
        store.put_bytes(b"a video", "video.mp4", content_type="video/mp4")
    proxy.fault = Fault.NONE
    store.put_bytes(b"a video", "video.mp4", content_type="video/mp4")
    assert store.read_bytes("video.mp4") == b"a video"


def test_a_database_that_slept_past_a_lease_ends_none(
    postgres_world: World, postgres_process: psutil.Process, clean_redis_url: str
) -> None:
    """Nobody could renew: each worker has a whole lease to report, then silence counts again."""
    config = settings.load(broker_url=clean_redis_url, lease_seconds=1.2)
    dispatcher = dispatch.Dispatcher(config, db=postgres_world.db)
    job = postgres_world.only_job(postgres_world.submit())
    postgres_world.claimed(job.id)
    dispatcher.tick()
    with postgres_world.db.transaction() as session:
        session.execute(text("UPDATE attempts SET lease_until = now() + interval '0.5 second'"))
    family = [postgres_process, *postgres_process.children(recursive=True)]
    for process in family:
        process.suspend()
    waking = threading.Timer(1.0, lambda: [process.resume() for process in family])
    waking.start()
    try:
        assert dispatcher.tick().ended_attempts == 0
    finally:
        waking.join()
    assert postgres_world.job(job.id).state is states.JobState.RUNNING
    time.sleep(1.3)
    assert dispatcher.tick().ended_attempts == 1


@pytest.mark.parametrize("doing", ["heartbeat", "claim"])
def test_a_host_that_froze_in_a_transaction_holds_up_nobody_else(
    postgres_world: World, clean_redis_url: str, doing: str
) -> None:
    """Its rows stay locked until the server gives it up: the looks of the dispatcher go on."""
    world = postgres_world
    dispatcher = dispatch.Dispatcher(
        settings.load(broker_url=clean_redis_url, lease_seconds=6.0, window=9), db=world.db
    )
    first, second, third = world.job_ids(world.submit(3))
    frozen, same_batch = world.claimed(first, worker="gpu0@frozen"), world.claimed(second)
    other_batch = world.claimed(world.only_job(world.submit()).id, worker="gpu1@here")
    world.submit(2)
    world.register()
    for attempt_id in (frozen, same_batch, other_batch):
        world.expire(attempt_id)
    with world.db.transaction() as session:
        if doing == "heartbeat":
            lifecycle.heartbeat(session, frozen, lease_seconds=6.0)
        else:
            assert lifecycle.claim(session, third, worker="gpu0@frozen", lease_seconds=6.0)
        began = time.monotonic()
        tick = dispatcher.tick()
        assert time.monotonic() - began < 1.5
        assert world.attempt(other_batch).state is states.AttemptState.LOST
        # A claim holds the row of its batch, which counts the jobs that run.
        is_held_up = doing == "claim"
        assert (world.attempt(same_batch).state is states.AttemptState.LOST) is not is_held_up
        assert tick.ended_attempts == (1 if is_held_up else 2)
        assert tick.sent >= 2
        session.rollback()
    world.check()


def test_a_heartbeat_that_is_long_in_being_committed_counts(
    postgres_world: World, clean_redis_url: str
) -> None:
    """Only writes stood still: the lease that it brings is over, but its worker was there."""
    world = postgres_world
    config = settings.load(broker_url=clean_redis_url, lease_seconds=1.2)
    dispatcher = dispatch.Dispatcher(config, db=world.db)
    attempt_id = world.claimed(world.only_job(world.submit()).id)
    world.expire(attempt_id)
    with world.db.transaction() as session:
        lifecycle.heartbeat(session, attempt_id, lease_seconds=0.0)
        assert dispatcher.tick().ended_attempts == 0
    assert dispatcher.tick().ended_attempts == 0
    time.sleep(1.3)
    assert dispatcher.tick().ended_attempts == 1


def test_a_batch_whose_row_is_held_for_a_moment_has_had_its_turn(
    postgres_world: World, clean_redis_url: str
) -> None:
    """Or the one with the most claims would always be the one that waited longest."""
    world = postgres_world
    dispatcher = dispatch.Dispatcher(settings.load(broker_url=clean_redis_url), db=world.db)
    batch_id = world.submit(1)
    world.register()
    with world.db.transaction() as session:
        session.execute(select(Batch.id).where(Batch.id == batch_id).with_for_update())
        ticking = threading.Thread(target=dispatcher.tick)
        ticking.start()
        time.sleep(0.5)
    ticking.join()
    with world.db.reading() as session:
        assert session.get_one(Batch, batch_id).served_at is not None


@pytest.mark.parametrize("at_once", [500, 1])
def test_a_batch_that_the_database_refuses_to_change_holds_up_no_other(
    postgres_world: World, clean_redis_url: str, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    """Nor does it fill each look, of which it is the longest silent part."""
    monkeypatch.setattr(lifecycle, "LOST_AT_ONCE", at_once)
    world = postgres_world
    config = settings.load(broker_url=clean_redis_url, lease_seconds=6.0)
    dispatcher = dispatch.Dispatcher(config, db=world.db)
    damaged = world.submit()
    ids = [world.claimed(world.only_job(batch).id) for batch in (damaged, world.submit())]
    for attempt_id in ids:
        world.expire(attempt_id)
    with world.db.transaction() as session:
        session.execute(
            text(
                "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS"
                " $$ BEGIN RAISE EXCEPTION 'damaged' USING ERRCODE = 'XX001'; END $$"
            )
        )
        session.execute(
            text(
                "CREATE TRIGGER refuse BEFORE UPDATE ON batches FOR EACH ROW"
                f" WHEN (OLD.id = '{damaged}') EXECUTE FUNCTION refuse()"
            )
        )
    looks = [dispatcher.tick().ended_attempts for _ in range(2)]
    assert looks == ([1, 0] if at_once > 1 else [0, 1])
    found = [world.attempt(attempt_id).state for attempt_id in ids]
    assert found == [states.AttemptState.RUNNING, states.AttemptState.LOST]


@pytest.mark.parametrize(("commits", "is_cancelled"), [(True, False), (False, True)])
def test_a_commit_that_is_given_up_is_not_cancelled(
    through: database.Database,
    postgres_proxy: Proxy,
    monkeypatch: pytest.MonkeyPatch,
    commits: bool,
    is_cancelled: bool,
) -> None:
    """PostgreSQL would call it done, though the standby that it waits for has not got it."""
    cancels: list[float] = []
    monkeypatch.setattr(
        patience.PatientConnection, "cancel_safe", lambda _self, *, timeout: cancels.append(timeout)
    )

    def give_up() -> None:
        with through.transaction() as session:
            session.execute(text("SELECT 1"))
            postgres_proxy.fault = Fault.HALF_OPEN
            if not commits:
                session.execute(text("SELECT 2"))

    with pytest.raises(OperationalError, match="no answer within 1 s"):
        give_up()
    assert bool(cancels) is is_cancelled
