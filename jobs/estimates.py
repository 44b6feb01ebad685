"""How long jobs will take, from what jobs of the same look took."""

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import fmean

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from jobs import queries, states
from jobs.schema import Attempt, Job

MOST_MEASURED = 200  # of one look, the latest: older hardware and versions count no longer
BESIDE = ("mux",)  # stages that need no device: the next job has begun


@dataclass(frozen=True, kw_only=True)
class OfLook:
    """The jobs of one look. `mean_seconds` is None when no measured job of it is on record."""

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
        longest = max((look.mean_seconds or 0 for look in self.looks), default=0)
        return max(self.device_seconds / self.workers, longest)


def of_jobs(session: Session, jobs: Mapping[str, int], *, queues: set[str]) -> Estimate:
    """Look id -> number of jobs, which wait in these queues."""
    seconds = {look_id: _measured(session, look_id) for look_id in jobs}
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


def _measured(session: Session, look_id: str) -> list[float]:
    """Seconds on the device of the latest jobs of a look, all stages together."""
    rows = session.scalars(
        select(Attempt.seconds)
        .join(Job, Job.attempt_id == Attempt.id)
        .where(Job.look_id == look_id, Job.state == states.JobState.SUCCEEDED)
        .order_by(Job.finished_at.desc())
        .limit(MOST_MEASURED)
    )
    return [
        sum(spent for stage, spent in seconds.items() if stage not in BESIDE)
        for seconds in rows
        if seconds
    ]
