"""A whole farm as a person starts it: `rushes up` in a process of its own."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
from redis import Redis

from jobs import (
    broker,
    database,
    inputs,
    presets,
    queries,
    servers,
    settings,
    states,
    storage,
    stores,
    submission,
)
from jobs.schema import Attempt, Job
from tests.waiting import until

START_SECONDS = 90.0
LEASE_SECONDS = 4.0


@dataclass
class Farm:
    """`rushes up` and what a test does with it."""

    home: Path
    process: subprocess.Popen[bytes]
    config: settings.Settings
    db: database.Database
    long_preset: Path
    """A look whose render takes several seconds: there is time to break something."""
    store: storage.ObjectStore = field(init=False)
    redis: Redis = field(init=False)

    def __post_init__(self) -> None:
        self.store = stores.open_store(self.config)
        self.redis = Redis.from_url(self.config.broker_url.get_secret_value())

    def submit(self, rows: list[dict[str, Any]], *, preset: str | Path = "tiny") -> str:
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        prompts = submission.PromptFile(
            stream=io.BytesIO(data),
            source="test",
            format="jsonl",
            options=submission.Options(preset=presets.load(str(preset))),
            images=inputs.InputImages(config=self.config, base=self.home, store=self.store),
        )
        batch_id = submission.submit(self.db, prompts).batch_id
        broker.Broker(self.config).kick()
        return batch_id

    def send_render(self, job_id: int, *, times: int = 1) -> None:
        queue = self.look(job_id)
        broker.Broker(self.config).send_renders(queue, [job_id] * times)

    def look(self, job_id: int) -> str:
        with self.db.reading() as session:
            return session.get_one(Job, job_id).queue

    def jobs(self, batch_id: str) -> list[Job]:
        with self.db.reading() as session:
            return list(queries.jobs(session, batch_id, limit=10_000))

    def attempts(self, job_id: int) -> list[Attempt]:
        with self.db.reading() as session:
            return list(queries.attempts(session, job_id))

    def progress(self, batch_id: str) -> queries.Progress:
        with self.db.reading() as session:
            return queries.progress(session, batch_id)

    def wait_finished(self, batch_id: str, *, seconds: float = 120.0) -> queries.Progress:
        """The batch is finished and its result files are written."""
        return until(
            lambda: self.progress(batch_id),
            lambda progress: progress.batch.manifest_at is not None,
            seconds=seconds,
        )

    def wait_stage(self, job_id: int, *stages: str, seconds: float = 60.0) -> Attempt:
        """An attempt of this job runs and has reached one of the stages."""
        return until(
            lambda: (self.attempts(job_id) or [None])[-1],
            lambda attempt: (
                attempt is not None
                and attempt.state is states.AttemptState.RUNNING
                and attempt.stage in stages
            ),
            seconds=seconds,
        )

    def sidecar(self, job: Job) -> dict[str, Any]:
        key = self.winner(job).video_key
        assert key is not None
        found: dict[str, Any] = json.loads(self.store.read_bytes(key.replace(".mp4", ".json")))
        return found

    def winner(self, job: Job) -> Attempt:
        with self.db.reading() as session:
            attempt = queries.winning_attempt(session, session.get_one(Job, job.id))
        assert attempt is not None
        return attempt

    def worker_process(self, worker_name: str) -> psutil.Process:
        """Celery's parent process of a worker."""
        with self.db.reading() as session:
            found = [w for w in queries.live_workers(session) if w.worker.name == worker_name]
        return psutil.Process(found[0].worker.pid)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Farm]]:
    """Starts farms of this test alone, one after the other in the same folder."""
    started: list[Farm] = []

    def start_one(**options: str) -> Farm:
        started.append(start_farm(tmp_path / "farm", **options))
        return started[-1]

    yield start_one
    for farm in started:
        stop_farm(farm)


def clean_environment(home: Path) -> dict[str, str]:
    """What a new user's shell has, and short leases so that a crash is noticed within seconds."""
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}
    return kept | {
        "RUSHES_HOME": str(home),
        "RUSHES_LEASE_SECONDS": str(LEASE_SECONDS),
        "RUSHES_TICK_SECONDS": "0.5",
        "RUSHES_RETRY_SECONDS": "0.5",
        "RUSHES_GRACE_SECONDS": "30",
        "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
        "HF_HUB_OFFLINE": "1",
    }


def start_farm(home: Path, *, devices: str = "cpu:2", **environment: str) -> Farm:
    home.mkdir(parents=True, exist_ok=True)
    # Farms that begin at once would each find the usual port free.
    environment = {"RUSHES_WEB_PORT": str(servers.free_port())} | environment
    with (home / "up.log").open("ab") as log:
        process = subprocess.Popen(
            # Killed tests run no fixture's end.
            [*servers.tied_to_parent(), sys.executable, "-m", "jobs", "up", "--devices", devices],
            env=clean_environment(home) | environment,
            cwd=home,
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def up_environment() -> dict[str, str]:
        assert process.poll() is None, (home / "up.log").read_text()[-3000:]
        return settings.read_up_file(home)

    until(up_environment, seconds=START_SECONDS)
    config = settings.load(home=str(home))
    preset = home / "long.json"
    preset.write_text(
        json.dumps(
            {
                "model_path": "tiny",
                "infer_steps": 4,
                "denoising_step_list": [1000, 750, 500, 250],
                "target_video_length": 49,
                "target_width": 160,
                "target_height": 160,
                "fps": 16,
            }
        )
    )
    farm = Farm(
        home=home,
        process=process,
        config=config,
        db=database.Database(config.database_url.get_secret_value()),
        long_preset=preset,
    )
    until(lambda: _live_workers(farm), seconds=START_SECONDS)
    return farm


def stop_farm(farm: Farm, *, seconds: float = 90.0) -> int:
    farm.db.close()
    farm.redis.close()
    farm.process.send_signal(signal.SIGTERM)
    try:
        return farm.process.wait(seconds)
    except subprocess.TimeoutExpired:
        farm.process.kill()
        raise


def _live_workers(farm: Farm) -> list[str]:
    try:
        with farm.db.reading() as session:
            return [w.worker.name for w in queries.live_workers(session) if w.is_alive]
    except Exception:  # the tables are being made
        return []


@pytest.fixture(scope="module")
def farm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Farm]:
    """Two CPU workers; shared by the tests of a module, which leave it as they found it."""
    started = start_farm(tmp_path_factory.mktemp("farm") / "home")
    yield started
    status = stop_farm(started)
    assert status == 0, (started.home / "up.log").read_text()[-3000:]
