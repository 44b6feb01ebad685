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
    there = session.execute(
        select(Worker.name, Worker.queues)
        .where(Worker.stopped_at.is_(None), Worker.heartbeat_at >= alive_since)
        .where(Worker.name.not_in(but_not))
    )
    return any(
        queue in queues and not refused & {(other, queue), (other, workers.ALL_QUEUES)}
        for other, queues in there
        if host_of(other) not in but_on
    )


def failed_on(
    session: Session,
    job: Job,
    *,
    kinds: Collection[states.FailureKind] = retries.OF_MACHINE,
) -> Sequence[tuple[str, datetime, states.FailureKind]]:
    """Workers on which it failed by one of these kinds, and when, since its budgets were fresh."""
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
        if kind is not None and kind in kinds and when is not None
    ]


def is_for_others(session: Session, job: Job, worker: str, now: datetime) -> bool:
    """It failed here a while ago, and another worker may show whether that was its own fault.

    One on which it has failed as well has shown it, and of what lies at a host, its whole host.
    """
    if not job.error_count + job.crash_count:
        return False
    since = now - timedelta(seconds=ELSEWHERE_SECONDS)
    found = failed_on(session, job, kinds=retries.TRIED_ELSEWHERE)
    recent = [(name, kind) for name, when, kind in found if when > since]
    failed = {name for name, _ in recent}
    hosts = {host_of(name) for name, kind in recent if kind in retries.OF_HOST}
    if worker not in failed and host_of(worker) not in hosts:
        return False
    return _others_take(session, job.queue, but_not=failed, but_on=hosts)


def hosts_failed_on(
    session: Session, job: Job, worker: str, kind: states.FailureKind
) -> int | None:
    """How many it has failed on by this kind, with this worker's. None: that is all there are.

    Of workers on which it failed otherwise nothing is expected either.
    """
    found = failed_on(session, job, kinds=retries.TRIED_ELSEWHERE)
    hosts = {host_of(name) for name, _, its in found if its is kind} | {host_of(worker)}
    failed = {name for name, _, _ in found}
    if not _others_take(session, job.queue, but_not=failed, but_on=hosts):
        return None
    return len(hosts)
