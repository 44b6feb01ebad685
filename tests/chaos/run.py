"""One run: a farm, work for it, strikes at it, and the verdict."""

import contextlib
import json
import math
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.exc import SQLAlchemyError

from jobs import database, stores
from jobs.schema import Batch
from tests.chaos import checker, farm, record
from tests.chaos.nemesis import BOMB_MARK, Nemesis, Strike
from tests.chaos.workload import Workload

REDIS_LOSSES = ("redis flushed", "redis lost")
MOST_EXTRA_SHARE = 0.01
MOST_SECONDS = {"crash_detected_seconds": 60.0, "claims_after_redis_came_back_seconds": 30.0}
TOLD = 5  # examples per check


@dataclass(frozen=True, kw_only=True)
class Script:
    """How much work, how many strikes."""

    plan: farm.Plan
    jobs: int
    batch_size: int
    poison_jobs: int
    late_batches: int
    quotas: dict[str, int]
    outage_seconds: tuple[float, float]
    seed: int
    limit_seconds: float
    stuck_seconds: float = 30.0
    striking_seconds: float = math.inf
    """Then nothing more is submitted or struck, however much is left, and the rest is rendered."""
    strikes_per_job: float = 1.0
    """As a multiple of those of the long form as it is: of a part of it there is one at least."""
    must_reach_goals: bool = False
    """A form with few jobs or short leases says nothing about these."""


