"""Many at once, with everything that goes wrong in a night: nothing lost, nothing counted twice."""

import itertools
import random
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from sqlalchemy import select, text

from jobs import database, lifecycle, selection, states, submission
from jobs.schema import Job
from jobs.states import JobState
from tests.integration.jobs.conftest import QUEUE, World, prompt_file

THREADS = 16
CLAIM_ALL = """
import sys
from jobs import database, lifecycle
db = database.Database(sys.argv[1])
print("ready", flush=True)
sys.stdin.readline()
for job_id in map(int, sys.argv[3:]):
    if db.write(lifecycle.claim, job_id, worker=sys.argv[2], lease_seconds=60):
        print(job_id, flush=True)
"""


def test_processes_that_claim_the_same_jobs_share_them(world: World, database_url: str) -> None:
    ids = world.job_ids(world.submit(40))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CLAIM_ALL, database_url, f"gpu{number}@here", *map(str, ids)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    won = []
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        won += [int(line) for line in out.split()]
    assert sorted(won) == ids
    world.check()


class Night:
    """Workers that render nothing, in every way that a worker can behave."""

    def __init__(self, world: World, batch_ids: list[str]) -> None:
        self.world = world
        self.batch_ids = batch_ids
        self.wins: Counter[int] = Counter()
        self.late_wins = 0
        self._lock = threading.Lock()
        self._zombies: list[int] = []

    def work(self, seed: int) -> None:
        chance = random.Random(seed)
        worker = f"gpu{seed}@here"
        while job_ids := self._next():
            chance.shuffle(job_ids)
            for job_id in job_ids[:8]:
                claim = self.world.claim(job_id, worker=worker)
                if claim is not None:
                    self._render(claim, chance)
            self._odd_jobs(chance)

    def _next(self) -> list[int]:
        with self.world.db.reading() as session:
            open_ids = session.scalars(
                select(Job.id)
                .where(Job.state.in_([JobState.QUEUED, JobState.RUNNING]))
                .order_by(Job.id)
                .limit(64)
            ).all()
        return list(open_ids)

    def _render(self, claim: lifecycle.Claim, chance: random.Random) -> None:
        attempt_id, world = claim.attempt_id, self.world
        if world.heartbeat(attempt_id) is lifecycle.Verdict.CANCELLED:
            world.cancel_attempt(attempt_id)
            return
        dice = chance.random()
        if dice < 0.08:
            world.expire(attempt_id)  # killed, or only very slow
            with self._lock:
                self._zombies.append(attempt_id)
        elif dice < 0.13:
            world.release(attempt_id)
        elif dice < 0.2:
            world.fail(attempt_id)
        else:
            world.rendered(attempt_id)
            if world.succeed(attempt_id):
                with self._lock:
                    self.wins[claim.job_id] += 1

    def _odd_jobs(self, chance: random.Random) -> None:
        dice = chance.random()
        if dice < 0.5:
            self.world.end_lost()
        elif dice < 0.6:
            self.world.cancel_job(chance.choice(self._next() or [1]))
        elif dice < 0.62:
            self.world.cancel_batch(self.batch_ids[-1])
        with self._lock:
            zombie = self._zombies.pop() if self._zombies else None
        if zombie is None:
            return
        if self.world.succeed(zombie):
            # Its lease was over, but nobody had taken the job away yet.
            with self._lock:
                self.wins[self.world.attempt(zombie).job_id] += 1


def test_a_night_of_faults_loses_nothing_and_counts_nothing_twice(world: World) -> None:
    batch_ids = [world.submit(420), world.submit(80)]
    night = Night(world, batch_ids)
    with ThreadPoolExecutor(THREADS) as pool:
        for done in [pool.submit(night.work, seed) for seed in range(THREADS)]:
            done.result()
    world.check()
    jobs = [job for batch_id in batch_ids for job in world.jobs(batch_id)]
    assert len(jobs) == 500
    assert all(job.state in states.FINAL_JOB_STATES for job in jobs)
    assert all(world.batch(batch_id).finished_at for batch_id in batch_ids)
    succeeded = [job.id for job in jobs if job.state is JobState.SUCCEEDED]
    assert night.wins == Counter(succeeded)
    assert len(succeeded) > 300


