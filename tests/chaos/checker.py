"""Compares what was promised with what is there, and the history with the invariants.

Each check is a function that yields what is wrong, in words; silence means that it holds.
"""

import hashlib
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from jobs import database, results, states, storage
from jobs.schema import Attempt, Batch, Job
from tests.chaos import record
from tests.chaos.farm import Plan
from tests.chaos.nemesis import Pause, Strike
from tests.chaos.workload import Promise

FINAL = {state.value for state in states.FINAL_JOB_STATES}
DATABASE_AWAY = ("postgresql stopped", "postgresql restarted", "postgresql half open")
LEASE_SLACK_SECONDS = 0.01  # rounding of the database


@dataclass(frozen=True, kw_only=True)
class World:
    """Everything that is left at the end."""

    plan: Plan
    promises: Mapping[str, Promise]
    batches: Sequence[Batch]
    jobs: Mapping[int, Job]
    attempts: Mapping[int, Sequence[Attempt]]
    """Of each job, oldest first."""
    moves: Mapping[int, Sequence[record.Move]]
    late_writes: Sequence[int]
    store: storage.ObjectStore
    pauses: Sequence[Pause] = ()


def read(
    db: database.Database,
    store: storage.ObjectStore,
    *,
    plan: Plan,
    promises: Mapping[str, Promise],
    pauses: Sequence[Pause] = (),
) -> World:
    attempts: dict[int, list[Attempt]] = defaultdict(list)
    moves: dict[int, list[record.Move]] = defaultdict(list)
    with db.reading() as session:
        batches = session.scalars(select(Batch)).all()
        jobs = {job.id: job for job in session.scalars(select(Job))}
        for attempt in session.scalars(select(Attempt).order_by(Attempt.id)):
            attempts[attempt.job_id].append(attempt)
    for move in record.moves(db):
        moves[move.job_id].append(move)
    return World(
        plan=plan,
        promises=promises,
        batches=batches,
        jobs=jobs,
        attempts=attempts,
        moves=moves,
        late_writes=record.late_writes(db),
        store=store,
        pauses=pauses,
    )


def promises_are_kept(world: World) -> Iterator[str]:
    """Every acknowledged batch is there once, whole; what was not acknowledged is never half."""
    by_key = {batch.idempotency_key: batch for batch in world.batches}
    sizes = Counter(job.batch_id for job in world.jobs.values())
    for key, promise in world.promises.items():
        batch = by_key.get(key)
        if batch is None:
            yield f"batch {promise.batch_id} was acknowledged and is gone"
        elif batch.id != promise.batch_id:
            yield f"{key} was acknowledged as {promise.batch_id} and is {batch.id}"
        elif batch.total != promise.jobs:
            yield f"{batch.id}: {promise.jobs} jobs were acknowledged, it has {batch.total}"
    for batch in world.batches:
        if sizes[batch.id] != batch.total:
            yield f"{batch.id}: says {batch.total} jobs, has {sizes[batch.id]}"


def nothing_is_lost(world: World) -> Iterator[str]:
    """Every job has its video, but for those that no worker can survive, or that were too late."""
    poison = _poison(world)
    late = _late_batches(world)
    for job in world.jobs.values():
        if job.batch_id in late and job.state is states.JobState.CANCELLED:
            if job.failure_kind is not states.FailureKind.DEADLINE:
                yield f"job {job.id} is cancelled, and not for its deadline: {job.failure_kind}"
            continue
        is_poison = (job.batch_id, job.position) in poison
        expected = states.JobState.FAILED if is_poison else states.JobState.SUCCEEDED
        if job.state is not expected:
            yield f"job {job.id} is {job.state}: {job.failure_kind} {job.error}"
        elif is_poison and not job.quarantined:
            yield f"job {job.id} ends its workers and is not quarantined"


def _poison(world: World) -> set[tuple[str, int]]:
    return {
        (promise.batch_id, position)
        for promise in world.promises.values()
        for position in promise.poison
    }


def _late_batches(world: World) -> set[str]:
    return {promise.batch_id for promise in world.promises.values() if promise.has_deadline}


