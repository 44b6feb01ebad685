"""One host of a farm inside the test: a real database, Redis and model, but no Celery."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs import (
    broker,
    database,
    lifecycle,
    looks,
    migrate,
    presets,
    queries,
    reports,
    settings,
    storage,
    store_mark,
    stores,
    submission,
    workers,
)
from jobs.schema import Attempt, Job
from models.tiny import make
from tests.registrations import registration
from worker import components, device, publisher, rendering, resident, runner, scratch
from worker.settings import WorkerSettings

WORKER = "cpu0@here"


@dataclass(frozen=True)
class Prepared:
    """Stands in for `components.Components`: hands out a model that a test has prepared."""

    model: resident.ResidentModel
    hashes: Callable[[], dict[str, str]] = dict

    def report(self, *, renders: int) -> reports.Report:
        return reports.Report(
            renders=renders,
            loads=0,
            lora_switches=0,
            resident=(),
            device_used_bytes=None,
            host_used_bytes=0,
        )

    def model_for(self, _look: looks.Look) -> resident.ResidentModel:
        return self.model

    def step_down(self, _look: looks.Look) -> None:
        return None

    def hashing(self, model: resident.ResidentModel) -> Any:
        return model.hashes

    def weight_hashes(self, hashing: Any) -> dict[str, str] | None:
        return self.hashes() if hashing.done() else None

    def lora_hashes(self, _look: looks.Look, _model: object) -> dict[str, str]:
        return {}


class ToTheEnd(runner.Runner):
    """Returns when nothing is left to do, where the real one lets the next job begin."""

    def run_attempt(self, job_id: int) -> None:
        super().run_attempt(job_id)
        self.tail.wait()


@dataclass
class Host:
    """What the processes of a host share, and what a test asks of them."""

    config: settings.Settings
    worker_settings: WorkerSettings
    db: database.Database
    bell: broker.Broker
    warm: components.Components
    preset: Path

    def submit(self, number: int = 1, **changes: Any) -> list[Job]:
        preset = self.preset
        if changes:
            preset = preset.with_name("changed.json")
            preset.write_text(json.dumps(json.loads(self.preset.read_text()) | changes))
        rows = "".join(json.dumps({"prompt": f"clip {i}", "seed": i}) + "\n" for i in range(number))
        prompts = submission.PromptFile(
            stream=io.BytesIO(rows.encode()),
            source="test",
            format="jsonl",
            options=submission.Options(preset=presets.load(str(preset))),
        )
        batch_id = submission.submit(self.db, prompts).batch_id
        with self.db.reading() as session:
            return list(queries.jobs(session, batch_id, limit=1_000))

    def register(self, *, queues: tuple[str, ...] = ("rushes.render.tiny",)) -> None:
        row = registration(WORKER, device="CPU", queues=queues)
        self.db.write(workers.register, row)

    def job(self, job_id: int) -> Job:
        with self.db.reading() as session:
            return session.get_one(Job, job_id)

    def attempts(self, job_id: int) -> list[Attempt]:
        with self.db.reading() as session:
            return list(queries.attempts(session, job_id))

    def claim(self, job: Job, *, lease_seconds: float = 60.0) -> lifecycle.Claim:
        claim = self.db.write(lifecycle.claim, job.id, worker=WORKER, lease_seconds=lease_seconds)
        assert claim is not None
        return claim

    def folder(self, claim: lifecycle.Claim) -> scratch.AttemptFolder:
        return scratch.AttemptFolder(
            root=self.config.scratch_dir, batch_id=claim.batch_id, attempt_id=claim.attempt_id
        )

    def runner(self, networks: Any = None, **changes: Any) -> runner.Runner:
        """With the warm networks, or with a stand-in for them."""
        made = ToTheEnd(
            config=self.config,
            worker_settings=self.worker_settings,
            db=self.db,
            bell=self.bell,
            renderer=rendering.Renderer(
                worker_settings=self.worker_settings,
                device=self.warm.device,
                components=networks or self.warm,
                read_image=functools.partial(
                    rendering.read_stored,
                    functools.partial(stores.open_store, changes.get("config", self.config)),
                ),
            ),
        )
        return dataclasses.replace(made, **changes)

    def networks_with(self, **parts: Any) -> Prepared:
        """The warm networks, some of them replaced."""
        return Prepared(with_parts(self.warm.model_for(presets.load(str(self.preset)).look), parts))

    def publisher(self, store: storage.ObjectStore | None = None) -> publisher.Publisher:
        store = store or stores.open_store(self.config)
        return publisher.Publisher(
            config=self.config,
            db=self.db,
            bell=self.bell,
            store=store,
            guard=store_mark.Guard(self.db, store),
        )

    def finished(self, job: Job | None = None) -> scratch.AttemptFolder:
        """A claimed job's folder with a finished video in it, as the runner leaves it."""
        claim = self.claim(job or self.submit()[0])
        folder = self.folder(claim)
        folder.make()
        folder.video.write_bytes(b"video" * 1_000)
        folder.finish(
            {
                "batch_id": claim.batch_id,
                "job_id": claim.job_id,
                "video": {"sha256": hashlib.sha256(folder.video.read_bytes()).hexdigest()},
                "seconds": {"denoise": 1.0},
                "peak_memory_bytes": None,
            }
        )
        return folder

    def attempt(self, folder: scratch.AttemptFolder) -> Attempt:
        with self.db.reading() as session:
            return session.get_one(Attempt, folder.attempt_id)

    def job_of(self, folder: scratch.AttemptFolder) -> Job:
        return self.job(self.attempt(folder).job_id)

    def waiting_publishes(self) -> list[int]:
        """With repetitions."""
        queue = broker.publish_queue(self.config.host_name)
        found = self.bell.redis.lrange(queue, 0, -1)
        return [int(json.loads(message)["headers"]["id"].partition(":")[0]) for message in found]

    @contextlib.contextmanager
    def database_outage(self) -> Iterator[None]:
        """Every new connection is refused."""
        self.break_database()
        try:
            yield
        finally:
            self.mend_database()

    def break_database(self) -> None:
        """At once, and so is the mending: who connects in between would make an empty database."""
        path = self.config.home / "rushes.db"
        self.db.close()
        os.link(path, path.with_suffix(".away"))
        folder = path.with_suffix(".folder")
        folder.symlink_to(self.config.home)
        folder.replace(path)

    def mend_database(self) -> None:
        path = self.config.home / "rushes.db"
        path.with_suffix(".away").replace(path)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    make.make(folder / "tiny")
    return folder


