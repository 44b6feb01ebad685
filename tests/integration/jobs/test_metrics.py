"""What Prometheus is told is what the tables hold, and grows as counters must."""

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import func, select, update

from jobs import database, expiry, metrics, orders, schedules, totals
from jobs.schema import Attempt, Batch, Firing, Schedule
from jobs.states import FailureKind, FiringState, Misfire, Overlap
from tests.integration.jobs.conftest import QUEUE

REPOSITORY = Path(__file__).resolve().parents[3]


def told(registry: metrics.Registry) -> dict[str, float]:
    """`name{label="value"}` -> value, as a scraper reads it."""
    found = {}
    for family in text_string_to_metric_families(registry.text().decode()):
        for sample in family.samples:
            labels = ",".join(f'{k}="{v}"' for k, v in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def busy_night(world) -> None:
    """Six jobs: one waits, one runs, one is uploaded, the others have ended."""
    batch_id = world.submit(6)
    _, running, uploading, succeeded, failed, lost = world.job_ids(batch_id)
    world.register()
    world.heartbeat(world.claimed(running), stage="denoise", step=1, steps=4)
    world.rendered(world.claimed(uploading))
    winner = world.claimed(succeeded)
    world.rendered(winner)
    world.succeed(winner)
    with world.db.transaction() as session:
        began = database.now(session) - timedelta(seconds=20)
        session.execute(update(Attempt).where(Attempt.id == winner).values(started_at=began))
    world.fail(world.claimed(failed), FailureKind.INPUT)
    world.expire(world.claimed(lost))
    world.end_lost()


def test_every_number_is_that_of_the_tables(world):
    busy_night(world)
    found = told(metrics.Registry(world.db))
    assert {
        'rushes_jobs{state="queued"}': 2,  # with the lost one
        'rushes_jobs{state="running"}': 2,
        'rushes_jobs{state="succeeded"}': 1,
        'rushes_jobs{state="failed"}': 1,
        'rushes_batches_open{state="running"}': 1,
        f'rushes_queue_jobs{{queue="{QUEUE}"}}': 2,
        f'rushes_queue_workers{{queue="{QUEUE}"}}': 1,
        'rushes_attempts_running{stage="denoise"}': 1,
        "rushes_uploads_waiting": 1,
        'rushes_workers{state="alive"}': 1,
        'rushes_workers{state="silent"}': 0,
        "rushes_claims_total": 5,
        'rushes_attempts_total{kind="",state="succeeded"}': 1,
        'rushes_attempts_total{kind="input",state="failed"}': 1,
        'rushes_attempts_total{kind="worker_lost",state="lost"}': 1,
        'rushes_stage_seconds_total{stage="denoise"}': 3.0,  # of both that were rendered
        'rushes_attempt_seconds_bucket{le="15.0"}': 0,
        'rushes_attempt_seconds_bucket{le="30.0"}': 1,
        "rushes_attempt_seconds_count": 1,
    }.items() <= found.items()
    assert found["rushes_attempt_seconds_sum"] == pytest.approx(20, abs=2)


def test_what_is_paused_or_cancelled_waits_for_no_worker(sqlite_world):
    """Else an alert would say that nobody renders it."""
    registry = metrics.Registry(sqlite_world.db)
    queue = f'rushes_queue_jobs{{queue="{QUEUE}"}}'
    waiting, paused, cancelled = (sqlite_world.submit(number) for number in (1, 2, 4))
    assert told(registry)[queue] == 7
    sqlite_world.db.write(orders.pause_batch, paused)
    assert told(registry)[queue] == 5
    sqlite_world.db.write(orders.pause_batch, waiting)
    sqlite_world.db.write(orders.request_cancel, cancelled)
    found = told(registry)
    assert queue not in found
    assert found['rushes_jobs{state="queued"}'] >= 3
    sqlite_world.db.write(orders.resume_batch, waiting)
    assert told(registry)[queue] == 1


def test_failures_are_told_before_there_are_any(sqlite_world):
    """The increase of a series that begins with 1 is 0."""
    found = told(metrics.Registry(sqlite_world.db))
    for kind in FailureKind:
        state = "lost" if kind is FailureKind.WORKER_LOST else "failed"
        assert found[f'rushes_attempts_total{{kind="{kind}",state="{state}"}}'] == 0


def test_counters_are_the_same_whoever_counted_from_when_on(sqlite_world, monkeypatch):
    """Sums over old attempts are kept; what still lives, or is new, is read again."""
    monkeypatch.setattr(metrics, "LATECOMERS", 1)
    early = metrics.Registry(sqlite_world.db)
    told(early)
    busy_night(sqlite_world)
    live = sqlite_world.claimed(sqlite_world.job_ids(sqlite_world.submit(1))[0])
    busy_night(sqlite_world)
    told(early)
    sqlite_world.rendered(live)
    sqlite_world.succeed(live)
    told(early)
    release_all(sqlite_world)  # those that live: then all is settled
    told(early)
    busy_night(sqlite_world)
    counters = [
        {
            name: value
            for name, value in told(registry).items()
            if not name.endswith("oldest_seconds")
        }
        for registry in (early, metrics.Registry(sqlite_world.db))
    ]
    assert counters[0] == counters[1]
    assert counters[0]["rushes_claims_total"] == 16


def release_all(world) -> None:
    with world.db.reading() as session:
        ids = session.scalars(select(Attempt.id)).all()
    for attempt_id in ids:
        world.release(attempt_id)


def counters(registry: metrics.Registry) -> dict[str, float]:
    ends = ("_total", "_count", "_sum", "_bucket")
    return {n: v for n, v in told(registry).items() if n.partition("{")[0].endswith(ends)}


def add_schedule(session) -> None:
    """With a firing of today and one of yesterday."""
    now = database.now(session)
    row = Schedule(
        name="night",
        cron="0 0 * * *",
        zone="UTC",
        misfire=Misfire.SKIP,
        overlap=Overlap.QUEUE,
        prompts="a cat",
        format="text",
        lists={},
        preset="tiny",
        look={},
        options={},
        created_at=now,
        paused_at=now,
    )
    session.add(row)
    session.flush()
    for days, state in enumerate((FiringState.MADE, FiringState.FAILED)):
        at = now - timedelta(days=days)
        session.add(Firing(schedule_id=row.id, fire_at=at, created_at=at, state=state))


def forget_all(world) -> None:
    """As `rushes gc` does with what has ended, and a schedule that is removed with its history."""
    with world.db.transaction() as session:
        session.execute(update(Batch).values(manifest_at=Batch.finished_at))
        now = database.now(session)
        expiry.forget(session, now + timedelta(days=1), keeps_results=True)
        ids = expiry.forgotten(session)
    for batch_id in ids:
        while world.db.write(expiry.delete_jobs, batch_id):
            pass
    assert world.db.write(expiry.delete_rows, *expiry.old_firings(now - timedelta(hours=1))) == 1
    world.db.write(schedules.remove, "night")
    with world.db.reading() as session:
        for table in (Attempt, Firing):
            assert session.scalar(select(func.count()).select_from(table)) == 0


def test_counters_go_on_when_what_they_counted_is_deleted(world, monkeypatch):
    """Of a service that read it before, and of one that begins afterwards."""
    monkeypatch.setattr(metrics, "LATECOMERS", 1)
    monkeypatch.setattr(expiry, "JOBS_AT_ONCE", 2)
    for _ in range(2):
        busy_night(world)
    release_all(world)
    with world.db.transaction() as session:
        add_schedule(session)
        ids = session.scalars(select(Batch.id)).all()
    for batch_id in ids:
        world.cancel_batch(batch_id)
    early = metrics.Registry(world.db)
    before = counters(early)
    assert before['rushes_attempts_total{kind="input",state="failed"}'] == 2
    assert before['rushes_schedule_firings_total{state="made"}'] == 1
    forget_all(world)
    assert counters(early) == counters(metrics.Registry(world.db)) == before
    busy_night(world)
    after = counters(early)
    assert after == counters(metrics.Registry(world.db))
    assert after["rushes_claims_total"] == before["rushes_claims_total"] + 5


def test_what_is_deleted_during_a_scrape_counts_once(world, monkeypatch):
    busy_night(world)
    with world.db.transaction() as session:
        add_schedule(session)
        batch_id = session.scalars(select(Batch.id)).one()
    release_all(world)
    world.cancel_batch(batch_id)
    before = counters(metrics.Registry(world.db))
    past, deleting = totals.past, iter([forget_all])

    def past_then_delete(session):
        found = past(session)
        for delete in deleting:
            delete(world)
        return found

    monkeypatch.setattr(totals, "past", past_then_delete)
    registry = metrics.Registry(world.db)
    assert [counters(registry) for _ in range(2)] == [before, before]


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist(sqlite_world):
    busy_night(sqlite_world)
    families = list(metrics.Farm(sqlite_world.db).collect())
    names = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    names |= {
        f"{family.name}_{end}"
        for family in families
        if family.type == "histogram"
        for end in ("bucket", "sum", "count")
    }
    board = json.loads((REPOSITORY / "deploy/grafana/rushes.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\brushes_\w+", target["expr"])
    }
    assert asked <= names
    rules = (REPOSITORY / "deploy/prometheus/rushes.yml").read_text()
    alerted = set(re.findall(r"\brushes_\w+", rules))
    assert alerted
    assert alerted <= names
    charted = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    shown = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert shown == charted, "each metric has a place on the dashboard"
    documented = (REPOSITORY / "docs/monitoring.md").read_text()
    assert shown == set(re.findall(r"^\| `(rushes_\w+)", documented, re.MULTILINE))