def deadlines_hold(world: World) -> Iterator[str]:
    """No attempt begins after its batch's deadline, by the database's clock."""
    deadlines = {batch.id: batch.deadline_at for batch in world.batches}
    for job_id, attempts in world.attempts.items():
        deadline = deadlines[world.jobs[job_id].batch_id]
        for attempt in attempts:
            if deadline is not None and attempt.started_at >= deadline:
                yield f"attempt {attempt.id} of job {job_id} began after the deadline"


def nothing_starts_while_paused(world: World) -> Iterator[str]:
    """I9: between the commit of a pause and its end, by the database's clock."""
    for pause in world.pauses:
        for job_id, attempts in world.attempts.items():
            if world.jobs[job_id].batch_id != pause.batch_id:
                continue
            for attempt in attempts:
                if pause.since < attempt.started_at < pause.until:
                    yield f"attempt {attempt.id} of job {job_id} began in a pause of its batch"


def finished_videos_are_not_rendered_again(world: World) -> Iterator[str]:
    """Whatever the store and the host's processes did meanwhile."""
    for job_id, attempts in world.attempts.items():
        finished = [attempt.id for attempt in attempts if attempt.seconds is not None]
        if len(finished) > 1:
            yield f"job {job_id} was rendered to its end by attempts {finished}"


def nothing_is_committed_twice(world: World) -> Iterator[str]:
    for job_id, moves in world.moves.items():
        committed = sum(move.after == "succeeded" for move in moves)
        if committed > 1:
            yield f"job {job_id} succeeded {committed} times"
    for job_id, attempts in world.attempts.items():
        won = [a.id for a in attempts if a.state is states.AttemptState.SUCCEEDED]
        if len(won) > 1:
            yield f"job {job_id} has {len(won)} attempts that succeeded"


def one_live_attempt_per_job(world: World) -> Iterator[str]:
    """I1: by the database's clock, an attempt begins after the one before it has ended."""
    for job_id, attempts in world.attempts.items():
        for earlier, later in itertools.pairwise(attempts):
            if earlier.finished_at is None or later.started_at < earlier.finished_at:
                yield f"job {job_id}: attempts {earlier.id} and {later.id} lived together"


def states_follow_the_table(world: World) -> Iterator[str]:
    """I2: only moves that `states.TRANSITIONS` has; a final state stays."""
    for job_id, moves in world.moves.items():
        now = "queued"
        for move in moves:
            allowed = states.TRANSITIONS[states.JobState(move.before)]
            if move.before != now or (
                move.after != move.before and states.JobState(move.after) not in allowed
            ):
                yield f"job {job_id}: {move.before} -> {move.after}, it was {now}"
            if move.before in FINAL:
                yield f"job {job_id} left the final state {move.before}"
            now = move.after


def winners_are_in_the_store(world: World) -> Iterator[str]:
    """I3: a job that succeeded has one object of its attempt, byte for byte, and its sidecar."""
    for job in world.jobs.values():
        if job.state is not states.JobState.SUCCEEDED:
            continue
        winner = next((a for a in world.attempts[job.id] if a.id == job.attempt_id), None)
        if winner is None or winner.video_key is None:
            yield f"job {job.id} succeeded without a video"
            continue
        try:
            video = world.store.read_bytes(winner.video_key)
            sidecar = json.loads(
                world.store.read_bytes(results.sidecar_key(job.batch_id, job.id, winner.id))
            )
        except storage.StorageError as error:
            yield f"job {job.id}: {error}"
            continue
        found = (len(video), hashlib.sha256(video).hexdigest())
        if found != (winner.video_bytes, winner.video_sha256):
            yield f"job {job.id}: the store has {found[0]} bytes of another content"
        if (sidecar["job_id"], sidecar["attempt_id"]) != (job.id, winner.id):
            yield f"job {job.id}: the sidecar is another's"


def fences_hold(world: World) -> Iterator[str]:
    """I4: holders only grow, every move under a fence is its holder's, no attempt is written
    after its end.
    """
    for job_id, moves in world.moves.items():
        highest = 0
        holder: int | None = None
        for move in moves:
            if move.fence_before != holder:
                yield f"job {job_id}: held by {holder}, moved as if by {move.fence_before}"
            holder = move.fence_after
            if holder is not None and holder != move.fence_before:
                if holder <= highest:
                    yield f"job {job_id}: holder {holder} after {highest}"
                highest = max(highest, holder)
    for attempt_id in world.late_writes:
        yield f"attempt {attempt_id} was written after its end"


