"""A lease lives as long as its render goes on, and the render hears when it is over."""

import subprocess
import sys
import textwrap
import threading
import time
from datetime import timedelta

import pytest
import sqlalchemy

from jobs import database, lifecycle, migrate, orders, retries
from jobs.schema import Attempt
from tests.waiting import until
from worker import errors, heartbeat
from worker.settings import WorkerSettings


@pytest.fixture
def claim(host):
    return host.claim(host.submit()[0])


@pytest.fixture
def attempt(host, claim):
    """Reads the attempt's row."""

    def read():
        with host.db.reading() as session:
            return session.get_one(Attempt, claim.attempt_id)

    return read


@pytest.fixture
def heart(host, claim):
    """`heart(lease_seconds=...)`: not started yet."""

    def make(*, lease_seconds=60.0, on_stall=None, worker_settings=host.worker_settings):
        return heartbeat.Heartbeat(
            host.db,
            claim.attempt_id,
            lease_seconds=lease_seconds,
            worker_settings=worker_settings,
            on_stall=on_stall or (lambda: pytest.fail("stalled")),
        )

    return make


def settings_of(**values):
    return WorkerSettings(**{f"RUSHES_{name.upper()}": value for name, value in values.items()})


def keeps_reporting(beating):
    """Renders on until what it is told to raise is raised."""
    until(lambda: beating.reached("denoise", 1, 4))


def test_a_cancelled_job_stops_its_attempt(host, claim, heart):
    with heart() as beating:
        beating.reached("denoise", 0, 4)
        host.db.write(orders.cancel_job, claim.job_id)
        with pytest.raises(errors.AttemptCancelled):
            keeps_reporting(beating)


def test_an_attempt_that_lost_its_job_stops(host, heart):
    with heart() as beating:
        beating.reached("denoise", 0, 4)
        host.db.write(
            lifecycle.end_lost_attempts, budgets=retries.budgets(host.config), worker="cpu0@here"
        )
        with pytest.raises(errors.AttemptSuperseded):
            keeps_reporting(beating)


def test_a_busy_loop_needs_not_report_for_its_lease_to_be_renewed(heart, attempt):
    with heart() as beating:
        beating.reached("denoise", 1, 4)
        first = attempt().lease_until
        until(lambda: attempt().lease_until > first)


def test_the_place_is_written_down(heart, attempt):
    with heart() as beating:
        beating.reached("denoise", 3, 4)
        until(lambda: (attempt().stage, attempt().step, attempt().steps) == ("denoise", 3, 4))


def test_an_interval_longer_than_the_lease_cannot_lose_it(host, heart, attempt):
    own = settings_of(heartbeat_seconds=3600)
    with heart(lease_seconds=2.0, worker_settings=own) as beating:
        beating.reached("denoise", 1, 4)
        first = attempt().heartbeat_at

        def outlived_its_first_lease():
            budgets = retries.budgets(host.config)
            assert host.db.write(lifecycle.end_lost_attempts, budgets=budgets) == []
            return attempt().heartbeat_at > first + timedelta(seconds=2.0)

        until(outlived_its_first_lease)


def test_a_stalled_loop_is_given_up_and_its_lease_runs_out(heart, attempt):
    stalled = threading.Event()
    own = settings_of(stall_seconds=0.2, heartbeat_seconds=0.05)
    with heart(on_stall=stalled.set, worker_settings=own) as beating:
        beating.reached("denoise", 1, 4)
        assert stalled.wait(30)
        last = attempt().lease_until
        beating.reached("denoise", 2, 4)  # too late
    assert attempt().lease_until == last


def ended(claim, *, stall_seconds, body, then="pass", deaf_seconds=60.0, busy_seconds=0.5):
    """A process of its own that does `body` under a heartbeat and `then`, once it has ended."""
    script = textwrap.dedent(f"""
        import ctypes, sqlite3, time
        from jobs import database, lifecycle, settings
        from worker import heartbeat
        from worker.settings import WorkerSettings
        heartbeat.DEAF_SECONDS = {deaf_seconds}
        database.SQLITE_BUSY_SECONDS = {busy_seconds}
        db = database.connect(settings.load())
        own = WorkerSettings(RUSHES_STALL_SECONDS={stall_seconds}, RUSHES_HEARTBEAT_SECONDS=0.05)
        with heartbeat.Heartbeat(
            db, {claim.attempt_id}, lease_seconds=60, worker_settings=own
        ) as heart:
            heart.reached("denoise", 1, 4)
            {body}
        {then}
    """)
    return subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )


def test_a_stalled_process_ends(host, claim):
    """Else it would hold the device for ever, and Celery would think that it works."""
    done = ended(claim, stall_seconds=0.1, body="time.sleep(600)")
    assert done.returncode == heartbeat.STALLED
    assert "time.sleep(600)" in done.stderr or "most recent call first" in done.stderr


def test_a_process_ends_whose_threads_cannot_run_any_more(host, claim):
    """Native code that hangs and keeps the interpreter's lock stops the watchdog's thread too."""
    began = time.monotonic()
    holds_the_lock = "time.sleep(0.3); ctypes.PyDLL(None).sleep(50)"
    done = ended(claim, stall_seconds=0.5, deaf_seconds=0.5, body=holds_the_lock)
    assert done.returncode != 0
    assert time.monotonic() - began < 40
    assert "Timeout" in done.stderr


