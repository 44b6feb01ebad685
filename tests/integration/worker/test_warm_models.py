"""A queue of two alternating models on one worker that has room for one: few switches."""

import json
import shutil

import pytest

from jobs import dispatch, presets, queues, states
from jobs.schema import Worker
from tests.integration.worker.conftest import WORKER
from worker import components, room, wanted

JOBS = 24
MODELS = ("tiny", "other")


@pytest.fixture
def models(models_dir, tmp_path):
    folder = tmp_path / "models"
    for name in MODELS:
        shutil.copytree(models_dir / "tiny", folder / name)
    return folder


@pytest.fixture
def runner(host, models):
    """With main memory for one of the two models."""
    look = presets.load(str(host.preset)).look
    need = wanted.needed(look, wanted.find(look, models), wanted.mode_of(look))
    warm = components.Components(
        models_dir=models,
        home=host.config.home,
        device=host.warm.device,
        host_bytes=room.share_of(need, host.warm.device).host_peak,
    )
    return host.runner(warm)


@pytest.fixture
def next_job(host):
    """The job of the next message that this worker's Celery would take, or None."""
    names = [queues.of_model(model) for model in MODELS]

    def take():
        for _ in names:
            names.append(names.pop(0))  # Celery goes round its queues
            message = host.bell.redis.rpop(names[-1])
            if message is not None:
                return int(json.loads(message)["headers"]["id"].partition(":")[0])
        return None

    return take


def test_two_alternating_models_are_loaded_far_less_often_than_there_are_jobs(
    host, runner, next_job, capsys
):
    """Through the real dispatcher and renders; the counts are those that `rushes workers` shows."""
    jobs = [host.submit(1, model_path=MODELS[number % 2])[0] for number in range(JOBS)]
    taken = tuple(queues.of_model(model) for model in MODELS)
    dispatcher = dispatch.Dispatcher(host.config, db=host.db)
    rendered = 0
    while rendered < JOBS:
        host.register(queues=taken)  # as its launcher does
        dispatcher.tick()
        job_id = next_job()
        assert job_id is not None, f"nothing was sent after {rendered} jobs"
        runner.run_attempt(job_id)
        rendered += 1
    with host.db.reading() as session:
        row = session.get_one(Worker, WORKER)
    with capsys.disabled():
        print(f"\n{row.renders} jobs of two alternating models: {row.loads} loads")  # noqa: T201
    assert row.renders == JOBS
    assert row.loads <= JOBS // 5
    assert all(host.attempts(job.id)[0].state is states.AttemptState.RENDERED for job in jobs)