def counts_add_up(world: World) -> Iterator[str]:
    """I5, at the end; `Watch` looks at it all the time."""
    yield from miscounted(world.batches, (job for job in world.jobs.values()))


def miscounted(batches: Iterable[Batch], jobs: Iterable[Job]) -> Iterator[str]:
    counted = Counter((job.batch_id, job.state) for job in jobs)
    for batch in batches:
        told = {state: getattr(batch, state.value) for state in states.JobState}
        there = {state: counted[batch.id, state] for state in states.JobState}
        if told != there:
            yield f"{batch.id} says {told}, has {there}"


def budgets_are_charged_rightly(world: World) -> Iterator[str]:
    """I7: an error per attempt that failed, a crash per lost one, none for one given back."""
    for job in world.jobs.values():
        ends = Counter(attempt.state for attempt in world.attempts.get(job.id, ()))
        charged = (job.error_count, job.crash_count)
        told = (ends[states.AttemptState.FAILED], ends[states.AttemptState.LOST])
        if charged != told:
            yield f"job {job.id}: charged {charged} for (failed, lost) {told}"


def manifests_are_complete(world: World) -> Iterator[str]:
    """I8: each batch has its manifest, its files are as it says, and list every job once."""
    for batch in world.batches:
        try:
            body = world.store.read_bytes(results.batch_key(batch.id, "manifest.json"))
            manifest = json.loads(body)
            yield from _wrong_in_files(world, batch, manifest)
        except storage.StorageError as error:
            yield f"{batch.id}: {error}"


def _wrong_in_files(world: World, batch: Batch, manifest: dict[str, Any]) -> Iterator[str]:
    listed: Counter[int] = Counter()
    for name, told in manifest["files"].items():
        data = world.store.read_bytes(told["key"])
        if hashlib.sha256(data).hexdigest() != told["sha256"]:
            yield f"{batch.id}: {name} is not the file of its manifest"
        listed.update(json.loads(line)["job_id"] for line in data.splitlines())
    expected = {job.id for job in world.jobs.values() if job.batch_id == batch.id}
    if set(listed) != expected or max(listed.values(), default=0) > 1:
        yield f"{batch.id}: its files list {len(listed)} of {len(expected)} jobs"
    counts = {key: getattr(batch, key) for key in ("total", "succeeded", "failed", "cancelled")}
    if manifest["counts"] != counts:
        yield f"{batch.id}: the manifest counts {manifest['counts']}, the row {counts}"


def leases_know_the_database_clock_only(world: World) -> Iterator[str]:
    """I12: whatever a worker's clock says, a lease is as long as it is set, and in order."""
    lengths = (world.plan.lease_seconds, world.plan.publish_lease_seconds)
    for attempts in world.attempts.values():
        for a in attempts:
            length = (a.lease_until - a.heartbeat_at).total_seconds()
            if min(abs(length - expected) for expected in lengths) > LEASE_SLACK_SECONDS:
                yield f"attempt {a.id} of {a.worker}: a lease of {length:.3f} s"
            if a.finished_at is not None and not (a.started_at <= a.heartbeat_at <= a.finished_at):
                yield f"attempt {a.id} of {a.worker}: started, renewed, ended out of order"


CHECKS = (
    promises_are_kept,
    nothing_is_lost,
    deadlines_hold,
    nothing_starts_while_paused,
    finished_videos_are_not_rendered_again,
    nothing_is_committed_twice,
    one_live_attempt_per_job,
    states_follow_the_table,
    winners_are_in_the_store,
    fences_hold,
    counts_add_up,
    budgets_are_charged_rightly,
    manifests_are_complete,
    leases_know_the_database_clock_only,
)