def test_a_process_ends_whose_heartbeat_meets_a_defect(host, claim):
    """Nobody would renew the lease: the job would be rendered twice at once."""
    broken = "lifecycle.heartbeat = None; [(heart.keep(), time.sleep(0.1)) for _ in range(300)]"
    done = ended(claim, stall_seconds=900, body=broken)
    assert done.returncode == heartbeat.STALLED
    assert "heartbeat.broken" in done.stdout + done.stderr


def test_a_process_whose_database_is_locked_for_long_goes_on(host, claim):
    """Its heartbeat waits for the lock, and not its device for anything."""
    locked = (
        "lock = sqlite3.connect(db.url.database, isolation_level=None);"
        "lock.execute('BEGIN IMMEDIATE');"
        "[(heart.keep(), time.sleep(0.1)) for _ in range(40)];"
        "lock.execute('ROLLBACK')"
    )
    done = ended(claim, stall_seconds=1, deaf_seconds=0.5, busy_seconds=60, body=locked)
    assert done.returncode == 0, done.stderr


def test_the_timer_of_one_outlives_another_that_ends(host, claim):
    """The tail of a job has a heartbeat of its own, which ends while the next one is rendered."""
    other = (
        "heartbeat.Heartbeat(db, 4711, lease_seconds=60, worker_settings=own).__enter__()"
        ".__exit__(None, None, None); ctypes.PyDLL(None).sleep(50)"
    )
    began = time.monotonic()
    done = ended(claim, stall_seconds=2, deaf_seconds=1, body=f"time.sleep(0.3); {other}")
    assert done.returncode != 0
    assert time.monotonic() - began < 40
    assert "Timeout" in done.stderr


def test_a_process_that_has_nothing_to_render_does_not_end(host, claim):
    beats, idle = "time.sleep(0.3)", "time.sleep(2.5)"
    done = ended(claim, stall_seconds=1, deaf_seconds=0.5, body=beats, then=idle)
    assert done.returncode == 0, done.stderr


def test_nobody_renews_the_lease_of_another(host, claim, heart):
    host.db.write(
        lifecycle.end_lost_attempts, budgets=retries.budgets(host.config), worker="cpu0@here"
    )
    holder = host.claim(host.job(claim.job_id))
    (_, before) = host.attempts(claim.job_id)
    with heart() as beating, pytest.raises(errors.AttemptSuperseded):
        keeps_reporting(beating)
    (_, after) = host.attempts(claim.job_id)
    assert holder.attempt_id == after.id
    assert after.lease_until == before.lease_until


def test_a_render_does_not_wait_for_a_locked_database(host, heart, attempt):
    """The lock is held by this very thread: to wait for it would be to wait for ever."""
    with heart() as beating:
        with host.db.transaction() as session:  # a submit of a million rows
            database.now(session)  # takes the lock
            for step in range(50):
                beating.reached("decode", step, 50)
        until(lambda: attempt().step == 49)


def test_an_outage_of_the_database_is_outlived(host, heart, attempt):
    with heart() as beating:
        beating.reached("denoise", 0, 4)
        until(lambda: attempt().stage == "denoise")
        with host.database_outage():
            for step in range(4):
                beating.reached("decode", step, 4)
                beating._report()  # misses for certain
        beating.reached("mux", 0, 1)
        until(lambda: attempt().stage == "mux")


def test_a_pool_without_a_free_connection_is_outlived(host, heart, attempt, monkeypatch):
    """The tail, the device and their heartbeats share a few; one that waits is no dead one."""
    write, missed = host.db.write, threading.Event()

    def busy(*_, **__):
        monkeypatch.setattr(host.db, "write", write)
        missed.set()
        raise sqlalchemy.exc.TimeoutError("QueuePool limit")

    with heart() as beating:
        monkeypatch.setattr(host.db, "write", busy)
        assert missed.wait(30)
        beating.reached("mux", 0, 1)
        until(lambda: attempt().stage == "mux")


def test_connections_that_the_server_ends_are_outlived(postgres_database_url, host, monkeypatch):
    db = database.Database(postgres_database_url)
    migrate.upgrade(db)
    monkeypatch.setattr(host, "db", db)
    job = host.submit()[0]
    claim = host.claim(job)
    admin = sqlalchemy.create_engine(postgres_database_url, isolation_level="AUTOCOMMIT")
    with heartbeat.Heartbeat(
        db, claim.attempt_id, lease_seconds=60.0, worker_settings=host.worker_settings
    ) as beating:
        for step in range(3):
            beating.reached("denoise", step, 4)
            until(lambda step=step: host.attempts(job.id)[0].step == step)
            with admin.connect() as connection:
                connection.execute(
                    sqlalchemy.text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
                    )
                )
        beating.reached("mux", 0, 1)
        until(lambda: host.attempts(job.id)[0].stage == "mux")
    admin.dispose()
    db.close()
