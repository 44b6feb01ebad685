"""What failed of a batch: how many jobs of which kind, on which workers, and whether a retry helps.

For the command line, the API and the page alike.
"""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session

from jobs import retries, schema, states
from jobs.schema import Attempt, Batch, Job

FEW_WORKERS = 3  # that are named
QUARANTINED = "quarantined"

IS_OF_JOB = Job.failure_kind.in_(sorted(retries.OF_JOB))
PARTS: Mapping[str | None, Sequence[ColumnElement[bool]]] = {
    QUARANTINED: [Job.quarantined.is_(True)],
    **{
        kind.value: [Job.quarantined.is_(False), Job.failure_kind == kind]
        for kind in sorted(retries.OF_JOB)
    },
    None: [Job.quarantined.is_(False), or_(Job.failure_kind.is_(None), ~IS_OF_JOB)],
}
"""Why a retry of a job will probably fail as before; None: it may go well. Each is in one part."""


@dataclass(frozen=True, kw_only=True)
class Which:
    """Jobs by how they failed. Nothing said: whatever went wrong, and if nothing did."""

    kinds: Collection[states.FailureKind] = ()
    quarantined: bool | None = None

    def conditions(self) -> list[ColumnElement[bool]]:
        found: list[ColumnElement[bool]] = []
        if self.kinds:
            found.append(Job.failure_kind.in_(sorted(set(self.kinds))))
        if self.quarantined is not None:
            found.append(Job.quarantined.is_(self.quarantined))
        return found


ALL = Which()


@dataclass(frozen=True, kw_only=True)
class Group:
    """Failed jobs of a batch that ended in the same way."""

    kind: states.FailureKind | None
    quarantined: bool
    jobs: int
    workers: Sequence[tuple[str, int]]
    """On which their last attempts were, and how many of them; the most first."""
    example: Job
    """The first of them in the order of the file."""

    @property
    def may_go_well(self) -> bool:
        """Tried again as it is."""
        return retries.may_go_well(self.kind, quarantined=self.quarantined)

    @property
    def mostly_on(self) -> Sequence[tuple[str, int]]:
        """The few workers that made at least half of them; none where it is the job's fault."""
        if self.kind in retries.OF_JOB:
            return ()
        few = self.workers[:FEW_WORKERS]
        return few if 2 * sum(number for _, number in few) >= self.jobs else ()


def groups(session: Session, batch: Batch) -> list[Group]:
    """The largest first. In a snapshot: two reads make it."""
    if not batch.failed:
        return []
    counted = session.execute(
        select(
            Job.failure_kind,
            Job.quarantined,
            Attempt.worker,
            func.count(),
            func.min(Job.position),
        )
        .outerjoin(Attempt, Attempt.id == Job.attempt_id)
        .where(Job.batch_id == batch.id, Job.state == states.JobState.FAILED, schema.HAS_STARTED)
        .group_by(Job.failure_kind, Job.quarantined, Attempt.worker)
    ).all()
    on: dict[tuple[states.FailureKind | None, bool], Counter[str | None]] = {}
    first: dict[tuple[states.FailureKind | None, bool], int] = {}
    for kind, quarantined, worker, number, position in counted:
        key = (kind, quarantined)
        on.setdefault(key, Counter())[worker] += number
        first[key] = min(position, first.get(key, position))
    examples = select(Job).where(Job.batch_id == batch.id, Job.position.in_(first.values()))
    at = {job.position: job for job in session.scalars(examples)}
    found = [
        Group(
            kind=kind,
            quarantined=quarantined,
            jobs=workers.total(),
            workers=sorted(
                ((name, number) for name, number in workers.items() if name),
                key=lambda worker: (-worker[1], worker[0]),
            ),
            example=at[first[kind, quarantined]],
        )
        for (kind, quarantined), workers in on.items()
    ]
    return sorted(found, key=lambda group: (-group.jobs, group.kind or "", group.quarantined))
