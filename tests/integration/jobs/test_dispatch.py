"""Which jobs are sent when, with a real Redis, on both databases."""

import itertools
import json
import shutil
import threading
import time
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError, OperationalError
from structlog.testing import capture_logs

from jobs import (
    broker,
    celery_app,
    database,
    dispatch,
    lifecycle,
    looks,
    orders,
    presets,
    queries,
    queues,
    reordering,
    retries,
    schema,
    selection,
    servers,
    settings,
    states,
    workers,
)
from jobs.schema import Batch, Job, Look
from tests.integration.jobs.conftest import PRESET, QUEUE, World
from tests.waiting import until

GONE = "redis://127.0.0.1:1/0"  # nothing listens there


def config_of(world: World, broker_url: str, **values: Any) -> settings.Settings:
    url = world.db.url.render_as_string(hide_password=False)
    return settings.load(database_url=url, broker_url=broker_url, **values)


def dispatcher_of(world: World, broker_url: str, **values: Any) -> dispatch.Dispatcher:
    return dispatch.Dispatcher(config_of(world, broker_url, **values), db=world.db)


@pytest.fixture
def client(clean_redis_url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(clean_redis_url) as client:
        yield client


def sent(client: redis.Redis, queue: str = QUEUE) -> list[int]:
    """The jobs whose messages wait, in the order in which a worker takes them."""
    messages = client.lrange(queue, 0, -1)
    assert isinstance(messages, list)
    return [int(json.loads(m)["headers"]["id"].partition(":")[0]) for m in reversed(messages)]


def age_dispatch(world: World, seconds: float = selection.IN_FLIGHT_SECONDS + 1) -> None:
    """As if the messages had been sent a while ago."""
    with world.db.transaction() as session:
        past = database.now(session) - timedelta(seconds=seconds)
        session.execute(
            update(Job).where(Job.dispatched_at.is_not(None)).values(dispatched_at=past)
        )


def other_model() -> presets.Preset:
    look = PRESET.look.model_copy(update={"model_path": "other"})
    return presets.Preset(
        name="other", path=PRESET.path, description=None, look=look, keys_without_effect=()
    )


def test_a_window_per_live_worker_is_kept_in_redis(
    world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    ids = world.job_ids(world.submit(10))
    dispatcher = dispatcher_of(world, clean_redis_url, window=2)
    world.register("gpu0@here")
    assert dispatcher.tick().sent == 2
    assert sent(client) == ids[:2]
    world.register("gpu1@here")
    assert dispatcher.tick().sent == 2
    assert sent(client) == ids[:4]
    assert dispatcher.tick().sent == 0


def test_a_backlog_that_others_share_keeps_no_other_queue_empty(
    world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    """Most hosts have one model, and one of them a second one as well."""
    other = queues.of_model("other")
    for number in range(5):
        world.register(f"gpu{number}@one")
    world.register("gpu0@both", also=[other])
    common = world.submit(60)
    dispatcher = dispatcher_of(world, clean_redis_url, window=2)
    dispatcher.tick()
    urgent = world.job_ids(world.submit(5, preset=other_model(), priority=9))
    done = 0
    for _ in range(20):
        dispatcher.tick()
        assert len(sent(client)) + len(sent(client, other)) <= 6 * 2
        for job_id in sent(client)[:5]:
            client.rpop(QUEUE)
            world.succeed(world.claimed(job_id, worker=f"gpu{done % 5}@one"))
            done += 1
        if sent(client, other):
            break
    assert sent(client, other) == urgent[:2]
    assert done < 15
    assert world.batch(common).succeeded == done


def test_messages_of_another_version_count_for_everybody(
    world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    ids = world.job_ids(world.submit(5))
    world.register()
    dispatcher = dispatcher_of(world, clean_redis_url, window=2)
    bell = broker.Broker(config_of(world, clean_redis_url))
    bell.send_renders(QUEUE, ids[:1])
    bell.send_renders(QUEUE, ids[1:2], mark="of-workers-that-are-gone")
    assert dispatcher.tick().sent == 0


def test_nothing_is_sent_where_no_live_worker_takes_it(
    world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    world.submit(3)
    world.submit(3, preset=other_model())
    dispatcher = dispatcher_of(world, clean_redis_url)
    assert dispatcher.tick().sent == 0
    world.register("gpu0@here", queue=queues.of_model("other"))
    assert dispatcher.tick().sent == 2
    assert (len(sent(client)), len(sent(client, queues.of_model("other")))) == (0, 2)
    world.silence("gpu0@here")
    client.flushall()
    age_dispatch(world)
    assert dispatcher.tick().sent == 0


def test_higher_priority_goes_first_then_the_older_job(
    world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a"}, {"prompt": "b", "priority": 5}, {"prompt": "c"}]
    slow = world.job_ids(world.submit(rows))
    urgent = world.job_ids(world.submit(1, priority=9))
    background = world.job_ids(world.submit(1, priority=-1))
    world.register()
    assert dispatcher_of(world, clean_redis_url, window=10).tick().sent == 5
    assert sent(client) == [*urgent, slow[1], slow[0], slow[2], *background]


def test_a_job_is_sent_when_its_wait_is_over(
    world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    job_id = world.only_job(world.submit()).id
    later = retries.Budgets(max_errors=3, max_crashes=2, retry_seconds=600.0)
    world.fail(world.claimed(job_id), budgets=later)
    world.register()
    dispatcher = dispatcher_of(world, clean_redis_url)
    assert dispatcher.tick().sent == 0
    world.make_runnable()
    assert dispatcher.tick().sent == 1


def test_messages_that_redis_lost_are_sent_again_and_waiting_ones_are_not_doubled(
    world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    ids = world.job_ids(world.submit(2))
    world.register()
    dispatcher = dispatcher_of(world, clean_redis_url)
    assert dispatcher.tick().sent == 2
    age_dispatch(world)
    assert dispatcher.tick().sent == 0
    client.flushall()
    assert dispatcher.tick().sent == 2
    assert sent(client) == ids
    client.flushall()
    # Just sent: perhaps a worker has taken them and is about to claim.
    assert dispatcher.tick().sent == 0


def test_a_job_that_came_back_is_sent_at_once(
    world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    job_id = world.only_job(world.submit()).id
    world.register()
    dispatcher = dispatcher_of(world, clean_redis_url)
    dispatcher.tick()
    client.flushall()
    world.release(world.claimed(job_id))
    assert dispatcher.tick().sent == 1


def test_two_dispatchers_at_once_send_each_job_once(
    world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    ids = world.job_ids(world.submit(100))
    for number in range(10):
        world.register(f"gpu{number}@here")
    dispatchers = [dispatcher_of(world, clean_redis_url, window=5) for _ in range(4)]
    start = threading.Barrier(4)

    def tick(dispatcher: dispatch.Dispatcher) -> None:
        start.wait()
        for _ in range(3):
            dispatcher.tick()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(tick, dispatchers))
    messages = sent(client)
    assert len(messages) == len(set(messages))
    assert set(messages[:50]) <= set(ids)
    assert len(messages) >= 50


def test_without_redis_lost_attempts_are_ended(world: World) -> None:
    batch_id = world.submit(2)
    first, second = world.job_ids(batch_id)
    world.cancel_job(second)
    attempt_id = world.claimed(first)
    world.expire(attempt_id)
    world.register()
    done = dispatcher_of(world, GONE, max_crashes=1).tick()
    assert (done.sent, done.ended_attempts) == (0, 1)
    assert done.broker_error is not None
    assert "127.0.0.1:1" in done.broker_error
    world.check()


def test_a_password_of_redis_is_not_told(world: World) -> None:
    world.submit()
    world.register()
    done = dispatcher_of(world, "redis://:hunter2@127.0.0.1:1/0").tick()
    assert done.broker_error is not None
    assert "hunter2" not in done.broker_error


def test_sending_goes_on_when_redis_is_back(world: World, tmp_path: Path) -> None:
    """The pooled connections to the old server are no obstacle."""
    ids = world.job_ids(world.submit(4))
    world.register()
    with servers.RedisServer.start(tmp_path / "redis") as server:
        dispatcher = dispatcher_of(world, server.url)
        assert dispatcher.tick().sent == 2
    assert dispatcher.tick().broker_error is not None
    shutil.rmtree(tmp_path / "redis" / "appendonlydir")
    age_dispatch(world)
    with servers.RedisServer.start(tmp_path / "redis", port=server.port) as again:
        assert again.url == server.url
        assert dispatcher.tick().sent == 2
        with redis.Redis.from_url(again.url) as client:
            assert sent(client) == ids[:2]


def test_redis_stays_small_whatever_waits_in_the_database(
    sqlite_world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    world = sqlite_world
    batch_id = world.submit(1)
    columns = ", ".join(c.name for c in Job.__table__.columns if c.name not in ("id", "position"))
    with world.db.transaction() as session:
        session.execute(
            text(
                "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 99999) "  # noqa: S608
                f"INSERT INTO jobs (position, {columns}) SELECT i, {columns} FROM jobs, n"
            )
        )
        session.execute(update(Batch).values(total=100_000, queued=100_000))
    world.check()
    empty = client.info("memory")["used_memory"]
    for number in range(8):
        world.register(f"gpu{number}@here")
    dispatcher = dispatcher_of(world, clean_redis_url)
    started = time.monotonic()
    for _ in range(3):
        dispatcher.tick()
    assert time.monotonic() - started < 5
    assert len(sent(client)) == 16
    assert client.info("memory")["used_memory"] - empty < 1_000_000
    assert world.batch(batch_id).queued == 100_000


def test_a_window_never_outgrows_what_is_read_back(
    world: World, clean_redis_url: str, monkeypatch: pytest.MonkeyPatch, client: redis.Redis
) -> None:
    """Messages beyond that would look lost and be sent again and again."""
    monkeypatch.setattr(broker, "MOST_READ", 3)
    world.submit(10)
    world.register()
    dispatcher = dispatcher_of(world, clean_redis_url, window=8)
    for _ in range(3):
        dispatcher.tick()
        age_dispatch(world)
    assert len(sent(client)) == 3


# What Redis holds.


def test_waiting_reads_what_celery_wrote(world: World, clean_redis_url: str) -> None:
    config = config_of(world, clean_redis_url)
    bell = broker.Broker(config)
    assert bell.waiting(QUEUE) == set()
    assert bell.send_renders(QUEUE, [4711, 2**62]) == 2
    app = celery_app.make(config)
    app.send_task(celery_app.RENDER_TASK, args=[5], queue=QUEUE, task_id="5:abc", priority=0)
    assert bell.waiting(QUEUE) == {4711, 2**62, 5}


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"17",
        b'{"headers": null}',
        b'{"headers": {"id": 7}}',
        b'{"headers": {"id": "a-random-uuid"}}',
        b"[" * 100_000,
        b'{"headers": {"id": "' + b"9" * 5_000 + b'"}}',
    ],
)
def test_broken_messages_are_passed_over(
    sqlite_world: World, clean_redis_url: str, client: redis.Redis, message: bytes
) -> None:
    world = sqlite_world
    job_id = world.only_job(world.submit()).id
    client.rpush(QUEUE, message)
    bell = broker.Broker(config_of(world, clean_redis_url))
    bell.send_renders(QUEUE, [job_id])
    client.rpush(QUEUE, message)
    assert bell.waiting(QUEUE) == {job_id}


def test_a_key_of_another_kind_is_an_outage_and_no_crash(
    world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    client.set(QUEUE, "not a list")
    world.submit()
    world.register()
    assert dispatcher_of(world, clean_redis_url).tick().broker_error is not None


# The loop.


@pytest.fixture
def running(
    world: World, tmp_path: Path
) -> Iterator[Callable[[dispatch.Dispatcher], threading.Event]]:
    stops: list[tuple[threading.Event, threading.Thread]] = []

    def start(dispatcher: dispatch.Dispatcher) -> threading.Event:
        stop = threading.Event()
        thread = threading.Thread(target=dispatcher.run, args=(stop,), name="dispatcher")
        thread.start()
        stops.append((stop, thread))
        return stop

    yield start
    for stop, thread in stops:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def test_a_kick_wakes_the_dispatcher(
    world: World,
    clean_redis_url: str,
    client: redis.Redis,
    running: Callable[[dispatch.Dispatcher], threading.Event],
) -> None:
    ticked = threading.Event()

    class Counting(dispatch.Dispatcher):
        def tick(self) -> dispatch.Tick:
            done = super().tick()
            ticked.set()
            return done

    world.register()
    config = config_of(world, clean_redis_url, tick_seconds=3600)
    stop = running(Counting(config, db=world.db))
    assert ticked.wait(20)
    world.submit()
    bell = broker.Broker(config)
    assert bell.kick() is None
    until(lambda: len(sent(client)) == 1, seconds=5)
    stop.set()
    bell.kick()


@pytest.mark.parametrize("is_there", [True, False], ids=["many kicks", "no Redis"])
def test_the_database_is_not_looked_at_without_a_rest(
    sqlite_world: World, clean_redis_url: str, monkeypatch: pytest.MonkeyPatch, is_there: bool
) -> None:
    monkeypatch.setattr(dispatch, "REST_SECONDS", 0.2)
    url = clean_redis_url if is_there else GONE
    config = config_of(sqlite_world, url, tick_seconds=3600 if is_there else 0.2)
    began, stop = time.monotonic(), threading.Event()
    ticks: list[float] = []

    class Kicked(dispatch.Dispatcher):
        def tick(self) -> dispatch.Tick:
            ticks.append(time.monotonic())
            if len(ticks) == 4:
                stop.set()
            self._broker.kick()  # as workers do all the time
            return super().tick()

    Kicked(config, db=sqlite_world.db).run(stop)
    assert ticks[-1] - began >= 3 * 0.2


def test_a_dispatcher_whose_tick_is_long_stops_soon(
    world: World, clean_redis_url: str, running: Callable[..., threading.Event]
) -> None:
    """Compose kills what takes longer than its grace period."""
    stop = running(dispatcher_of(world, clean_redis_url, tick_seconds=60))
    time.sleep(0.5)  # it listens
    (thread,) = (one for one in threading.enumerate() if one.name == "dispatcher")
    stop.set()
    thread.join(5)
    assert not thread.is_alive()


def test_a_long_tick_ends_when_it_is_over_or_at_a_kick(
    sqlite_world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    dispatcher = dispatcher_of(sqlite_world, clean_redis_url, tick_seconds=3)

    def waited() -> float:
        began = time.monotonic()
        dispatcher._wait(threading.Event(), took=0.0)
        return time.monotonic() - began

    assert 3 <= waited() < 4.5
    client.lpush(broker.KICK_KEY, "1")
    assert waited() < 1


def test_many_kicks_are_one(world: World, clean_redis_url: str, client: redis.Redis) -> None:
    bell = broker.Broker(config_of(world, clean_redis_url))
    for _ in range(50):
        bell.kick()
    assert client.llen(broker.KICK_KEY) == 1
    assert bell.wait_for_kick(0.1) is True
    assert bell.wait_for_kick(0.1) is False


def test_a_kick_without_redis_is_no_error_and_says_why(world: World) -> None:
    refusal = broker.Broker(config_of(world, GONE)).kick()
    assert refusal is not None
    assert "refused" in refusal


def test_the_loop_outlives_the_database_and_redis(
    world: World,
    clean_redis_url: str,
    client: redis.Redis,
    running: Callable[[dispatch.Dispatcher], threading.Event],
) -> None:
    class Faulty(dispatch.Dispatcher):
        def __init__(self, config: settings.Settings, *, db: database.Database) -> None:
            super().__init__(config, db=db)
            self.ticks = 0

        def tick(self) -> dispatch.Tick:
            self.ticks += 1
            return super().tick()

    world.register()
    dispatcher = Faulty(config_of(world, clean_redis_url, tick_seconds=0.05), db=world.db)
    with capture_logs() as logs:
        running(dispatcher)
        until(lambda: dispatcher.ticks > 0, seconds=5)
        with world.db.transaction() as session:
            session.execute(text("ALTER TABLE workers RENAME TO hidden"))
        until(lambda: any(x["event"] == "dispatch.database_unavailable" for x in logs), seconds=20)
        with world.db.transaction() as session:
            session.execute(text("ALTER TABLE hidden RENAME TO workers"))
        client.set(QUEUE, "in the way")
        until(lambda: any(x["event"] == "broker.lost" for x in logs), seconds=5)
        client.delete(QUEUE)
        until(lambda: any(x["event"] == "broker.back" for x in logs), seconds=5)
        world.submit()
        until(lambda: len(sent(client)) == 1, seconds=5)


def test_the_budgets_are_those_of_the_settings(world: World) -> None:
    config = config_of(world, GONE, max_errors=7, max_crashes=5, retry_seconds=3)
    assert retries.budgets(config) == retries.Budgets(
        max_errors=7, max_crashes=5, retry_seconds=3.0
    )


def test_a_broker_password_that_is_not_escaped_is_not_told(world: World) -> None:
    from jobs import errors

    with pytest.raises(errors.InvalidInput, match="CELERY_BROKER_URL has no port") as caught:
        broker.Broker(config_of(world, "redis://:hunter2/pw@127.0.0.1:1/0"))
    assert "hunter2" not in str(caught.value)


def test_a_broker_of_another_kind_is_refused(world: World) -> None:
    from jobs import errors

    with pytest.raises(errors.InvalidInput, match="CELERY_BROKER_URL must begin with redis://"):
        broker.Broker(config_of(world, "amqp://guest@127.0.0.1//"))


def look_of(model_path: str, **changes: Any) -> looks.Look:
    return PRESET.look.with_changes({"model_path": model_path, **changes})


def submit_alternating(world: World, looks: list[looks.Look], number: int) -> None:
    """One batch whose jobs ask for one look after the other, as two submitters' would."""
    world.submit(number)
    with world.db.transaction() as session:
        for look in looks:
            session.merge(
                schema.Look(
                    id=look.id,
                    queue=queues.of_model(look.model_path),
                    body=look.model_dump(mode="json", exclude_defaults=True),
                )
            )
        session.flush()
        for job in session.scalars(select(Job).order_by(Job.id)):
            look = looks[job.position % len(looks)]
            job.look_id, job.queue = look.id, queues.of_model(look.model_path)


def drained(world: World, client: redis.Redis, dispatcher: dispatch.Dispatcher) -> list[int]:
    """One worker takes jobs until there are none; their ids in its order."""
    order = []
    served = [key.decode() for key in client.keys(f"{queues.PREFIX}*")]
    while dispatcher.tick().sent or any(client.llen(queue) for queue in served):
        served = [key.decode() for key in client.keys(f"{queues.PREFIX}*")]
        heads = [(queue, sent(client, queue)) for queue in served]
        queue, ids = next((queue, ids) for queue, ids in heads if ids)
        client.rpop(queue)
        order.append(ids[0])
        assert world.succeed(world.claimed(ids[0]))
    return order


@pytest.mark.parametrize(
    "looks",
    [
        [look_of("one"), look_of("two")],
        [look_of("one"), look_of("one", loras=[{"path": "loras/style.safetensors"}])],
    ],
    ids=["two models", "one model with and without LoRA"],
)
def test_a_worker_switches_weights_far_less_often_than_jobs_do(
    sqlite_world: World, client: redis.Redis, clean_redis_url: str, looks: list[looks.Look]
) -> None:
    """64 jobs that alternate between two sets of weights: a few switches, not 63."""
    world = sqlite_world
    submit_alternating(world, looks, 64)
    served = sorted({queues.of_model(look.model_path) for look in looks})
    world.register(queue=served[0], also=served[1:])
    order = drained(world, client, dispatcher_of(world, clean_redis_url))
    assert sorted(order) == list(range(1, 65))
    kinds = [(job_id - 1) % 2 for job_id in order]
    switches = sum(now != then for then, now in itertools.pairwise(kinds))
    assert switches < 8, switches


def test_a_look_of_a_newer_version_is_sent_as_well(world: World, clean_redis_url: str) -> None:
    """Who goes back to an older version may have such jobs; their workers know, or fail them."""
    world.register()
    world.submit(2)
    with world.db.transaction() as session:
        body = session.scalars(select(Look.body)).first()
        assert body is not None
        session.execute(update(Look).values(body=body | {"tomorrow": 1}))
    assert dispatcher_of(world, clean_redis_url).tick().sent == 2


def test_a_change_of_order_also_moves_what_was_sent_already(
    world: World, client: redis.Redis, clean_redis_url: str
) -> None:
    """However large the window is; a worker that takes one of them meanwhile keeps it."""
    world.register()
    early = world.job_ids(world.submit(6))
    dispatcher = dispatcher_of(world, clean_redis_url, window=4)
    dispatcher.tick()
    assert sent(client) == early[:4]
    client.rpop(QUEUE)
    assert world.claim(early[0]) is not None
    urgent = world.submit(2)
    world.db.write(orders.prioritize_batch, urgent, 10)
    assert reordering.send_anew(config_of(world, clean_redis_url), world.db) is None
    dispatcher.tick()
    assert sent(client) == [*world.job_ids(urgent), *early[1:3]]


@pytest.mark.parametrize(("outages", "still_after"), [(0, 1.0), (1, 3.0)])
def test_silence_while_the_database_was_away_ends_no_attempt(
    sqlite_world: World,
    clean_redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
    outages: int,
    still_after: float,
) -> None:
    """Nobody could renew a lease: after an outage, each worker has a whole lease to report.

    Also after one before this dispatcher, which it knows nothing of.
    """
    world = sqlite_world
    world.submit(1)
    attempt_id = world.claimed(1)
    world.expire(attempt_id)
    dispatcher = dispatcher_of(world, clean_redis_url, tick_seconds=0.05, lease_seconds=2.0)
    stop, real = threading.Event(), lifecycle.end_lost_attempts
    broken = iter([True] * outages)

    def first_without_database(*arguments: Any, **values: Any) -> list[int]:
        if next(broken, False):
            raise OperationalError("select", {}, Exception("gone"))
        return real(*arguments, **values)

    monkeypatch.setattr(lifecycle, "end_lost_attempts", first_without_database)
    thread = threading.Thread(target=dispatcher.run, args=(stop,))
    thread.start()
    try:
        time.sleep(still_after)
        assert world.attempt(attempt_id).state is states.AttemptState.RUNNING
        until(lambda: world.attempt(attempt_id).state is not states.AttemptState.RUNNING)
    finally:
        stop.set()
        thread.join()
    assert world.attempt(attempt_id).state is states.AttemptState.LOST


def test_a_database_that_answers_late_when_jobs_are_chosen_ends_no_attempt(
    sqlite_world: World, clean_redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What froze there may have kept the workers from renewing their leases as well."""
    world = sqlite_world
    world.submit(1)
    attempt_id = world.claimed(1)
    real = queries.live_workers_by_queues

    def late(session: database.Session) -> dict[tuple[str, ...], int]:
        monkeypatch.setattr(queries, "live_workers_by_queues", real)
        time.sleep(0.5)
        return real(session)

    monkeypatch.setattr(queries, "live_workers_by_queues", late)
    dispatcher = dispatcher_of(world, clean_redis_url, lease_seconds=1.8)
    dispatcher.tick()
    world.expire(attempt_id)
    assert dispatcher.tick().ended_attempts == 0
    time.sleep(1.9)
    assert dispatcher.tick().ended_attempts == 1


@pytest.mark.parametrize("part", ["lying", "send_renders"])
def test_a_broker_that_answers_late_keeps_no_dead_worker_alive(
    world: World, clean_redis_url: str, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """Workers say that they are there to the database, which answered them meanwhile."""
    held = world.job_ids(world.submit(1))[0]
    attempt_id = world.claimed(held)
    world.submit(1)
    world.register()
    real, waited = getattr(broker.Broker, part), [0.0]

    def late(*arguments: Any, **values: Any) -> Any:
        waited[0] += 60.0
        return real(*arguments, **values)

    monkeypatch.setattr(broker.Broker, part, late)
    clock = types.SimpleNamespace(monotonic=lambda: time.monotonic() + waited[0])
    monkeypatch.setattr(dispatch, "time", clock)
    dispatcher = dispatcher_of(world, clean_redis_url)
    assert dispatcher.tick().sent == 1
    world.expire(attempt_id)
    assert dispatcher.tick().ended_attempts == 1


@pytest.mark.parametrize("part", ["lost_attempts", "batches_to_stop"])
def test_jobs_are_sent_also_when_what_is_done_before_fails(
    world: World, clean_redis_url: str, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    def broken(_session: database.Session, **_: object) -> None:
        raise OperationalError("select", {}, Exception("damaged"))

    monkeypatch.setattr(lifecycle if part == "lost_attempts" else queries, part, broken)
    world.register()
    world.submit(2)
    dispatcher = dispatcher_of(world, clean_redis_url)
    with pytest.raises(OperationalError, match="damaged"):
        dispatcher.tick()
    with world.db.reading() as session:
        assert len(session.scalars(select(Job.id).where(Job.dispatched_at.is_not(None))).all()) == 2


def test_a_worker_that_refuses_a_queue_is_sent_nothing_of_it(
    world: World, clean_redis_url: str, client: redis.Redis
) -> None:
    """And when every worker refuses it, the jobs wait instead of going round."""
    other = queues.of_model("other")
    world.submit(9)
    world.submit(9, preset=other_model())
    world.register("gpu0@a", also=[other])
    dispatcher = dispatcher_of(world, clean_redis_url, window=2)
    kind = states.FailureKind.WEIGHTS
    world.db.write(workers.refuse, "gpu0@a", queue=QUEUE, kind=kind, reason="gone")
    assert dispatcher.tick().sent == 2
    assert (len(sent(client)), len(sent(client, other))) == (0, 2)
    world.db.write(workers.refuse, "gpu0@a", queue=workers.ALL_QUEUES, kind=kind, reason="disk")
    client.flushall()
    age_dispatch(world)
    assert dispatcher.tick().sent == 0
    world.db.write(workers.accept, "gpu0@a", queue=QUEUE)
    assert dispatcher.tick().sent == 2


def test_a_redis_that_answers_is_back_only_when_it_takes_messages(
    world: World,
    tmp_path: Path,
    running: Callable[[dispatch.Dispatcher], threading.Event],
) -> None:
    """A look that has nothing to send, as between two tries, says nothing about it."""
    ticks: list[dispatch.Tick] = []

    class Noting(dispatch.Dispatcher):
        def tick(self) -> dispatch.Tick:
            ticks.append(super().tick())
            return ticks[-1]

    world.submit()
    world.register()
    with (
        servers.RedisServer.start(tmp_path / "redis") as server,
        redis.Redis.from_url(server.url) as client,
        capture_logs() as logs,
    ):
        client.config_set("maxmemory", "1")
        config = config_of(world, server.url, tick_seconds=0.05)
        running(Noting(config, db=world.db))
        until(lambda: len(ticks) > 4, seconds=20)
        assert ticks[0].broker_error is not None
        assert ticks[1].broker_error is None
        told = [x["event"] for x in logs if x["event"].startswith("broker.")]
        assert told == ["broker.lost"]
        client.config_set("maxmemory", "0")
        until(lambda: any(x["event"] == "broker.back" for x in logs), seconds=20)
        age_dispatch(world)
        until(lambda: len(sent(client)) == 1, seconds=20)


def test_rows_that_are_refused_without_a_word_end_no_look(
    sqlite_world: World, clean_redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by a driver whose error has a code alone."""

    class Wordless(Exception):
        sqlstate = "23000"

    def refuse(*_: object, **__: object) -> None:
        raise IntegrityError("UPDATE", {}, Wordless())

    dispatcher = dispatcher_of(sqlite_world, clean_redis_url)
    monkeypatch.setattr(sqlite_world.db, "write", refuse)
    with capture_logs() as logs:
        assert dispatcher._unless_held_up(selection.mark_served, ["x"]) is None
    assert [each["event"] for each in logs] == ["dispatch.batch_failed"]