def test_a_deadlock_is_tried_again(postgres_world: World) -> None:
    """Two that lock the same rows in opposite order: PostgreSQL ends one, which runs again."""
    world = postgres_world
    first, second = world.job_ids(world.submit(2))
    both_hold_one = threading.Barrier(2)
    runs: Counter[int] = Counter()

    def lock(session: database.Session, one: int, two: int) -> None:
        runs[one] += 1
        session.execute(text("SET LOCAL deadlock_timeout = '10ms'"))
        session.scalars(select(Job).where(Job.id == one).with_for_update()).one()
        if runs[one] == 1:
            both_hold_one.wait()
        session.scalars(select(Job).where(Job.id == two).with_for_update()).one()

    with ThreadPoolExecutor(2) as pool:
        for done in [
            pool.submit(world.db.write, lock, first, second),
            pool.submit(world.db.write, lock, second, first),
        ]:
            done.result()
    assert sum(runs.values()) > 2


def test_many_lost_attempts_are_ended_while_workers_finish_without_a_deadlock(
    postgres_world: World, postgres_url: str
) -> None:
    world = postgres_world
    for _ in range(4):
        batch_id = world.submit(40)
        attempts = [world.claimed(job_id) for job_id in world.job_ids(batch_id)]
        for attempt_id in attempts:
            world.expire(attempt_id)
        start = threading.Barrier(5)

        def end(start: threading.Barrier = start) -> None:
            start.wait()
            world.end_lost()

        def succeed(mine: list[int], start: threading.Barrier = start) -> None:
            start.wait()
            for attempt_id in mine:
                world.succeed(attempt_id)

        with ThreadPoolExecutor(5) as pool:
            backwards = attempts[::-1]
            for done in [pool.submit(end) for _ in range(2)] + [
                pool.submit(succeed, backwards[number::3]) for number in range(3)
            ]:
                done.result()
        world.check()
    with psycopg.connect(postgres_url) as admin:
        name = world.db.url.database
        found = admin.execute("SELECT deadlocks FROM pg_stat_database WHERE datname = %s", [name])
        assert found.fetchone() == (0,)


def test_a_connection_that_the_server_ends_is_replaced(
    postgres_world: World, postgres_url: str
) -> None:
    world = postgres_world
    job_id = world.only_job(world.submit()).id
    runs = itertools.count()

    def claim(session: database.Session) -> lifecycle.Claim | None:
        if next(runs) == 0:
            pid = session.scalar(text("SELECT pg_backend_pid()"))
            with psycopg.connect(postgres_url) as admin:
                admin.execute("SELECT pg_terminate_backend(%s)", [pid])
        return lifecycle.claim(session, job_id, worker="gpu0@here", lease_seconds=60)

    assert world.db.write(claim) is not None
    assert next(runs) == 2
    world.check()


def test_two_choices_at_once_take_each_job_once(world: World) -> None:
    ids = world.job_ids(world.submit(60))
    start = threading.Barrier(6)

    def choose() -> list[int]:
        start.wait()
        with world.db.reading() as session:
            chosen = selection.choose(session, queues=[QUEUE], room=10, waiting=set())
        return [job.id for job in world.db.write(selection.take, chosen)]

    with ThreadPoolExecutor(6) as pool:
        chosen = [f.result() for f in [pool.submit(choose) for _ in range(6)]]
    taken = [job_id for jobs in chosen for job_id in jobs]
    assert len(taken) == len(set(taken))
    assert set(taken) <= set(ids)


def test_readers_are_not_held_up_by_a_writer(world: World) -> None:
    """`rushes show` works while a huge batch is being stored."""
    batch_id = world.submit(3)
    with world.db.transaction() as writing:
        writing.scalars(select(Job).with_for_update()).all()
        for job in writing.scalars(select(Job)).all():
            job.error = "not yet committed"
        writing.flush()
        assert [job.error for job in world.jobs(batch_id)] == [None] * 3


@pytest.mark.parametrize("same", [True, False], ids=["one key", "no key"])
def test_submits_at_once_store_what_they_should(world: World, same: bool) -> None:
    """With one key they are one batch; without, the new look that they share is no quarrel."""
    rows = [{"prompt": f"prompt {number}"} for number in range(200)]
    start = threading.Barrier(4)
    key = "tonight" if same else None

    def submit() -> submission.Submission:
        start.wait()
        return submission.submit(world.db, prompt_file(rows, idempotency_key=key))

    with ThreadPoolExecutor(4) as pool:
        done = [f.result() for f in [pool.submit(submit) for _ in range(4)]]
    assert len({one.batch_id for one in done}) == (1 if same else 4)
    assert sum(one.is_new for one in done) == (1 if same else 4)
    with world.db.reading() as session:
        assert len(session.scalars(select(Job.id)).all()) == (200 if same else 800)
    world.check()
