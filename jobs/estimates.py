"""How long jobs will take, from what jobs of the same look took."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs import queries, states
from jobs.schema import Attempt, Job

RECENT_ATTEMPTS = 20_000  # looked at, the newest ones: older hardware and versions do not count
MOST_MEASURED = 200  # of one look
BESIDE = ("mux",)  # stages that need no device: the next job has begun


@dataclass(frozen=True, kw_only=True)
class OfLook:
    """The jobs of one look. `mean_seconds` is None when none of them was ever measured."""

    look_id: str
    jobs: int
    measured: int
    mean_seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is known; `device_seconds` leaves out the `unmeasured_jobs`."""

    looks: tuple[OfLook, ...]
    workers: int
    """Alive now, and able to take such jobs."""

    @property
    def jobs(self) -> int:
        return sum(look.jobs for look in self.looks)

    @property
    def unmeasured_jobs(self) -> int:
        return sum(look.jobs for look in self.looks if look.mean_seconds is None)

    @property
    def device_seconds(self) -> float:
        return sum(look.jobs * look.mean_seconds for look in self.looks if look.mean_seconds)

    @property
    def seconds_left(self) -> float | None:
        """If nothing else is rendered; None when it cannot be known."""
        if self.unmeasured_jobs or not self.workers:
            return None
        return self.device_seconds / self.workers


def of_jobs(session: Session, jobs: Mapping[str, int], *, queues: set[str]) -> Estimate:
    """Look id -> number of jobs, which wait in these queues."""
    seconds = _measured(session, set(jobs))
    groups = queries.live_workers_by_queues(session)
    return Estimate(
        looks=tuple(
            OfLook(
                look_id=look_id,
                jobs=number,
                measured=len(seconds[look_id]),
                mean_seconds=fmean(seconds[look_id]) if seconds[look_id] else None,
            )
            for look_id, number in jobs.items()
        ),
        workers=sum(number for served, number in groups.items() if queues & set(served)),
    )


def of_batch(session: Session, batch_id: str) -> Estimate:
    """What is left of a batch."""
    counted = session.execute(
        select(Job.look_id, Job.queue, func.count())
        .where(Job.batch_id == batch_id)
        .where(Job.state.in_([states.JobState.QUEUED, states.JobState.RUNNING]))
        .group_by(Job.look_id, Job.queue)
        .order_by(Job.look_id)
    ).all()
    jobs = {look_id: number for look_id, _, number in counted}
    return of_jobs(session, jobs, queues={queue for _, queue, _ in counted})


def _measured(session: Session, look_ids: set[str]) -> dict[str, list[float]]:
    """Seconds on the device of the latest jobs of each look, all stages together."""
    too_old = queries.attempt_before_newest(session, RECENT_ATTEMPTS)
    found: dict[str, list[float]] = defaultdict(list)
    rows = session.execute(
        select(Job.look_id, Attempt.seconds)
        .join(Job, Job.id == Attempt.job_id)
        .where(Attempt.id > too_old)
        .where(Attempt.state == states.AttemptState.SUCCEEDED, Job.look_id.in_(look_ids))
        .order_by(Attempt.id.desc())
    )
    for look_id, seconds in rows:
        if seconds and len(found[look_id]) < MOST_MEASURED:
            on_device = (spent for stage, spent in seconds.items() if stage not in BESIDE)
            found[look_id].append(sum(on_device))
    return found
