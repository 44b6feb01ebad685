"""Reads for people and programs; nothing here changes a row."""

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from statistics import fmean
from typing import Any

from sqlalchemy import ColumnElement, Select, Text, cast, func, or_, select, union_all
from sqlalchemy.orm import Session, aliased

from jobs import attempt_ids, database, errors, failures, one_line, schema, states, workers
from jobs.schema import Attempt, Batch, Job, Look, Refusal, Worker

RECENT_JOBS = 50  # the rate is taken over this many latest results, or
ROUNDS = 2  # so many of each worker if that is more: workers in step end all at once,
MOST_RESULTS = 4_000  # but no more than these: every open page asks each two seconds
STOP_SECONDS = 300.0  # longer without a job in work: the farm was stopped, or worked for others
CLOCK_SPARE = timedelta(hours=1)  # the database's clock may have been set back meanwhile
ROWS_AT_ONCE = 1_000  # of what is read page by page, to its end
BATCH_ID_PART = re.compile(r"[0-9a-z-]{1,20}")
SHORTEST_PART = 3
RECENT_BATCHES = 10_000  # that are searched for a custom_id: a seek in each, some ten milliseconds


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A batch at a glance."""

    batch: Batch
    state: states.BatchState
    rate_per_minute: float | None
    """Videos per minute lately, while there was work on it; None before the first two."""
    seconds_left: float | None


@dataclass(frozen=True, kw_only=True)
class _Pace:
    """Of a batch lately, while there was work on it."""

    videos_per_second: float
    jobs_per_second: float
    """Those that failed as well: they took their time, and are out of the queue."""
    job_seconds: float
    """As long as others took, from begin to end."""
    free_in: list[float]
    """In how many seconds each worker has ended its job, in order; 0 where it is overdue."""

    def seconds_for(self, queued: int) -> float:
        """Until the last of so many jobs more has ended, each begun when a worker is free."""
        if not queued:
            return self.free_in[-1]
        round_seconds = len(self.free_in) / self.jobs_per_second
        rounds, place = divmod(queued - 1, len(self.free_in))
        last_seconds = max(self.job_seconds, round_seconds)
        return self.free_in[place] + rounds * round_seconds + last_seconds


@dataclass(frozen=True, kw_only=True)
class LiveWorker:
    """A registered worker, whether it is alive, and what it renders now."""

    worker: Worker
    is_alive: bool
    attempt: Attempt | None
    refusals: tuple[Refusal, ...] = ()
    """What it takes no jobs of for now, because its host failed."""

    @property
    def has_no_models(self) -> bool:
        return self.is_alive and not self.worker.queues

    @property
    def takes(self) -> tuple[str, ...]:
        """Queues that it takes from now; none if it is silent."""
        if not self.is_alive:
            return ()
        return _taken(self.worker.queues, {refusal.queue for refusal in self.refusals})


def batches(
    session: Session,
    *,
    limit: int,
    before: Batch | None = None,
    owner: str | None = None,
    states_wanted: Sequence[states.BatchState] = (),
    since: datetime | None = None,
) -> Sequence[Batch]:
    """Newest first; `before`: the last one seen, for the next page. `owner` None: everybody's."""
    statement = select(Batch).where(Batch.forgotten_at.is_(None))
    if states_wanted:
        statement = statement.where(Batch.state.in_([state.value for state in states_wanted]))
    if since is not None:
        statement = statement.where(Batch.created_at >= since)
    statement = statement.order_by(Batch.created_at.desc(), Batch.id.desc()).limit(limit)
    if owner is not None:
        statement = statement.where(Batch.owner == database.storable(owner))
    if before is not None:
        same = Batch.created_at == before.created_at
        statement = statement.where(
            (Batch.created_at < before.created_at) | (same & (Batch.id < before.id))
        )
    return session.scalars(statement).all()