def snapshot_is_in_order(db: database.Database) -> list[str]:
    """What must hold at every moment, in one consistent look: I1 and I5."""
    with db.reading() as session:
        if not db.is_sqlite:
            session.connection(execution_options={"isolation_level": "REPEATABLE READ"})
        counted = session.execute(
            select(Job.batch_id, Job.state, func.count()).group_by(Job.batch_id, Job.state)
        ).all()
        there = {(batch_id, state): number for batch_id, state, number in counted}
        wrong = []
        for batch in session.scalars(select(Batch)):
            for state in states.JobState:
                told = getattr(batch, state.value)
                if told != there.get((batch.id, state), 0):
                    wrong.append(f"{batch.id} says {told} {state}")
        live = session.execute(
            select(Attempt.job_id, Attempt.id).where(Attempt.state.in_(states.LIVE_ATTEMPT_STATES))
        ).all()
        running = session.execute(
            select(Job.id, Job.attempt_id).where(Job.state == states.JobState.RUNNING)
        ).all()
        if set(map(tuple, live)) != set(map(tuple, running)):
            wrong.append(f"running jobs {running}, live attempts {live}")
    return wrong


def extra_executions(world: World, strikes: Sequence[Strike]) -> tuple[int, list[str]]:
    """Attempts beyond the one that each job needs; in words those that no strike explains."""
    poison, late = _poison(world), _late_batches(world)
    number, unexplained = 0, []
    for job_id, attempts in world.attempts.items():
        job = world.jobs[job_id]
        if (job.batch_id, job.position) in poison or job.batch_id in late:
            continue
        for attempt in attempts:
            if attempt.state is states.AttemptState.SUCCEEDED:
                continue
            number += 1
            if not any(_explains(strike, attempt) for strike in strikes):
                unexplained.append(
                    f"attempt {attempt.id} of {attempt.worker}, {attempt.state}: {attempt.error}"
                )
    return number, unexplained


def _explains(strike: Strike, attempt: Attempt) -> bool:
    ended = attempt.finished_at
    if strike.what.startswith("postgresql"):
        # A claim whose answer was lost. Leases that an outage ended are no excuse.
        is_given_back = attempt.state is states.AttemptState.RELEASED
        slack = timedelta(seconds=5)
        return is_given_back and strike.at - slack <= attempt.started_at <= strike.until + slack
    is_hit = attempt.worker in strike.workers
    return is_hit and attempt.started_at <= strike.until and (ended is None or ended >= strike.at)


@dataclass(frozen=True, kw_only=True, order=True)
class Detection:
    """The database knew of a dead worker this long after the kill."""

    seconds: float
    known_at: datetime
    worker: str
    attempt_id: int

    def __str__(self) -> str:
        when = f"{self.known_at:%H:%M:%S}"
        return f"{self.worker}, attempt {self.attempt_id}: {self.seconds:.1f} s, at {when}"


def detections(world: World, strikes: Sequence[Strike]) -> list[Detection]:
    """Counted from a kill, or from when PostgreSQL was back after it.

    Dispatchers give every lease its whole time again after each absence of the database.
    """
    found = []
    for attempts in world.attempts.values():
        for attempt in attempts:
            if attempt.state is not states.AttemptState.LOST or attempt.finished_at is None:
                continue
            ended = attempt.finished_at
            blows = [
                strike.at
                for strike in strikes
                if strike.what.startswith(("kill", "stop"))
                and attempt.worker in strike.workers
                and attempt.started_at <= strike.at <= ended
            ]
            if blows:
                back = (s.until for s in strikes if s.what in DATABASE_AWAY and s.until <= ended)
                silent = ended - max([min(blows), *back])
                found.append(
                    Detection(
                        seconds=silent.total_seconds(),
                        known_at=ended,
                        worker=attempt.worker,
                        attempt_id=attempt.id,
                    )
                )
    return found


def seconds_with_database(strikes: Sequence[Strike], begin: datetime, end: datetime) -> float:
    """From `begin` to `end`, without the time in which PostgreSQL was stopped or restarted."""
    seconds, place = 0.0, begin
    for strike in sorted(strikes, key=lambda strike: strike.at):
        if strike.what in DATABASE_AWAY and strike.until > place:
            seconds += max(0.0, (min(strike.at, end) - place).total_seconds())
            place = min(strike.until, end)
    return seconds + (end - place).total_seconds()


def secrets_in(paths: Iterable[Path], secrets: Mapping[str, str]) -> list[str]:
    """Where a log shows what it must not."""
    found = []
    for path in paths:
        data = path.read_text("utf-8", errors="replace")
        found += [
            f"{path.name} shows the {name}" for name, value in secrets.items() if value in data
        ]
    return found
