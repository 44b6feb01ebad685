"""Each fire time makes its batch once, whoever looks and however late, as the policies say."""

import errno
import io
import itertools
import random
import sqlite3
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from PIL import Image
from sqlalchemy import func, select, update
from sqlalchemy.exc import OperationalError
from structlog.testing import capture_logs

from jobs import (
    bulk,
    cron,
    database,
    errors,
    firing,
    images,
    inputs,
    listeners,
    outbox,
    presets,
    schedules,
    settings,
    states,
    storage,
    stores,
    submission,
)
from jobs.schema import Batch, Firing, Job, Listener, Notice, Schedule
from tests.integration.jobs.conftest import PRESET, World

ZONES = ("Europe/Berlin", "America/New_York", "Australia/Lord_Howe")
START = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)
MADE, SKIPPED, FAILED = states.FiringState


@dataclass
class Farm:
    """Schedules, several dispatchers that look after them, and a clock that a test moves."""

    world: World
    config: settings.Settings
    now: datetime = START
    clockworks: list[firing.Clockwork] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.clockworks = [
            firing.Clockwork(self.config, db=self.world.db, clock=lambda _: self.now)
            for _ in range(3)
        ]

    def add(self, name: str = "night", *, prompts: str | None = "a cat\n", **given: Any) -> None:
        new = schedules.NewSchedule(
            **{
                "name": name,
                "cron": "30 2 * * *",
                "zone": "Europe/Berlin",
                "preset": PRESET,
                "format": "text",
                "prompts": prompts,
            }
            | given
        )
        with self.world.db.transaction() as session:
            schedules.add(session, schedules.draft(new, now=self.now))

    def tick(self, moment: datetime | None = None) -> int:
        self.now = moment or self.now
        return self.clockworks[0].tick()

    def firings(self, name: str = "night") -> list[Firing]:
        with self.world.db.reading() as session:
            row = schedules.find(session, name)
            return [fired for fired, _ in schedules.history(session, row.id, limit=1000)][::-1]

    def states(self, name: str = "night") -> list[str]:
        return [fired.state for fired in self.firings(name)]

    def prompts(self) -> list[str]:
        with self.world.db.reading() as session:
            return list(session.scalars(select(Job.prompt).order_by(Job.id)))

    def batches(self) -> int:
        with self.world.db.reading() as session:
            return session.scalar(select(func.count()).select_from(Batch)) or 0

    def schedule(self, name: str = "night") -> Schedule:
        with self.world.db.reading() as session:
            return schedules.find(session, name)


@pytest.fixture
def config(tmp_path, monkeypatch: pytest.MonkeyPatch) -> settings.Settings:
    (tmp_path / "results").mkdir()
    monkeypatch.setenv("RUSHES_RESULTS_URL", (tmp_path / "results").as_uri())
    return settings.load()


@pytest.fixture
def farm(world: World, config: settings.Settings) -> Farm:
    return Farm(world, config)


@pytest.fixture
def sqlite_farm(sqlite_world: World, config: settings.Settings) -> Farm:
    return Farm(sqlite_world, config)


def test_a_year_of_three_dispatchers_makes_each_batch_once(sqlite_farm: Farm) -> None:
    """Sundays: on these the clocks change, and two o'clock is left out or comes twice."""
    farm = sqlite_farm
    moments = set()
    for zone in ZONES:
        farm.add(zone.replace("/", " "), cron="30 2 * * SUN", zone=zone)
        for moment in cron.parse("30 2 * * SUN", zone).after(START):
            if moment >= START + 365 * DAY:
                break
            moments.add(moment)
    with ThreadPoolExecutor(3) as pool:
        for moment in sorted(moments):
            assert farm.tick(moment - timedelta(seconds=1)) == 0
            farm.now = moment
            list(pool.map(firing.Clockwork.tick, farm.clockworks))
    for zone in ZONES:
        found = farm.firings(zone.replace("/", " "))
        dates = [fired.fire_at.astimezone(cron.parse("* * * * *", zone).zone) for fired in found]
        assert len(dates) == 52
        assert {later - earlier for earlier, later in itertools.pairwise(dates)} <= {
            timedelta(days=7, minutes=minutes) for minutes in (-60, -30, 0, 30, 60)
        }
        assert {moment.strftime("%a") for moment in dates} == {"Sun"}
        # 02:30, or where that is left out, the moment when the clock jumps past it.
        odd = {moment.strftime("%m-%d %H:%M") for moment in dates if moment.minute != 30}
        assert odd <= {"03-29 03:00", "03-08 03:00"}
        assert {fired.state for fired in found} == {MADE}
        assert len({fired.batch_id for fired in found}) == 52
    assert farm.batches() == 3 * 52
    farm.world.check()


