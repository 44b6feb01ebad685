"""Which workers are trusted: those on which job after job fails are taken out and tested.

A failure of the machine's kind (`retries.OF_MACHINE`) is the machine's fault or the job's. The job
is tried elsewhere: what fails there too says nothing against this machine. Different jobs that fail
in a row on one machine, and on no other before, take it out.
"""

from collections.abc import Collection, Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from jobs import database, retries, states, workers
from jobs.schema import Attempt, Job, Refusal, Worker

MAX_SUSPECTS = 3  # different jobs in a row
ELSEWHERE_SECONDS = 600.0  # a worker leaves a job that failed on it to others for this long
MAX_REASON_CHARS = 1_000
READ_AT_ONCE = 100  # workers: one that takes a job is mostly among the first


def suspect(
    session: Session, name: str, *, job_id: int, kind: states.FailureKind, error: str
) -> bool:
    """A job failed here as on a broken machine. True: one too many in a row, it is taken out.

    It then takes no jobs until a self-test has passed, which its launcher runs: at once the first
    time, after a growing wait when it was taken out before and no job has gone well since.
    """
    row = session.get(Worker, name, with_for_update=True)
    if row is None or job_id in (row.suspects or ()):
        return False
    row.suspects = [*(row.suspects or ()), job_id][-MAX_SUSPECTS:]
    is_out = session.scalar(
        select(Refusal.needs_test).where(
            Refusal.worker == name, Refusal.queue == workers.ALL_QUEUES
        )
    )
    if len(row.suspects) < MAX_SUSPECTS or is_out:
        return False
    row.removals += 1
    # Without their numbers: it is told to everybody whose jobs wait.
    reason = f"{MAX_SUSPECTS} different jobs in a row failed on it; the last: {error}"
    wait_seconds = workers.wait_seconds(row.removals - 1) if row.removals > 1 else 0.0
    _take_out(session, name, kind=kind, reason=reason, wait_seconds=wait_seconds)
    return True


def ask_for_test(session: Session, name: str) -> None:
    """It takes no more jobs, and its self-test begins as soon as it holds none."""
    held = session.get(Refusal, (name, workers.ALL_QUEUES), with_for_update=True)
    if held is not None and held.needs_test:
        held.until = database.now(session)
        return
    kind, reason = states.FailureKind.DEVICE, "a self-test was asked for"
    _take_out(session, name, kind=kind, reason=reason, wait_seconds=0.0)


def readmit(session: Session, name: str) -> bool:
    """It takes jobs again. False: it was not taken out."""
    session.execute(update(Worker).where(Worker.name == name).values(suspects=None))
    ended = session.execute(
        delete(Refusal).where(Refusal.worker == name, Refusal.needs_test).returning(Refusal.queue)
    ).all()
    return bool(ended)


def tested(session: Session, name: str, *, failure: str | None) -> None:
    """Its self-test has ended: it comes back, or waits for the next one."""
    failure = None if failure is None else database.storable(failure)
    now = database.now(session)
    session.execute(
        update(Worker).where(Worker.name == name).values(tested_at=now, test_failure=failure)
    )
    if failure is None:
        readmit(session, name)
        return
    held = session.get(Refusal, (name, workers.ALL_QUEUES), with_for_update=True)
    if held is None or not held.needs_test:
        return  # somebody has readmitted it meanwhile
    held.times += 1
    held.reason = f"its self-test failed: {failure}"
    held.until = now + timedelta(seconds=workers.wait_seconds(held.times - 1))


def is_due_for_test(session: Session, name: str) -> bool:
    """It needs a self-test, the wait for it is over, and it renders nothing."""
    held = session.get(Refusal, (name, workers.ALL_QUEUES))
    if held is None or not held.needs_test or held.until > database.now(session):
        return False
    renders = select(Attempt.id).where(
        Attempt.worker == name, Attempt.state == states.AttemptState.RUNNING
    )
    return session.scalar(renders.limit(1)) is None