def find_batch(session: Session, reference: str) -> Batch:
    """By id, by the unique beginning of an id, or `latest`. NotFound says what would do."""
    if reference == "latest":
        newest = batches(session, limit=1)
        if not newest:
            raise errors.NotFound("there is no batch yet: submit one with `rushes submit FILE`")
        return newest[0]
    matches: Sequence[Batch] = []
    if BATCH_ID_PART.fullmatch(reference):
        exact = session.get(Batch, reference)
        if exact is not None and exact.forgotten_at is None:
            return exact
        begins = select(Batch).where(Batch.id.like(f"{reference}%"), Batch.forgotten_at.is_(None))
        matches = session.scalars(begins.order_by(Batch.id).limit(5)).all()
    if len(matches) == 1 and len(reference) >= SHORTEST_PART:
        return matches[0]
    if matches:
        which = ", ".join(batch.id for batch in matches)
        raise errors.NotFound(f"batch {reference!r} is too short to tell which: {which}")
    raise errors.NotFound(f"no batch {reference!r}: `rushes list` shows what there is")


def find_job(session: Session, reference: str) -> Job:
    """By number, or by `BATCH/CUSTOM_ID` or `BATCH/POSITION`."""
    job: Job | None = None
    batch_reference, slash, inside = reference.partition("/")
    if slash:
        batch = find_batch(session, batch_reference)
        of_batch = select(Job).where(Job.batch_id == batch.id)
        if one_line.is_named(inside):
            job = session.scalar(of_batch.where(Job.custom_id == inside))
        if job is None and inside.isdecimal() and len(inside) < 10:
            job = session.scalar(of_batch.where(Job.position == int(inside)))
    elif reference.isdecimal() and len(reference) < 19:
        job = session.get(Job, int(reference))
    if job is None:
        raise errors.NotFound(
            f"no job {reference!r}: give its number, BATCH/CUSTOM_ID or BATCH/POSITION"
        )
    return job


def jobs_called(session: Session, custom_id: str, *, limit: int) -> Sequence[Job]:
    """Of the recent batches, those of the newest one first."""
    recent = select(Batch.id).where(Batch.forgotten_at.is_(None))
    recent = recent.order_by(Batch.created_at.desc(), Batch.id.desc()).limit(RECENT_BATCHES)
    found = select(Job).where(
        Job.batch_id.in_(recent), Job.custom_id == database.storable(custom_id)
    )
    return session.scalars(found.order_by(Job.id.desc()).limit(limit)).all()


def jobs(
    session: Session,
    batch_id: str,
    *,
    states_wanted: Sequence[states.JobState] = (),
    custom_id: str | None = None,
    which: failures.Which = failures.ALL,
    after: int = -1,
    limit: int = 100,
) -> Sequence[Job]:
    """In the order of the file; `after` is the position of the last one seen."""
    page = select(Job).where(Job.batch_id == batch_id, Job.position > after, *which.conditions())
    if custom_id is not None:
        page = page.where(Job.custom_id == database.storable(custom_id))
    page = page.order_by(Job.position).limit(limit)
    pages = [_in_state(page, state) for state in set(states_wanted)]
    if len(pages) == 1:
        page = pages[0]
    elif pages:
        # A page of each: of several states at once, a database sorts all that there are.
        merged = aliased(Job, union_all(*(p.subquery().select() for p in pages)).subquery())
        page = select(merged).order_by(merged.position).limit(limit)
    return session.scalars(page).all()


def _in_state(page: Select[Job], state: states.JobState) -> Select[Job]:
    page = page.where(Job.state == state)
    return page if state is states.JobState.QUEUED else page.where(schema.HAS_STARTED)


def attempts(session: Session, job_id: int) -> Sequence[Attempt]:
    statement = select(Attempt).where(Attempt.job_id == job_id).order_by(Attempt.id)
    return session.scalars(statement).all()


