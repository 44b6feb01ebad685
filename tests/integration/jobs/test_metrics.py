"""What Prometheus is told is what the tables hold, and grows as counters must."""

import json
import re
from datetime import timedelta
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from jobs import database, metrics
from jobs.schema import Attempt
from jobs.states import FailureKind
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
    for attempt_id in range(1, 12):
        sqlite_world.release(attempt_id)  # those that live: then all is settled
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


def test_the_dashboard_asks_for_metrics_that_exist(sqlite_world):
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
    charted = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    shown = {family.name + ("_total" if family.type == "counter" else "") for family in families}
    assert shown == charted, "each metric has a place on the dashboard"
    documented = (REPOSITORY / "docs/monitoring.md").read_text()
    assert shown == set(re.findall(r"^\| `(rushes_\w+)", documented, re.MULTILINE))
