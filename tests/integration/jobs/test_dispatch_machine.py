"""The lifecycle's machine with a dispatcher and a real Redis that loses and doubles messages."""

from datetime import timedelta
from typing import Any

import pytest
from hypothesis import Phase
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule
from sqlalchemy import select

from jobs import broker, dispatch, health, selection, settings
from jobs.schema import Job
from jobs.states import JobState
from tests.integration.jobs.conftest import QUEUE, World
from tests.integration.jobs.test_lifecycle_machine import Machine, run_machine

WORKER = "gpu0@here"
A_WHILE_SECONDS = 2 * selection.IN_FLIGHT_SECONDS


class DispatchMachine(Machine):
    """Messages are bells: whatever happens to them, every job that may start is rung again."""

    dispatcher: dispatch.Dispatcher
    bell: broker.Broker

    @initialize()
    def begin(self) -> None:
        self.bell.redis.flushall()
        self.world.register(WORKER)
        self.model.suspected_by[WORKER] = set()

    @rule()
    def tick(self) -> None:
        tick = self.dispatcher.tick()
        assert tick.ended_attempts == 0
        assert tick.broker_error is None

    @rule()
    def redis_is_emptied(self) -> None:
        self.bell.redis.flushall()

    @rule()
    def a_while_passes(self) -> None:
        """What was sent and does not lie in Redis any more counts as lost."""
        longer = timedelta(seconds=A_WHILE_SECONDS)
        with self.world.db.transaction() as session:
            for job in session.scalars(select(Job).where(Job.dispatched_at.is_not(None))):
                assert job.dispatched_at is not None
                job.dispatched_at -= longer

    @precondition(lambda self: self.bell.waiting(QUEUE))
    @rule(data=st.data(), times=st.integers(1, 2))
    def a_message_is_delivered(self, data: st.DataObject, times: int) -> None:
        """Perhaps twice: the second one finds nothing to claim, or the job that came back."""
        job_id = self._taken_off(data)
        for _ in range(times):
            self.claim_one(job_id, worker=WORKER)

    @precondition(lambda self: self.bell.waiting(QUEUE))
    @rule(data=st.data())
    def a_message_is_lost(self, data: st.DataObject) -> None:
        self._taken_off(data)

    def _taken_off(self, data: st.DataObject) -> int:
        job_id: int = data.draw(st.sampled_from(sorted(self.bell.waiting(QUEUE))))
        for message in self.bell.redis.lrange(QUEUE, 0, -1):
            if f'"id": "{job_id}:'.encode() in message:
                self.bell.redis.lrem(QUEUE, 1, message)
                break
        return job_id

    @precondition(lambda self: self.model.jobs)
    @rule(data=st.data())
    def a_message_comes_twice(self, data: st.DataObject) -> None:
        self.bell.send_renders(QUEUE, [self._job(data)])

    @rule()
    def every_job_that_may_start_is_rung(self) -> None:
        """I6: whatever was lost, a while and a tick later its message lies in Redis.

        If a worker is trusted: one that was taken out passes its self-test first.
        """
        self.a_while_passes()
        self.world.register(WORKER)
        self.world.db.write(health.tested, WORKER, failure=None)
        self.model.suspected_by[WORKER].clear()
        self.tick()
        with self.world.db.reading() as session:
            queued = set(session.scalars(select(Job.id).where(Job.state == JobState.QUEUED)))
        assert queued <= self.bell.waiting(QUEUE)


class FewCalls(DispatchMachine):
    """Those alone that are needed to lose a message for good: it is found within seconds."""

    claim = heartbeat = rendered = succeed = fail = release = None  # type: ignore[assignment]
    cancel_attempt = cancel_job = cancel_batch = retry = leases_end = None  # type: ignore[assignment]


def _run(
    world: World, redis_url: str, machine: type[DispatchMachine] = DispatchMachine, **values: Any
) -> None:
    config = settings.load(broker_url=redis_url, window=10)

    class OnWorld(machine):  # type: ignore[valid-type, misc]  # a machine like any other
        pass

    OnWorld.world = world
    OnWorld.bell = broker.Broker(config)
    OnWorld.dispatcher = dispatch.Dispatcher(config, db=world.db)
    run_machine(OnWorld, **values)


def test_no_fate_of_messages_leads_astray_on_sqlite(
    sqlite_world: World, clean_redis_url: str
) -> None:
    _run(sqlite_world, clean_redis_url, examples=10, steps=30)


def test_no_fate_of_messages_leads_astray_on_postgresql(
    postgres_world: World, clean_redis_url: str
) -> None:
    _run(postgres_world, clean_redis_url, examples=5, steps=30)


def test_the_machine_finds_a_message_that_is_never_sent_again(
    sqlite_world: World, clean_redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its silence above would mean nothing."""
    monkeypatch.setattr(selection, "IN_FLIGHT_SECONDS", 1e6)
    with pytest.raises(AssertionError):
        _run(
            sqlite_world,
            clean_redis_url,
            FewCalls,
            examples=300,
            steps=30,
            phases=[Phase.generate],
            report_multiple_bugs=False,
            derandomize=True,
            print_blob=False,
        )