def attempt_before_newest(session: Session, number: int) -> int:
    """Only the `number` newest attempts have higher ids; 0: there are no more than that."""
    found = select(Attempt.id).order_by(Attempt.id.desc()).offset(number).limit(1)
    return session.scalar(found) or 0


def attempts_of_batch(
    session: Session,
    batch: Batch,
    *,
    after: int = 0,
    that_are: Collection[states.AttemptState] = (),
) -> Sequence[tuple[Job, Attempt]]:
    """Some, in the order in which they began; `after` is the id of the last attempt seen."""
    statement = (
        select(Job, Attempt)
        .join(Attempt, Attempt.job_id == Job.id)
        .where(Job.batch_id == batch.id, Attempt.id > _before_first_attempt(session, batch, after))
        .order_by(Attempt.id)
        .limit(ROWS_AT_ONCE)
    )
    if that_are:
        statement = statement.where(Attempt.state.in_(that_are))
    return [(row[0], row[1]) for row in session.execute(statement)]


def _before_first_attempt(session: Session, batch: Batch, after: int) -> int:
    """Else PostgreSQL reads all that is older than the batch, too."""
    counted = select(Attempt.id).where(Attempt.id > after)
    if session.scalar(counted.where(Attempt.id < attempt_ids.COUNTED_BELOW).limit(1)) is not None:
        return after
    return max(after, attempt_ids.earliest(batch.created_at - CLOCK_SPARE) - 1)


def jobs_with_results(
    session: Session, batch_id: str, *, after: int = -1
) -> Sequence[tuple[Job, Attempt | None]]:
    """Some jobs in the order of the file, each finished one with the attempt of its video."""
    rows = session.execute(
        select(Job, Attempt)
        .outerjoin(
            Attempt, (Attempt.id == Job.attempt_id) & (Job.state == states.JobState.SUCCEEDED)
        )
        .where(Job.batch_id == batch_id, Job.position > after)
        .order_by(Job.position)
        .limit(ROWS_AT_ONCE)
    ).all()
    return [(row[0], row[1]) for row in rows]


def running(session: Session, batch_id: str) -> Sequence[tuple[Job, Attempt]]:
    """The jobs of a batch that a worker holds, with how far they are."""
    rows = session.execute(
        select(Job, Attempt)
        .join(Attempt, Attempt.id == Job.attempt_id)
        .where(Job.batch_id == batch_id, Job.state == states.JobState.RUNNING, schema.HAS_STARTED)
        .order_by(Attempt.id)
    ).all()
    return [(row[0], row[1]) for row in rows]


def running_attempts(session: Session, jobs: Iterable[Job]) -> dict[int, Attempt]:
    """Those that render now, by the ids of their jobs."""
    ids = [job.attempt_id for job in jobs if job.state is states.JobState.RUNNING]
    if not ids:
        return {}
    found = session.scalars(select(Attempt).where(Attempt.id.in_(ids)))
    return {attempt.job_id: attempt for attempt in found}


def workers_of(session: Session, jobs: Iterable[Job]) -> dict[int, str]:
    """Who holds them, or had them at their end, by the ids of the jobs; none of one that waits."""
    ids = [job.attempt_id for job in jobs if job.attempt_id is not None]
    if not ids:
        return {}
    held = select(Attempt.job_id, Attempt.worker).where(database.among(session, Attempt.id, ids))
    return {row.job_id: row.worker for row in session.execute(held)}


def winning_attempt(session: Session, job: Job) -> Attempt | None:
    """The attempt whose video is the job's result."""
    if job.state is not states.JobState.SUCCEEDED or job.attempt_id is None:
        return None
    return session.get(Attempt, job.attempt_id)


def look(session: Session, job: Job) -> dict[str, Any]:
    return session.get_one(Look, job.look_id).body