@dataclass
class Watch:
    """Looks at the rows once a second, whatever happens, and remembers what was wrong."""

    db: database.Database
    wrong: list[str] = field(default_factory=list)
    looks: int = 0
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self.stop.wait(1.0):
            try:
                self.wrong += checker.snapshot_is_in_order(self.db)
                self.looks += 1
            except SQLAlchemyError:
                self.db.close()  # the server is being restarted

    def end(self) -> None:
        self.stop.set()
        self._thread.join(30)
        self.db.close()


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What a run showed."""

    script: Script
    seconds: float
    is_finished: bool
    wrong: dict[str, list[str]]
    """Check -> what is wrong; empty lists are left out."""
    figures: dict[str, Any]
    strikes: list[Strike]
    skipped: dict[str, str]
    exit_status: dict[str, int | None]

    @property
    def is_good(self) -> bool:
        return self.is_finished and not self.wrong

    def told(self) -> dict[str, Any]:
        return {
            "good": self.is_good,
            "finished": self.is_finished,
            "seconds": round(self.seconds, 1),
            "seed": self.script.seed,
            "figures": self.figures,
            "wrong": {name: found[:TOLD] for name, found in self.wrong.items()},
            "strikes": dict(Counter(strike.what for strike in self.strikes)),
            "skipped": self.skipped,
            "exit_status": self.exit_status,
            "history": [strike.told() for strike in self.strikes],
        }


def run(script: Script, folder: Path) -> Verdict:
    """Writes `report.json` into the folder, beside all logs."""
    began = time.monotonic()
    with farm.running(script.plan, folder) as here:
        db = here.direct_database()
        record.install(db)
        watch = Watch(here.direct_database())
        work = Workload(
            config=here.config,
            folder=folder,
            jobs=script.jobs,
            batch_size=script.batch_size,
            seed=script.seed,
            poison_jobs=script.poison_jobs,
            late_batches=script.late_batches,
        )
        nemesis = Nemesis(
            farm=here,
            db=db,
            quotas=Counter(script.quotas),
            seed=script.seed,
            outage_seconds=script.outage_seconds,
            stuck_seconds=script.stuck_seconds,
        )
        deadline = began + script.limit_seconds
        strike_until = min(deadline, began + script.striking_seconds)
        progress = Progress(db, work)
        work.start()
        nemesis.run(
            done_share=progress.done_share,
            is_over=lambda: time.monotonic() > strike_until or progress.is_finished(),
        )
        while time.monotonic() < deadline and not progress.is_finished():
            here.start_failed()
            if time.monotonic() > strike_until:
                work.enough.set()
            time.sleep(0.5)
        work.stop.set()
        watch.end()
        progress.end()
        seconds, is_finished = time.monotonic() - began, progress.is_finished()
        exit_status = here.stop()
        verdict = _judge(script, here, db, work, nemesis, watch, seconds, is_finished, exit_status)
        db.close()
    (folder / "report.json").write_text(json.dumps(verdict.told(), indent=2))
    return verdict


class Progress:
    """How far the work is, by the last look that was answered.

    Looks from a thread of its own: those who ask are also those who mend the database.
    """

    def __init__(self, db: database.Database, work: Workload) -> None:
        self._db = db
        self._work = work
        self._done = 0
        self._written = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()

    def done_share(self) -> float:
        return self._done / self._work.all_jobs

    def is_finished(self) -> bool:
        """All is submitted, every batch has ended and its manifest is written."""
        return self._work.is_done and self._written >= len(self._work.promises)

    def end(self) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        final = Batch.succeeded + Batch.failed + Batch.cancelled
        look = select(func.coalesce(func.sum(final), 0), func.count(Batch.manifest_at))
        while not self._stop.wait(0.5):
            with contextlib.suppress(SQLAlchemyError), self._db.reading() as session:
                done, written = session.execute(look).one()
                self._done, self._written = int(done), int(written)


def _judge(
    script: Script,
    here: farm.Farm,
    db: database.Database,
    work: Workload,
    nemesis: Nemesis,
    watch: Watch,
    seconds: float,
    is_finished: bool,
    exit_status: dict[str, int | None],
) -> Verdict:
    store = stores.open_store(here.config)
    world = checker.read(db, store, plan=script.plan, promises=work.promises, pauses=nemesis.pauses)
    wrong = {check.__name__: list(check(world)) for check in checker.CHECKS}
    wrong["snapshots_are_in_order"] = watch.wrong
    wrong["no_log_shows_a_secret"] = checker.secrets_in(here.logs(), here.secrets)
    if (here.folder / BOMB_MARK).exists():
        wrong["no_message_is_executed"] = ["a pickled message was executed by a worker"]
    extra, unexplained = checker.extra_executions(world, nemesis.strikes)
    detections = sorted(checker.detections(world, nemesis.strikes), reverse=True)
    ends = Counter(a.state.value for attempts in world.attempts.values() for a in attempts)
    finals = Counter(job.state.value for job in world.jobs.values())
    figures = {
        "jobs_acknowledged": sum(promise.jobs for promise in work.promises.values()),
        "jobs": dict(finals),
        "attempts": dict(ends),
        "submits_tried_again": work.refused,
        "extra_executions": extra,
        "extra_share": round(extra / max(1, len(world.jobs)), 5),
        "unexplained_executions": len(unexplained),
        "unexplained": unexplained[:TOLD],
        "kills": sum(strike.what.startswith("kill") for strike in nemesis.strikes),
        "redis_losses": sum(strike.what in REDIS_LOSSES for strike in nemesis.strikes),
        "postgresql_restarts": sum(s.what == "postgresql restarted" for s in nemesis.strikes),
        "crash_detected_seconds": _spread([each.seconds for each in detections]),
        "crashes_detected_last": [str(each) for each in detections[:3]],
        "claims_after_redis_came_back_seconds": _spread(_after_redis(db, nemesis.strikes)),
        "jobs_per_second": round(len(world.jobs) / seconds, 2),
        "snapshots": watch.looks,
        "moves": sum(map(len, world.moves.values())),
        "zombies_refused": _count_in_logs(here, "superseded"),
        "workers_taken_out": _count_in_logs(here, '"selftest.started"'),
        "selftests_failed": _count_in_logs(here, '"selftest.failed"'),
    }
    if script.must_reach_goals:
        most = MOST_EXTRA_SHARE * script.strikes_per_job
        wrong["goals_are_reached"] = list(_missed(figures, most_extra_share=most))
    return Verdict(
        script=script,
        seconds=seconds,
        is_finished=is_finished,
        wrong={name: found for name, found in wrong.items() if found},
        figures=figures,
        strikes=nemesis.strikes,
        skipped=nemesis.skipped,
        exit_status=exit_status,
    )


def _missed(figures: dict[str, Any], *, most_extra_share: float) -> Iterator[str]:
    """What guarantees.md gives numbers for."""
    if figures["extra_share"] > most_extra_share:
        yield (
            f"{figures['extra_share']:.2%} of the jobs were rendered more than once, "
            f"goal {most_extra_share:.2%}"
        )
    if figures["unexplained_executions"]:
        yield f"executions that no strike explains: {figures['unexplained']}"
    for name, most in MOST_SECONDS.items():
        found = figures[name]
        if found is not None and found["most"] > most:
            yield f"{name}: {found['most']:.1f} s, goal {most:.0f} s"


def _after_redis(db: database.Database, strikes: list[Strike]) -> list[float]:
    """From an empty Redis that answers to the next claim, while the database was there."""
    found = []
    for strike in strikes:
        if strike.what in REDIS_LOSSES:
            claimed = record.since(db, strike.until)
            if claimed is not None:
                found.append(checker.seconds_with_database(strikes, strike.until, claimed))
    return found


def _spread(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {
        "count": len(values),
        "median": round(statistics.median(values), 2),
        "most": round(max(values), 2),
    }


def _count_in_logs(here: farm.Farm, word: str) -> int:
    return sum(path.read_text("utf-8", errors="replace").count(word) for path in here.logs())


def tell(verdict: Verdict) -> None:
    """The verdict for people."""
    told = verdict.told()
    lines = [f"{name}: {value}" for name, value in told["figures"].items()]
    lines += [f"strikes: {told['strikes']}", f"skipped: {told['skipped']}"]
    for name, found in verdict.wrong.items():
        lines += [f"WRONG {name}: {len(found)}", *(f"    {line}" for line in found[:TOLD])]
    lines.append(f"{'GOOD' if verdict.is_good else 'BAD'} after {verdict.seconds:.0f} s")
    sys.stdout.write("\n".join(lines) + "\n")