def _take_out(
    session: Session, name: str, *, kind: states.FailureKind, reason: str, wait_seconds: float
) -> None:
    now = database.now(session)
    session.merge(
        Refusal(
            worker=name,
            queue=workers.ALL_QUEUES,
            needs_test=True,
            kind=kind,
            reason=database.storable(reason)[:MAX_REASON_CHARS],
            times=1,
            since=now,
            until=now + timedelta(seconds=wait_seconds),
        )
    )


def host_of(worker: str) -> str:
    """Of its name: `gpu0@host`."""
    return worker.rpartition("@")[2]


def _others_take(
    session: Session, queue: str, *, but_not: Collection[str], but_on: Collection[str]
) -> bool:
    """Another worker that is alive, on another host than these, takes jobs of this queue now."""
    alive_since = database.now(session) - timedelta(seconds=workers.ALIVE_SECONDS)
    refused = {(held.worker, held.queue) for held in workers.refusals(session)}
    alive = (
        select(Worker.name, Worker.queues)
        .where(Worker.stopped_at.is_(None), Worker.heartbeat_at >= alive_since)
        .where(Worker.name.not_in(but_not))
        .execution_options(yield_per=READ_AT_ONCE)
    )
    with session.execute(alive) as there:
        return any(
            queue in queues and not refused & {(other, queue), (other, workers.ALL_QUEUES)}
            for other, queues in there
            if host_of(other) not in but_on
        )


Failure = tuple[str, datetime, states.FailureKind]
"""On which worker, when, and how."""


def failures(session: Session, job: Job) -> list[Failure]:
    """Of its attempts, since its budgets were fresh."""
    ended = (
        select(Attempt.worker, Attempt.finished_at, Attempt.failure_kind)
        .where(Attempt.job_id == job.id)
        .where(Attempt.state.in_((states.AttemptState.FAILED, states.AttemptState.LOST)))
        .order_by(Attempt.id.desc())
        .limit(job.error_count + job.crash_count)
    )
    return [
        (worker, when, kind)
        for worker, when, kind in session.execute(ended)
        if kind is not None and when is not None
    ]


def wait_for_others(session: Session, job: Job, worker: str, now: datetime) -> timedelta | None:
    """It failed here a while ago, and another worker may show whether that was its own fault.

    One on which it has failed as well has shown it, and of what lies at a host, its whole host.
    None: this worker takes it.
    """
    if not job.error_count + job.crash_count:
        return None
    since = now - timedelta(seconds=ELSEWHERE_SECONDS)
    found = [each for each in failures(session, job) if each[2] in retries.TRIED_ELSEWHERE]
    recent = [(name, kind) for name, when, kind in found if when > since]
    failed = {name for name, _ in recent}
    hosts = {host_of(name) for name, kind in recent if kind in retries.OF_HOST}
    if worker not in failed and host_of(worker) not in hosts:
        return None
    if not _others_take(session, job.queue, but_not=failed, but_on=hosts):
        return None
    since_failure = now - max(when for _, when, _ in found)
    return timedelta(seconds=retries.wait_for_others(since_failure.total_seconds()))


def hosts_failed_on(
    session: Session, job: Job, found: Sequence[Failure], kind: states.FailureKind
) -> int | None:
    """On how many it has failed by this kind. None: nobody is left to be asked.

    Of hosts whose files it failed at in another way nothing is expected either, nor of workers on
    which it failed otherwise.
    """
    failed = {name for name, _, its in found if its in retries.TRIED_ELSEWHERE}
    asked = {host_of(name) for name, _, its in found if its in retries.OF_HOST}
    if not _others_take(session, job.queue, but_not=failed, but_on=asked):
        return None
    return len({host_of(name) for name, _, its in found if its is kind})


def repeats(found: Sequence[Failure]) -> int:
    """How many of them told again what may lie at the files of a host."""
    told = [(host_of(name), kind) for name, _, kind in found if kind in retries.OF_HOST]
    return len(told) - len(set(told))