@pytest.fixture(scope="session")
def warm(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> components.Components:
    cpu = device.Device(torch_device=torch.device("cpu"), dtype=torch.float32, name="CPU test")
    return components.Components(
        models_dir=models_dir, home=tmp_path_factory.mktemp("warm"), device=cpu
    )


@pytest.fixture
def host(
    tmp_path: Path,
    models_dir: Path,
    warm: components.Components,
    clean_redis_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Host]:
    for name, value in {
        "RUSHES_X264_PRESET": "ultrafast",
        "RUSHES_WORKER_NAME": WORKER,
        "RUSHES_HEARTBEAT_SECONDS": "0.05",
        "RUSHES_HOST": "here",
        "RUSHES_MODELS_DIR": str(models_dir),
        "CELERY_BROKER_URL": clean_redis_url,
        "RUSHES_RETRY_SECONDS": "0",
        "RUSHES_RESULTS_URL": (tmp_path / "home" / "results").as_uri(),
    }.items():
        monkeypatch.setenv(name, value)
    config = settings.load()
    preset = tmp_path / "small.json"
    preset.write_text(
        json.dumps(
            {
                "model_path": "tiny",
                "denoising_step_list": [1000, 500],
                "step_rule": "euler",
                "sample_shift": 5,
                "target_width": 16,
                "target_height": 16,
                "target_video_length": 9,
                "fps": 8,
            }
        )
    )
    db = database.connect(config)
    migrate.upgrade(db)
    yield Host(
        config=config,
        worker_settings=WorkerSettings(),
        db=db,
        bell=broker.Broker(config),
        warm=warm,
        preset=preset,
    )
    db.close()


def with_parts(model: resident.ResidentModel, parts: dict[str, Any]) -> resident.ResidentModel:
    return resident.ResidentModel(
        model.key,
        files=model.files,
        networks=dataclasses.replace(model.networks, **parts),
        device=model.device,
        hashes=model.hashes,
    )
