"""Which queued jobs are sent next, read from the tables; and that they were sent."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

from pydantic import ValidationError
from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from jobs import database, lifecycle, looks, order, queries, states
from jobs.schema import Attempt, Batch, Job, Look, Owner

IN_FLIGHT_SECONDS = 5.0  # between leaving Redis and the claim in the database


def choose(
    session: Session,
    *,
    queues: Sequence[str],
    room: int,
    waiting: Iterable[int],
    max_running_per_owner: int | None = None,
) -> list[order.Candidate]:
    """The next jobs of these queues whose message is not under way, in the order of `jobs.order`.

    Reads only: a seek per open batch, then the first jobs of those whose turn it is.
    """
    now = database.now(session)
    under_way = list(waiting)
    lanes, boosts, waits = _lanes(session, queues, now)
    left = _left_of_quotas(session, under_way, max_running_per_owner)
    lanes = [lane for lane in lanes if left is None or left[lane.owner] > 0]
    rows: list[tuple[order.Lane, Any]] = []
    for lane, number in _next_lanes(lanes, waits, rows, room=room):
        found = _next_of(session, lane, number, now=now, under_way=under_way)
        rows += [(lane, row) for row in found]
    last_look = _look_sent_last(session, queues, under_way) if rows else None
    looks = {row.look_id for _, row in rows}
    weights = _weights_of(session, looks if last_look is None else looks | {last_look})
    candidates = [
        order.Candidate(
            id=row.id,
            batch_id=lane.batch_id,
            owner=lane.owner,
            queue=lane.queue,
            rank=row.rank - boosts[lane.batch_id],
            weights=weights[row.look_id],
        )
        for lane, row in rows
    ]
    running = None if last_look is None else weights[last_look]
    return list(
        itertools.islice(
            _within_quotas(order.arrange(candidates, waits, running=running), left), room
        )
    )


def take(session: Session, chosen: Sequence[order.Candidate]) -> list[order.Candidate]:
    """Mark them as sent; those of them that no other dispatcher was faster with."""
    now = database.now(session)
    free = session.scalars(
        select(Job.id)
        .where(Job.id.in_([job.id for job in chosen]), *_can_be_sent(now))
        .order_by(Job.batch_id, Job.id)
        .with_for_update(skip_locked=True)
    ).all()
    taken = [job for job in chosen if job.id in set(free)]
    session.execute(update(Job).where(Job.id.in_(free)).values(dispatched_at=now))
    # Those that a submit holds, to count its quota, are passed over rather than waited for.
    owners = (
        select(Owner.name)
        .where(Owner.name.in_({job.owner for job in taken}))
        .order_by(Owner.name)
        .with_for_update(skip_locked=True)
    )
    names = session.scalars(owners).all()
    session.execute(update(Owner).where(Owner.name.in_(names)).values(served_at=now))
    return taken


def mark_served(session: Session, batch_ids: Sequence[str]) -> bool:
    """They have had their turn. Always true."""
    which = Batch.id.in_(batch_ids)
    # In order: two dispatchers wait for each other, not in a circle.
    session.scalars(select(Batch.id).where(which).order_by(Batch.id).with_for_update()).all()
    session.execute(update(Batch).where(which).values(served_at=database.now(session)))
    return True


def _lanes(
    session: Session, queues: Sequence[str], now: datetime
) -> tuple[list[order.Lane], dict[str, int], order.Waits]:
    """Of every open batch: what waits in each of these queues; boosts by batch; who waited."""
    ranks = [
        select(func.min(Job.rank))
        .where(Job.state == states.JobState.QUEUED)
        .where(Job.batch_id == Batch.id, Job.queue == queue)
        .scalar_subquery()
        for queue in queues
    ]
    rows = session.execute(
        select(
            Batch.id,
            Batch.owner,
            Batch.boost,
            func.coalesce(Batch.served_at, Batch.created_at).label("served_at"),
            Owner.served_at.label("owner_served_at"),
            *ranks,
        )
        .outerjoin(Owner, Owner.name == Batch.owner)
        .where(*lifecycle.is_open(now))
    ).all()
    lanes = [
        order.Lane(batch_id=row.id, owner=row.owner, queue=queue, rank=rank - row.boost)
        for row in rows
        for queue, rank in zip(queues, row[5:], strict=True)
        if rank is not None
    ]
    batches = {row.id: (now - row.served_at).total_seconds() for row in rows}
    owners: dict[str, float] = {}
    for row in rows:
        served_at = row.owner_served_at
        waited = batches[row.id] if served_at is None else (now - served_at).total_seconds()
        owners[row.owner] = max(owners.get(row.owner, waited), waited)
    boosts = {row.id: row.boost for row in rows}
    return lanes, boosts, order.Waits(owners=owners, batches=batches)


def _next_lanes(
    lanes: Sequence[order.Lane],
    waits: order.Waits,
    rows: Sequence[tuple[order.Lane, Any]],
    *,
    room: int,
) -> Iterator[tuple[order.Lane, int]]:
    """Lanes to read from and how many jobs of each, until `rows` holds enough of the first rank."""
    enough = order.LOOK_AHEAD + room
    by_rank = sorted(lanes, key=lambda lane: lane.rank)
    for _, equals in itertools.groupby(by_rank, key=lambda lane: lane.rank):
        unread = list(equals)
        began = len(rows)
        while unread and len(rows) - began < enough:
            turn = order.shares(unread, waits, number=enough)
            yield from turn.items()
            # Others come into it when these have jobs that wait for a retry, or are under way.
            unread = [lane for lane in unread if lane not in turn]
        if len(rows) >= room:
            return


def _next_of(
    session: Session, lane: order.Lane, number: int, *, now: datetime, under_way: Sequence[int]
) -> Sequence[Any]:
    return session.execute(
        select(Job.id, Job.rank, Job.look_id)
        .where(Job.batch_id == lane.batch_id, Job.queue == lane.queue, *_can_be_sent(now))
        .where(~database.among(session, Job.id, under_way))
        .order_by(Job.rank, Job.id)
        .limit(number)
    ).all()


def _can_be_sent(now: datetime) -> list[ColumnElement[bool]]:
    lost_before = now - timedelta(seconds=IN_FLIGHT_SECONDS)
    return [
        Job.state == states.JobState.QUEUED,
        or_(Job.not_before.is_(None), Job.not_before <= now),
        or_(Job.dispatched_at.is_(None), Job.dispatched_at < lost_before),
    ]


def _left_of_quotas(
    session: Session, under_way: Sequence[int], most: int | None
) -> dict[str, int] | None:
    """Owner -> jobs that may be sent; owners without running jobs are left out. None: no quota."""
    if most is None:
        return None
    left = {owner: most - number for owner, number in queries.running_by_owner(session).items()}
    sent = session.execute(
        select(Batch.owner, func.count())
        .join(Job, Job.batch_id == Batch.id)
        .where(database.among(session, Job.id, under_way), Job.state == states.JobState.QUEUED)
        .group_by(Batch.owner)
    )
    for owner, number in sent:
        left[owner] = left.get(owner, most) - number
    return defaultdict(lambda: most, left)


def _within_quotas(
    jobs: Iterable[order.Candidate], left: dict[str, int] | None
) -> Iterator[order.Candidate]:
    for job in jobs:
        if left is not None:
            if left[job.owner] <= 0:
                continue
            left[job.owner] -= 1
        yield job


def _look_sent_last(
    session: Session, queues: Sequence[str], under_way: Sequence[int]
) -> str | None:
    """Of what will be next; if nothing is under way, of what was begun last."""
    sent = select(Job.look_id).where(
        database.among(session, Job.id, under_way), Job.state == states.JobState.QUEUED
    )
    last = session.scalar(sent.order_by(Job.dispatched_at.desc().nulls_last()).limit(1))
    if last is not None:
        return last
    running = (
        select(Job.look_id)
        .join(Attempt, Attempt.job_id == Job.id)
        .where(Attempt.state == states.AttemptState.RUNNING, Job.queue.in_(queues))
    )
    # By a column without an index: else PostgreSQL goes back through every attempt there ever was
    # instead of taking the few live ones from theirs.
    return session.scalar(running.order_by(Attempt.started_at.desc()).limit(1))


def _weights_of(session: Session, look_ids: Iterable[str]) -> dict[str, str]:
    bodies = session.execute(select(Look.id, Look.body).where(Look.id.in_(look_ids)))
    return {look_id: _weights(look_id, body) for look_id, body in bodies}


def _weights(look_id: str, body: dict[str, Any]) -> str:
    try:
        return looks.Look.model_validate(body).weights
    except ValidationError:
        return look_id  # of a newer version: no matter here, its worker may know it