def test_dispatchers_that_prepare_the_same_firing_at_once_make_one_batch(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the courtesy that keeps them apart, the lock and the counts decide alone."""
    monkeypatch.setattr(firing, "BUSY", timedelta(seconds=-1))
    together = threading.Barrier(3, timeout=30)
    plan = firing.submission.plan

    def slowly(*given: Any, **more: Any) -> Any:
        checked = plan(*given, **more)
        together.wait()
        return checked

    monkeypatch.setattr(firing.submission, "plan", slowly)
    farm.add(cron="0 * * * *")
    with ThreadPoolExecutor(3) as pool:
        for hour in range(1, 6):
            farm.now = START + timedelta(hours=hour)
            made = list(pool.map(firing.Clockwork.tick, farm.clockworks))
            assert sorted(made) == [0, 0, 1]
    assert farm.batches() == 5
    assert farm.schedule().counter == 5


@pytest.mark.parametrize(
    ("misfire", "catch_up", "expected"),
    [
        ("skip", 1, [SKIPPED]),
        ("run_once", 1, [SKIPPED, MADE]),
        ("catch_up", 3, [SKIPPED, MADE, MADE, MADE]),
        ("catch_up", 100, [MADE] * 10),
    ],
)
def test_what_was_missed_is_made_up_for_as_the_policy_says(
    sqlite_farm: Farm, misfire: str, catch_up: int, expected: list[str]
) -> None:
    farm = sqlite_farm
    farm.add(misfire=states.Misfire(misfire), catch_up=catch_up)
    farm.tick(START + 9 * DAY + timedelta(hours=6))  # ten nights without a dispatcher
    found = farm.firings()
    assert [fired.state for fired in found] == expected
    made = [fired.fire_at for fired in found if fired.state is MADE]
    assert made == [
        datetime(2026, 1, 11 - nights, 1, 30, tzinfo=UTC)
        for nights in range(1, len(made) + 1)
    ][::-1]  # fmt: skip
    if SKIPPED in expected:
        assert misfire in found[0].reason
        assert "2026-01-01 02:30" in found[0].reason
    # The next night is on time again.
    farm.tick(START + 10 * DAY + timedelta(hours=1, minutes=31))
    assert farm.states() == [*expected, MADE]


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize(
    ("misfire", "catch_up"), [("skip", 1), ("run_once", 1), ("catch_up", 3), ("catch_up", 12)]
)
def test_over_a_year_of_outages_each_fire_time_is_made_or_skipped_once(
    zone: str, misfire: str, catch_up: int
) -> None:
    """Outages begin and end anywhere, on the days of clock changes too."""
    new = schedules.NewSchedule(
        name="night",
        cron="30 2,14 * * *",
        zone=zone,
        preset=PRESET,
        format="text",
        prompts="a cat\n",
        misfire=states.Misfire(misfire),
        catch_up=catch_up,
    )
    schedule, dice = schedules.draft(new, now=START), random.Random(zone)
    now, covered, made_late = START, [], Counter[datetime]()
    while now < START + 365 * DAY:
        now += timedelta(minutes=dice.choice((4, 700, 721, 4_000, 20_000)))
        while schedule.next_fire_at <= now:
            first = schedule.next_fire_at
            due = schedules.decide(schedule, now, has_open_batch=False)
            assert due.skipped is not None or due.fire_at == first
            covered.append((first, due.fire_at))
            if due.skipped is None and due.fire_at < now - schedules.LATE:
                made_late[now] += 1
            if misfire == "skip":
                assert due.skipped or due.fire_at >= now - schedules.LATE
            schedule.next_fire_at = due.next_fire_at
    most = max(made_late.values(), default=0)
    assert (
        most > 3 if catch_up == 12 else most == {"skip": 0, "run_once": 1, "catch_up": 3}[misfire]
    )
    # Each decision begins where the one before it ended: nothing twice, nothing left out.
    rule = schedules.rule_of(schedule)
    assert covered[0][0] == rule.next(START)
    for (_, last), (first, _) in itertools.pairwise(covered):
        assert rule.next(last) == first


def test_a_restart_of_five_minutes_misses_nothing(sqlite_farm: Farm) -> None:
    farm = sqlite_farm
    farm.add(cron="* * * * *", misfire=states.Misfire.SKIP)
    farm.tick(START + timedelta(minutes=4))
    assert farm.states() == [MADE] * 4


@pytest.mark.parametrize("misfire", states.Misfire)
def test_what_is_taken_up_in_time_is_not_missed_in_an_outage(
    sqlite_farm: Farm, monkeypatch: pytest.MonkeyPatch, misfire: states.Misfire
) -> None:
    farm = sqlite_farm
    farm.add("a", cron="0 0 * * *", prompts=None, prompts_url="s3://b/k", misfire=misfire)

    def away(*_: object) -> bytes:
        raise storage.StorageUnavailable("s3://b", "does not answer")

    midnight = farm.schedule("a").next_fire_at
    with monkeypatch.context() as outage:
        outage.setattr(firing, "read_url", away)
        for minutes in (1, 6, 20):
            with pytest.raises(storage.StorageUnavailable):
                farm.tick(midnight + timedelta(minutes=minutes))
    assert farm.states("a") == []
    monkeypatch.setattr(firing, "read_url", lambda *_: b"a cat")
    farm.tick(midnight + timedelta(minutes=59))
    assert farm.states("a") == [MADE]


def test_what_one_took_up_in_time_is_not_missed_for_one_that_starts_later(
    sqlite_farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm = sqlite_farm
    skip = states.Misfire.SKIP
    farm.add("a", cron="0 0 * * *", prompts=None, prompts_url="s3://b/k", misfire=skip)

    def away(*_: object) -> bytes:
        raise storage.StorageUnavailable("s3://b", "does not answer")

    monkeypatch.setattr(firing, "read_url", away)
    midnight = farm.schedule("a").next_fire_at
    for number, minutes in ((0, 1), (1, 9), (2, 58)):
        farm.now = midnight + timedelta(minutes=minutes)
        with pytest.raises(storage.StorageUnavailable):
            farm.clockworks[number].tick()
    farm.tick(midnight + timedelta(minutes=61))
    assert farm.states("a") == [SKIPPED]
    # A mark of before a pause says nothing of the time after it.
    farm.world.db.write(schedules.pause, "a")
    assert farm.schedule("a").busy_until is None


def test_a_slow_neighbour_makes_nobody_late(
    sqlite_farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm = sqlite_farm
    for name in ("a", "b"):
        farm.add(name, cron="0 0 * * *", misfire=states.Misfire.SKIP)
    submit = submission.submit

    def slow(*args: Any, **kwargs: Any) -> submission.Submission:
        farm.now += timedelta(minutes=6)
        return submit(*args, **kwargs)

    monkeypatch.setattr(submission, "submit", slow)
    farm.tick(farm.schedule("a").next_fire_at)
    assert farm.states("a") == farm.states("b") == [MADE]


def test_a_fire_time_that_its_rule_does_not_have_any_more_holds_up_nothing(
    sqlite_farm: Farm,
) -> None:
    """A country changed its clock, and this host knows of it since today."""
    farm = sqlite_farm
    farm.add("a", cron="0 0 * * *")
    with farm.world.db.transaction() as session:
        row = schedules.find(session, "a")
        row.next_fire_at = moved = row.next_fire_at + timedelta(hours=1)
    farm.tick(moved + timedelta(minutes=30))
    assert farm.states("a") == [SKIPPED]
    farm.tick(farm.schedule("a").next_fire_at)
    assert farm.states("a") == [SKIPPED, MADE]


def test_the_overlap_policy_decides_while_a_batch_is_open(sqlite_farm: Farm) -> None:
    farm = sqlite_farm
    farm.add("queue", cron="0 * * * *", overlap=states.Overlap.QUEUE)
    farm.add("skip", cron="0 * * * *", overlap=states.Overlap.SKIP)
    for hour in (1, 2):
        farm.tick(START + timedelta(hours=hour))
    assert farm.states("queue") == [MADE, MADE]
    assert farm.states("skip") == [MADE, SKIPPED]
    first, second = farm.firings("skip")
    assert "overlap policy skip" in second.reason
    farm.world.cancel_batch(first.batch_id)
    farm.tick(START + timedelta(hours=3))
    assert farm.states("skip") == [MADE, SKIPPED, MADE]


def test_variables_count_batches_and_not_what_was_skipped(sqlite_farm: Farm) -> None:
    farm = sqlite_farm
    farm.add(
        cron="0 2 * * *",
        prompts="{{counter}} {{style}} {{date}}\n",
        lists={"style": ["noir", "anime"]},
        misfire=states.Misfire.CATCH_UP,
        catch_up=3,
    )
    farm.tick(START + 5 * DAY)
    assert farm.prompts() == ["1 noir 2026-01-03", "2 anime 2026-01-04", "3 noir 2026-01-05"]


def test_prompts_that_cannot_be_used_are_a_failed_firing_and_the_rule_goes_on(
    sqlite_farm: Farm,
) -> None:
    farm = sqlite_farm
    farm.add(prompts='{"promt": "x"}\n', format="jsonl")
    farm.tick(START + timedelta(hours=2))
    farm.tick(START + timedelta(hours=26))
    assert farm.states() == [FAILED, FAILED]
    assert "did you mean prompt" in farm.firings()[0].reason
    assert farm.batches() == 0
    assert farm.schedule().next_fire_at > farm.now


@pytest.mark.parametrize(("word", "told"), [("a\0b", "a\\0b"), ("a\udcffb", "a\\udcffb")])
def test_reasons_that_no_database_takes_are_told_in_others(
    sqlite_farm: Farm, monkeypatch: pytest.MonkeyPatch, word: str, told: str
) -> None:
    """Or each dispatcher would end at this schedule, and fire no other one."""
    farm = sqlite_farm
    for name in ("a", "b"):
        farm.add(name)
    with farm.world.db.transaction() as session:
        url, events = "https://hooks.example/x", (outbox.SCHEDULE_FAILED,)
        listeners.add(session, name="me", url=url, owner=None, events=events)

    def refuse(*_: object) -> bytes:
        raise errors.RushesError(word)

    monkeypatch.setattr(firing, "_prompts", refuse)
    farm.tick(START + timedelta(hours=2))
    for name in ("a", "b"):
        assert told in farm.firings(name)[0].reason
    with farm.world.db.reading() as session:
        bodies = session.scalars(select(Notice.body)).all()
    assert all(told in body["data"]["reason"] for body in bodies)
    assert len(bodies) == 2


def test_a_defect_that_one_schedule_meets_ends_nothing(
    sqlite_farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm = sqlite_farm
    farm.add("a", prompts='{"promt": "x"}\n', format="jsonl")
    farm.add("b")

    def tell(*_: object, **__: object) -> None:
        raise AssertionError("a defect")

    monkeypatch.setattr(outbox, "tell", tell)
    with pytest.raises(AssertionError, match="a defect"):
        farm.tick(START + timedelta(hours=2))
    assert (farm.states("a"), farm.states("b")) == ([], [MADE])


def test_who_asked_is_told_of_a_fire_time_that_made_no_batch(sqlite_farm: Farm) -> None:
    farm = sqlite_farm
    with farm.world.db.transaction() as session:
        for name, owner in (("anns", "ann"), ("bens", "ben"), ("everybodys", None)):
            url, events = "https://hooks.example/x", (outbox.SCHEDULE_FAILED,)
            listeners.add(session, name=name, url=url, owner=owner, events=events)
    farm.add(prompts='{"promt": "x"}\n', format="jsonl", owner="ann")
    farm.add("good", owner="ann")
    farm.tick(START + timedelta(hours=2))
    with farm.world.db.reading() as session:
        told = session.execute(select(Listener.name, Notice.body).join(Notice)).all()
    assert sorted(name for name, _ in told) == ["anns", "everybodys"]
    for _, body in told:
        assert body["type"] == "schedule.failed"
        assert body["data"]["fire_at"] == "2026-01-01T01:30:00+00:00"
        assert (body["data"]["schedule"], body["data"]["owner"]) == ("night", "ann")
        assert "did you mean prompt" in body["data"]["reason"]


def test_a_prompt_file_in_a_bucket_is_read_anew_and_waited_for(
    s3: dict[str, str], sqlite_world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.items():
        monkeypatch.setenv(name, value)
    config = settings.load()
    farm = Farm(sqlite_world, config)
    store = stores.open_store(config)
    url = store.address("prompts.txt")
    store.put_bytes(b"first\n", "prompts.txt", content_type="text/plain")
    farm.add(cron="0 * * * *", prompts=None, prompts_url=url)
    farm.tick(START + timedelta(hours=1))
    store.put_bytes(b"second\nthird\n", "prompts.txt", content_type="text/plain")
    farm.tick(START + timedelta(hours=2))
    assert farm.prompts() == ["first", "second", "third"]
    store.delete("prompts.txt")
    farm.tick(START + timedelta(hours=3))
    assert farm.states() == [MADE, MADE, FAILED]
    store.put_bytes(b"fourth\n", "prompts.txt", content_type="text/plain")
    away = config.model_copy(update={"s3_endpoint_url": "http://127.0.0.1:1"})
    farm.now = START + timedelta(hours=4)
    with pytest.raises(storage.StorageUnavailable):
        firing.Clockwork(away, db=farm.world.db, clock=lambda _: farm.now).tick()
    assert len(farm.firings()) == 3
    farm.now += firing.BUSY + timedelta(seconds=1)
    assert farm.tick() == 1
    assert farm.prompts()[-1] == "fourth"
    monkeypatch.setattr(firing, "MAX_URL_BYTES", 6)
    farm.tick(START + timedelta(hours=5))
    assert farm.states()[-1] == FAILED
    assert "is larger than" in farm.firings()[-1].reason


def test_one_whose_store_is_away_does_not_hold_up_the_others(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch, config: settings.Settings
) -> None:
    farm = Farm(sqlite_world, config)
    farm.add("a", cron="0 * * * *", prompts=None, prompts_url="s3://bucket/key")
    farm.add("b", cron="0 * * * *")

    def away(*_: object) -> bytes:
        raise storage.StorageUnavailable("s3://bucket", "does not answer")

    monkeypatch.setattr(firing, "read_url", away)
    with pytest.raises(storage.StorageUnavailable):
        farm.tick(START + timedelta(hours=1))
    assert farm.states("b") == [MADE]
    assert farm.states("a") == []


def test_the_server_of_an_image_is_waited_for_but_not_for_ever(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch, config: settings.Settings
) -> None:
    farm = Farm(sqlite_world, config)
    data = io.BytesIO()
    Image.new("RGB", (32, 32)).save(data, "PNG")
    picture = data.getvalue()
    is_away = True

    def fetch(source: str, **_: object) -> images.FetchedImage:
        if is_away or source == "https://gone.example/":
            raise images.ImageUnreachable(source, "cannot be fetched: no answer; try again later")
        return images.examine(picture, source)

    monkeypatch.setattr(images, "fetch", fetch)
    look = presets.load("tiny_i2v")
    for name, host in (("a", "here"), ("b", "gone")):
        prompts = f'{{"prompt": "x", "image": "https://{host}.example/"}}\n'
        farm.add(name, cron="0 0 * * *", zone="UTC", preset=look, format="jsonl", prompts=prompts)
    midnight = START + DAY
    for minutes in (0, 3, 6):
        with pytest.raises(inputs.ImageAway, match="no answer"):
            farm.tick(midnight + timedelta(minutes=minutes))
    assert farm.states("a") == farm.states("b") == []
    is_away = False
    with pytest.raises(inputs.ImageAway, match=r"gone\.example"):
        farm.tick(midnight + timedelta(minutes=59))
    assert farm.states("a") == [MADE]
    assert farm.tick(midnight + timedelta(minutes=62)) == 0
    assert farm.states("b") == [FAILED]
    assert "no answer" in farm.firings("b")[0].reason
    # One that starts late has not asked before.
    late = firing.Clockwork(config, db=farm.world.db, clock=lambda _: farm.now)
    farm.now = midnight + DAY + timedelta(hours=3)
    with pytest.raises(inputs.ImageAway):
        late.tick()
    assert farm.states("a") == [MADE, MADE]
    farm.now += timedelta(hours=2)
    assert late.tick() == 0
    assert farm.states("b") == [FAILED, FAILED]


def test_a_store_that_refuses_us_is_waited_for_but_not_for_ever(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch, config: settings.Settings
) -> None:
    """An image cannot be laid there while its keys are renewed."""
    farm = Farm(sqlite_world, config)
    data = io.BytesIO()
    Image.new("RGB", (32, 32)).save(data, "PNG")
    picture = images.examine(data.getvalue(), "x")
    monkeypatch.setattr(images, "fetch", lambda *_, **__: picture)
    prompts = '{"prompt": "x", "image": "https://here.example/"}\n'
    look = presets.load("tiny_i2v")
    farm.add("a", cron="0 0 * * *", zone="UTC", preset=look, format="jsonl", prompts=prompts)

    def refuse(*_: object) -> str:
        raise storage.StorageDenied("s3://b/k", "answers 400 ExpiredToken")

    midnight = START + DAY
    with monkeypatch.context() as outage:
        outage.setattr(images, "store_once", refuse)
        for minutes in (0, 3, 6):
            with pytest.raises(storage.StorageDenied):
                farm.tick(midnight + timedelta(minutes=minutes))
        assert farm.states("a") == []
    farm.tick(midnight + timedelta(minutes=9))
    assert farm.states("a") == [MADE]
    monkeypatch.setattr(images, "store_once", refuse)
    with pytest.raises(storage.StorageDenied):
        farm.tick(midnight + DAY)
    assert farm.tick(midnight + DAY + timedelta(minutes=62)) == 0
    assert farm.states("a") == [MADE, FAILED]
    assert "ExpiredToken" in farm.firings("a")[-1].reason


def test_prompts_in_a_bucket_wait_for_new_keys_and_not_for_rights(
    sqlite_world: World, monkeypatch: pytest.MonkeyPatch, config: settings.Settings
) -> None:
    farm = Farm(sqlite_world, config)
    for name in ("a", "b"):
        farm.add(name, cron="0 * * * *", prompts=None, prompts_url=f"s3://{name}{name}{name}/key")

    class Bucket:
        def __init__(self, name: str) -> None:
            self.is_ours = name == "aaa"

        def head(self, key: str) -> storage.ObjectHead:
            kind = storage.KeysRefused if self.is_ours else storage.StorageDenied
            raise kind(key, "says no")

    monkeypatch.setattr(stores, "open_bucket", lambda _, name: Bucket(name))
    with pytest.raises(storage.KeysRefused):
        farm.tick(START + timedelta(hours=1))
    assert (farm.states("a"), farm.states("b")) == ([], [FAILED])


def test_one_that_cannot_be_read_is_left_to_others_and_holds_up_no_other(
    sqlite_farm: Farm,
) -> None:
    """Its look or options are of a later version, or its zone is not known on this machine."""
    farm = sqlite_farm
    for name in ("a", "b", "c", "d"):
        farm.add(name, cron="0 * * * *")
    with farm.world.db.transaction() as session:
        options = {**session.scalars(select(Schedule.options)).first(), "with_sound": True}
        session.execute(update(Schedule).where(Schedule.name == "d").values(options=options))
        later = Schedule.name == "a"
        look = {**session.scalars(select(Schedule.look)).first(), "of_tomorrow": 1}
        session.execute(update(Schedule).where(later).values(look=look))
        session.execute(update(Schedule).where(Schedule.name == "b").values(zone="Moon/Dark"))
    with capture_logs() as logs:
        assert farm.tick(START + timedelta(hours=1)) == 1
    delayed = {
        each["schedule"]: each["error"] for each in logs if "schedule.delayed" in each.values()
    }
    assert "cannot render what was stored: of_tomorrow" in delayed["a"]
    assert "cannot render what was stored: with_sound" in delayed["d"]
    assert [farm.states(name) for name in "abcd"] == [[], [], [MADE], []]
    with pytest.raises(firing.FromLaterVersion, match="of_tomorrow"):
        firing.fire_now(farm.config, farm.world.db, "a")
    look = dict(look)
    del look["of_tomorrow"]
    with farm.world.db.transaction() as session:  # as a newer dispatcher would read it
        session.execute(update(Schedule).where(later).values(look=look))
    with capture_logs() as logs:
        assert farm.tick() == 0  # it was told, and is left to others for a while
        assert logs == []
    # Of two that look at the same moments the one that can is not kept from it by the other.
    assert farm.clockworks[1].tick() == 1
    assert farm.states("a") == [MADE]


def test_one_that_nobody_could_read_in_time_is_made_by_who_can_within_the_hour(
    sqlite_farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    farm = sqlite_farm
    farm.add("a", cron="0 0 * * *", misfire=states.Misfire.SKIP)
    midnight = farm.schedule("a").next_fire_at
    with monkeypatch.context() as patched:
        patched.setattr(firing, "_preset_of", lambda _: 1 / 0)
        farm.now = midnight + timedelta(minutes=1)
        assert [each.tick() for each in farm.clockworks[:2]] == [0, 0]
    farm.now = midnight + timedelta(minutes=20)
    assert farm.clockworks[2].tick() == 1
    assert farm.states("a") == [MADE]


def test_a_full_disk_delays(sqlite_farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    farm = sqlite_farm
    farm.add("a", cron="0 * * * *")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(bulk.Spool, "add", full)
        with pytest.raises(OSError, match="No space"):
            farm.tick(START + timedelta(hours=1))
    assert farm.states("a") == []
    farm.tick(START + timedelta(hours=1, minutes=5))
    assert farm.states("a") == [MADE]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        sqlite3.OperationalError("disk I/O error"),
        OperationalError("SELECT", {}, Exception("no answer")),
        storage.StorageUnavailable("s3://here", "no answer"),
        AssertionError("a defect"),
    ],
    ids=lambda error: type(error).__module__,
)
def test_the_loop_outlives_whatever_happens(
    sqlite_farm: Farm, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Else the dispatcher would end with it, and nothing would be rendered."""
    monkeypatch.setattr(firing, "AGAIN_SECONDS", 0.01)
    stop, ticks = threading.Event(), itertools.count()

    def tick() -> int:
        if next(ticks) == 0:
            raise error
        stop.set()
        return 0

    (clockwork, *_) = sqlite_farm.clockworks
    monkeypatch.setattr(clockwork, "tick", tick)
    clockwork.run(stop)
    assert next(ticks) == 2


def test_a_paused_schedule_does_not_fire_and_a_resumed_one_looks_ahead(sqlite_farm: Farm) -> None:
    farm = sqlite_farm
    farm.now = datetime.now(UTC)
    farm.add()
    assert farm.world.db.write(schedules.pause, "night")
    assert not farm.world.db.write(schedules.pause, "night")
    farm.tick(farm.now + 3 * DAY)
    assert farm.states() == []
    with farm.world.db.reading() as session:
        assert schedules.coming(session, farm.schedule(), 5) == []
    assert farm.world.db.write(schedules.resume, "night")
    assert farm.schedule().next_fire_at > datetime.now(UTC)
    with farm.world.db.reading() as session:
        times = schedules.coming(session, farm.schedule(), 5)
    assert len(times) == 5
    assert times == sorted(set(times))


def test_run_now_makes_a_batch_beside_the_rule_even_while_paused(farm: Farm) -> None:
    farm.add(prompts="{{counter}}\n")
    farm.world.db.write(schedules.pause, "night")
    batch_id, is_new = firing.fire_now(farm.config, farm.world.db, "night")
    assert is_new
    (fired,) = farm.firings()
    assert (fired.state, fired.is_manual, fired.batch_id) == (MADE, True, batch_id)
    assert farm.world.only_job(batch_id).prompt == "1"
    assert farm.schedule().next_fire_at is None


@pytest.mark.parametrize("format_", ["text", "jsonl"], ids=["good", "bad"])
def test_a_pause_while_a_batch_is_prepared_holds(
    farm: Farm, monkeypatch: pytest.MonkeyPatch, format_: str
) -> None:
    farm.add(cron="0 * * * *", format=format_)
    submit = submission.submit

    def late(*arguments: Any, **options: Any) -> submission.Submission:
        farm.world.db.write(schedules.pause, "night")
        return submit(*arguments, **options)

    monkeypatch.setattr(submission, "submit", late)
    farm.tick(START + timedelta(hours=1))
    assert (farm.batches(), farm.states()) == (0, [])
    assert farm.schedule().next_fire_at is None


@pytest.fixture
def overtaken(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody runs it now while its next batch is being prepared."""
    submit = submission.submit

    def late(*arguments: Any, **options: Any) -> submission.Submission:
        monkeypatch.setattr(submission, "submit", submit)
        firing.fire_now(farm.config, farm.world.db, "night")
        return submit(*arguments, **options)

    monkeypatch.setattr(submission, "submit", late)


@pytest.mark.usefixtures("overtaken")
def test_of_two_that_run_it_now_one_is_told_to_try_again(farm: Farm) -> None:
    """Else both would have the same counter in their prompts."""
    farm.add(prompts="{{counter}}\n")
    with pytest.raises(firing.Overtaken):
        firing.fire_now(farm.config, farm.world.db, "night")
    assert farm.prompts() == ["1"]


def test_of_two_that_run_it_now_with_one_key_both_get_one_batch(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the second one comes a minute later: the batch's name has its minute."""
    farm.add(prompts="{{counter}}\n")
    submit, now, made = submission.submit, database.now, []

    def late(*arguments: Any, **options: Any) -> submission.Submission:
        monkeypatch.setattr(submission, "submit", submit)
        made.append(firing.fire_now(farm.config, farm.world.db, "night", key="k"))
        return submit(*arguments, **options)

    monkeypatch.setattr(submission, "submit", late)
    made.append(firing.fire_now(farm.config, farm.world.db, "night", key="k"))
    monkeypatch.setattr(database, "now", lambda session: now(session) + timedelta(minutes=1))
    made.append(firing.fire_now(farm.config, farm.world.db, "night", key="k"))
    assert made == [(made[0][0], True), (made[0][0], False), (made[0][0], False)]
    assert firing.fire_now(farm.config, farm.world.db, "night", key="other")[1]
    assert farm.prompts() == ["1", "2"]
    assert farm.schedule().counter == 2


@pytest.mark.usefixtures("overtaken")
def test_a_fire_time_that_somebody_overtakes_is_made_with_the_next_counter(farm: Farm) -> None:
    farm.add(prompts="{{counter}}\n", cron="0 * * * *")
    farm.tick(START + timedelta(hours=1))
    assert farm.prompts() == ["1"]
    farm.tick(START + timedelta(hours=1) + 2 * firing.BUSY)
    assert farm.prompts() == ["1", "2"]


def test_removing_leaves_the_batches(farm: Farm) -> None:
    farm.add(cron="0 * * * *")
    farm.tick(START + timedelta(hours=1))
    farm.world.db.write(schedules.remove, "night")
    assert farm.batches() == 1
    farm.tick(START + timedelta(hours=2))
    assert farm.batches() == 1
    with pytest.raises(errors.NotFound):
        farm.schedule()


def test_a_second_schedule_of_the_same_name_is_refused(sqlite_farm: Farm) -> None:
    sqlite_farm.add()
    with pytest.raises(errors.InvalidInput, match="of this name"):
        sqlite_farm.add()


def test_a_schedule_whose_prompts_are_bad_is_not_stored(sqlite_farm: Farm) -> None:
    new = schedules.NewSchedule(
        name="night",
        cron="0 2 * * *",
        zone="UTC",
        preset=PRESET,
        format="text",
        prompts="a {{nothing}}\n",
    )
    with pytest.raises(errors.InvalidInput, match="unknown variable"):
        firing.add(sqlite_farm.config, sqlite_farm.world.db, new)
    with sqlite_farm.world.db.reading() as session:
        assert schedules.every(session) == []


def test_the_look_is_that_of_the_day_when_it_was_added(sqlite_farm: Farm) -> None:
    farm = sqlite_farm
    farm.add(cron="0 * * * *")
    farm.tick(START + timedelta(hours=1))
    with farm.world.db.reading() as session:
        looks = Counter(session.scalars(select(Job.look_id)))
    assert looks == {PRESET.look.id: 1}