def progress(session: Session, batch_id: str) -> Progress:
    """Counts, state, rate and time left."""
    batch = find_batch(session, batch_id)
    pace = _pace(session, batch)
    open_jobs = batch.queued + batch.running
    seconds_left = None
    if pace and open_jobs and not batch.paused_at and not _is_at_rest(session, batch):
        seconds_left = pace.seconds_for(batch.queued)
    return Progress(
        batch=batch,
        state=batch.state,
        rate_per_minute=None if pace is None else pace.videos_per_second * 60,
        seconds_left=seconds_left,
    )


def _is_at_rest(session: Session, batch: Batch) -> bool:
    """Nothing of it runs, and its last video is from some time ago."""
    if batch.running:
        return False
    last = select(func.max(Job.finished_at)).where(
        Job.batch_id == batch.id, Job.state == states.JobState.SUCCEEDED
    )
    finished_at = session.scalar(last)
    stopped_before = database.now(session) - timedelta(seconds=STOP_SECONDS)
    return finished_at is not None and finished_at < stopped_before


def live_workers(session: Session) -> list[LiveWorker]:
    """Every registered worker that has not stopped for good, by name."""
    alive_since = database.now(session) - timedelta(seconds=workers.ALIVE_SECONDS)
    rows = session.scalars(
        select(Worker).where(Worker.stopped_at.is_(None)).order_by(Worker.name)
    ).all()
    held = session.scalars(
        select(Attempt).where(Attempt.state == states.AttemptState.RUNNING, schema.IS_LIVE)
    )
    # The newest last: one before it may be in its last second, off the device.
    by_worker = {attempt.worker: attempt for attempt in sorted(held, key=lambda held: held.id)}
    refused = workers.refusals(session)
    return [
        LiveWorker(
            worker=row,
            is_alive=row.heartbeat_at >= alive_since,
            attempt=by_worker.get(row.name),
            refusals=tuple(refusal for refusal in refused if refusal.worker == row.name),
        )
        for row in rows
    ]


def live_workers_by_queues(session: Session) -> dict[tuple[str, ...], int]:
    """Queues -> how many live workers take from just these. Read at every look of dispatch."""
    now = database.now(session)
    refused: dict[str, set[str]] = {}
    for refusal in workers.refusals(session, now=now):
        refused.setdefault(refusal.worker, set()).add(refusal.queue)
    alive_since = now - timedelta(seconds=workers.ALIVE_SECONDS)
    is_alive = (Worker.stopped_at.is_(None), Worker.heartbeat_at >= alive_since)
    # Grouped by the database: a farm has thousands of workers and few kinds of them.
    as_text = cast(Worker.queues, Text)
    kinds = select(as_text, func.count()).where(*is_alive, Worker.name.not_in(refused))
    numbers: Counter[tuple[str, ...]] = Counter()
    for queues, number in session.execute(kinds.group_by(as_text)):
        numbers[tuple(json.loads(queues))] += number
    choosy = select(Worker.name, Worker.queues).where(*is_alive, Worker.name.in_(refused))
    for name, all_queues in session.execute(choosy):
        numbers[_taken(all_queues, refused[name])] += 1
    del numbers[()]
    return dict(numbers)


def _taken(queues: Sequence[str], refused: Collection[str]) -> tuple[str, ...]:
    if workers.ALL_QUEUES in refused:
        return ()
    return tuple(queue for queue in queues if queue not in refused)


def live_workers_by_queue(session: Session) -> dict[str, int]:
    """Queue -> how many live workers take from it."""
    numbers: Counter[str] = Counter()
    for queues, workers_there in live_workers_by_queues(session).items():
        for queue in queues:
            numbers[queue] += workers_there
    return dict(numbers)


def queues_without_workers(session: Session, batch_id: str) -> list[str]:
    """Queues that jobs of this batch wait in and that nobody takes from."""
    waited_for = queues_waited_in(session, batch_id)
    served = live_workers_by_queue(session) if waited_for else {}
    return [queue for queue in waited_for if queue not in served]


