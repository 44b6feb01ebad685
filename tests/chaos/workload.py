"""People who submit batches whatever happens, and remember what they were promised."""

import contextlib
import io
import json
import random
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError

from jobs import broker, database, presets, settings, submission
from jobs.schema import Batch
from worker import simulation

SIZE = "64x64"
AGAIN_SECONDS = 0.5
LATE_JOBS = 40
LATE = timedelta(seconds=12)
PRESET = {
    "model_path": "simulated",
    "denoising_step_list": [1000, 750, 500, 250],
    "step_rule": "euler",
    "sample_shift": 5,
    "target_width": 64,
    "target_height": 64,
    "target_video_length": 5,
    "fps": 16,
}
POISON = ("crash", "hang")
"""Jobs that end whoever renders them: quarantined, and the batch goes on."""


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A submit that was answered with a batch id."""

    batch_id: str
    jobs: int
    poison: Mapping[int, str]
    """Position -> what is wrong with it."""
    has_deadline: bool = False
    """Too short a one: what is not finished by then is cancelled."""


@dataclass
class Workload:
    """Submits in a thread of its own; `promises` is what was acknowledged."""

    config: settings.Settings
    folder: Path
    jobs: int
    batch_size: int
    seed: int
    poison_jobs: int = 0
    late_batches: int = 0
    """Beside the others: each as large as LATE_JOBS, with a deadline that it cannot keep."""
    promises: dict[str, Promise] = field(default_factory=dict)
    """By idempotency key."""
    most_open: int = 1_000
    """The next batch comes when fewer jobs are open, as from people who see a full queue."""
    refused: int = 0
    """Submits that were not acknowledged and were tried again with the same key."""
    enough: threading.Event = field(default_factory=threading.Event)
    """No further batch; one that is being submitted is, until it is acknowledged."""
    stop: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._thread = threading.Thread(target=self._run, name="workload", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def is_done(self) -> bool:
        return not self._thread.is_alive()

    @property
    def whole_batches(self) -> int:
        return -(-self.jobs // self.batch_size)

    @property
    def all_jobs(self) -> int:
        return self.jobs + self.late_batches * LATE_JOBS

    def _run(self) -> None:
        rng = random.Random(self.seed)
        path = self.folder / "chaos.json"
        path.write_text(json.dumps(PRESET))
        preset = presets.load(str(path))
        db, bell = database.connect(self.config), broker.Broker(self.config)
        poisoned = set(rng.sample(range(self.jobs), self.poison_jobs))
        for number in range(self.late_batches):
            if not self._submit(db, preset, f"late-{number}", LATE_JOBS, {}, deadline=LATE):
                break
        for number in range(self.whole_batches):
            if not self._has_turn(db):
                break
            first = number * self.batch_size
            size = min(self.batch_size, self.jobs - first)
            poison = {
                position: POISON[position % len(POISON)]
                for position in range(size)
                if first + position in poisoned
            }
            if not self._submit(db, preset, f"chaos-{number}", size, poison):
                break
            bell.kick()
        db.close()

    def _has_turn(self, db: database.Database) -> bool:
        """As soon as not too many jobs are open. False: it is enough."""
        total = func.coalesce(func.sum(Batch.queued + Batch.running), 0)
        open_jobs = select(total).where(Batch.finished_at.is_(None))
        unreachable = (DBAPIError, database.DatabaseUnavailable)
        while not self.enough.is_set():
            with contextlib.suppress(*unreachable), db.reading() as session:
                if session.scalars(open_jobs).one() < self.most_open:
                    return True
            self.enough.wait(AGAIN_SECONDS)
        return False

    def _submit(
        self,
        db: database.Database,
        preset: presets.Preset,
        key: str,
        size: int,
        poison: Mapping[int, str],
        *,
        deadline: timedelta | None = None,
    ) -> bool:
        """Until it is acknowledged. False: told to stop."""
        rows = [
            {"prompt": f"{key} prompt {position}", "seed": position}
            | ({"metadata": {simulation.FAULT: poison[position]}} if position in poison else {})
            for position in range(size)
        ]
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        while not self.stop.is_set():
            prompts = submission.PromptFile(
                stream=io.BytesIO(data),
                source="chaos",
                format="jsonl",
                options=submission.Options(preset=preset, idempotency_key=key, deadline=deadline),
            )
            try:
                batch_id = submission.submit(db, prompts).batch_id
            except (DBAPIError, database.DatabaseUnavailable):
                self.refused += 1
                self.stop.wait(AGAIN_SECONDS)
            else:
                self.promises[key] = Promise(
                    batch_id=batch_id,
                    jobs=size,
                    poison=dict(poison),
                    has_deadline=deadline is not None,
                )
                return True
        return False