def highest_priority(
    session: Session, *, of: str | None = None, but_not: str | None = None
) -> int | None:
    """Of all jobs that are queued, of this batch alone or but not of that; None: there are none."""
    urgent = (
        select(func.min(Job.rank))
        .where(Job.state == states.JobState.QUEUED, Job.batch_id == Batch.id)
        .scalar_subquery()
    )
    highest = select(func.max(Batch.boost - urgent)).where(Batch.finished_at.is_(None))
    if of is not None:
        highest = highest.where(Batch.id == of)
    if but_not is not None:
        highest = highest.where(Batch.id != but_not)
    return session.scalar(highest)


def batches_to_stop(session: Session) -> tuple[Sequence[str], Sequence[str]]:
    """Open batches with jobs left to stop: by request, and because their deadline has passed."""
    unfinished = select(Batch.id).where(Batch.finished_at.is_(None)).order_by(Batch.id)
    asked = unfinished.where(Batch.cancel_requested_at.is_not(None), Batch.queued > 0)
    overdue = unfinished.where(
        Batch.cancel_requested_at.is_(None),
        Batch.deadline_at <= database.now(session),
        or_(Batch.expired_at.is_(None), Batch.queued > 0),
    )
    return session.scalars(asked).all(), session.scalars(overdue).all()


def running_by_owner(session: Session) -> dict[str, int]:
    counted = session.execute(
        select(Batch.owner, func.sum(Batch.running))
        .where(Batch.finished_at.is_(None))
        .group_by(Batch.owner)
    )
    return {owner: int(number) for owner, number in counted}


def open_jobs(session: Session, *, owner: str | None = None) -> tuple[int, int]:
    """How many jobs are queued and how many run, from the counts of unfinished batches."""
    counts = select(func.sum(Batch.queued), func.sum(Batch.running))
    counts = counts.where(Batch.finished_at.is_(None))
    if owner is not None:
        counts = counts.where(Batch.owner == owner)
    queued, running = session.execute(counts).one()
    return int(queued or 0), int(running or 0)


def paused_jobs(session: Session) -> int:
    """How many of the queued ones wait in paused batches."""
    counts = select(func.sum(Batch.queued))
    counts = counts.where(Batch.finished_at.is_(None), Batch.paused_at.is_not(None))
    return int(session.scalar(counts) or 0)


def could_start(session: Session) -> bool:
    """Whether a job waits that a live worker would take now: not paused, and no retry to come."""
    found = (
        select(Job.id)
        .join(Batch, Batch.id == Job.batch_id)
        .where(Batch.finished_at.is_(None), Batch.paused_at.is_(None))
        .where(Batch.cancel_requested_at.is_(None), Job.state == states.JobState.QUEUED)
        .where(Job.queue.in_(live_workers_by_queue(session)))
        .where(or_(Job.not_before.is_(None), Job.not_before <= database.now(session)))
    )
    return session.scalar(found.limit(1)) is not None


def queues_waited_in(session: Session, batch_id: str) -> list[str]:
    """Queues of the queued jobs of a batch, in order: a seek for each, however many the jobs."""
    found: list[str] = []
    first = select(func.min(Job.queue)).where(
        Job.batch_id == batch_id, Job.state == states.JobState.QUEUED
    )
    while (
        queue := session.scalar(first.where(Job.queue > found[-1]) if found else first)
    ) is not None:
        found.append(queue)
    return found


def refusals_of(session: Session, queues: Sequence[str]) -> list[Refusal]:
    """Of live workers, of any of these queues: why the jobs there wait."""
    return [
        refusal
        for live in live_workers(session)
        if live.is_alive
        for refusal in live.refusals
        if refusal.queue in queues
        or (refusal.queue == workers.ALL_QUEUES and set(queues) & set(live.worker.queues))
    ]


def _pace(session: Session, batch: Batch) -> _Pace | None:
    results = _latest_results(session, batch)
    if len(results) < 2:
        return None
    until = results[0][1]
    if batch.finished_at is None:
        until = max(until, database.now(session))
    meanwhile = (Job.finished_at > results[-1][1], Job.finished_at <= until)
    failures = _latest(session, batch, states.JobState.FAILED, *meanwhile, number=MOST_RESULTS)
    if len(failures) == MOST_RESULTS:
        # There may be more of them: as far back as these reach.
        results = [span for span in results if span[1] >= failures[-1][1]]
        if len(results) < 2:
            return None
    since = results[-1][1]
    running = session.scalars(
        select(Job.started_at).where(
            Job.batch_id == batch.id, Job.state == states.JobState.RUNNING, schema.HAS_STARTED
        )
    )
    begun = [start or until for start in running]
    work = [*results, *failures, (min(begun, default=until), until)]
    seconds = worked_seconds(work, since=since, until=until)
    if seconds <= 0:
        return None
    # Workers that began together end together: their first results come within moments.
    most = max(_side_by_side(results), batch.running, 1)
    videos = len(results) - 1
    videos_per_second = min(videos / seconds, _full_speed(results, workers=most))
    mean = _mean_seconds(results)
    free_in = [max(mean - (until - start).total_seconds(), 0.0) for start in begun]
    return _Pace(
        videos_per_second=videos_per_second,
        jobs_per_second=videos_per_second * (videos + len(failures)) / videos,
        job_seconds=mean,
        free_in=sorted(free_in + [0.0] * (most - len(free_in))),
    )


def _latest_results(session: Session, batch: Batch) -> Sequence[tuple[datetime, datetime]]:
    """When its latest videos began and ended, the newest first: enough of them for a rate."""
    at_work = max(batch.running, 1)
    number = at_work * max(ROUNDS, math.ceil(RECENT_JOBS / at_work))
    while True:
        number = min(number, MOST_RESULTS)
        results = _latest(session, batch, states.JobState.SUCCEEDED, number=number)
        is_all = len(results) < number or number == MOST_RESULTS
        if is_all or number >= ROUNDS * _side_by_side(results):
            return results
        number *= 2


def _latest(
    session: Session,
    batch: Batch,
    state: states.JobState,
    *those: ColumnElement[bool],
    number: int,
) -> Sequence[tuple[datetime, datetime]]:
    """When the jobs began and ended that came to this state, the newest first."""
    rows = session.execute(
        select(Job.started_at, Job.finished_at)
        .where(Job.batch_id == batch.id, Job.state == state, *those)
        .order_by(Job.finished_at.desc())
        .limit(number)
    ).all()
    return [(start or end, end) for start, end in rows if end is not None]


def _mean_seconds(work: Sequence[tuple[datetime, datetime]]) -> float:
    return fmean((end - start).total_seconds() for start, end in work)


def _side_by_side(work: Sequence[tuple[datetime, datetime]]) -> int:
    """How many went on at once, at most."""
    changes = sorted([(start, 1) for start, _ in work] + [(end, -1) for _, end in work])
    return max(itertools.accumulate(change for _, change in changes))


def _full_speed(work: Sequence[tuple[datetime, datetime]], *, workers: int) -> float:
    """Jobs a second if that many workers all took the shortest time."""
    shortest = min((end - start).total_seconds() for start, end in work)
    return workers / shortest if shortest > 0 else math.inf


def worked_seconds(
    work: Sequence[tuple[datetime, datetime]], *, since: datetime, until: datetime
) -> float:
    """The time between two moments without the long stretches in which nothing was worked on."""
    counted, busy_until = (until - since).total_seconds(), since
    for start, end in sorted(work):
        idle_seconds = (start - busy_until).total_seconds()
        if idle_seconds > STOP_SECONDS:
            counted -= idle_seconds
        busy_until = max(busy_until, end)
    return counted
