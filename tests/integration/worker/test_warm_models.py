"""Queues that alternate, on one worker: few loads of models, few switches of LoRAs."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from jobs import dispatch, presets, queues, states, workers
from jobs.schema import Worker
from models import layout
from tests.integration.worker.conftest import WORKER
from worker import components, room, scratch, wanted

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
    need = wanted.needed(look, wanted.find(look, models), wanted.mode_of(look), models)
    warm = components.Components(
        models_dir=models,
        home=host.config.home,
        device=host.warm.device,
        host_bytes=room.share_of(need, host.warm.device).host_peak,
    )
    return host.runner(warm)


@pytest.fixture
def render_all(host):
    """`render_all(runner, jobs, models=...)`: through the real dispatcher; the worker's row."""

    def render(runner, jobs, *, models):
        taken = [queues.of_model(model) for model in models]
        dispatcher = dispatch.Dispatcher(host.config, db=host.db)
        take = taker(host, taken)
        for number in range(len(jobs)):
            host.register(queues=tuple(taken))  # as its launcher does
            dispatcher.tick()
            job_id = take()
            assert job_id is not None, f"nothing was sent after {number} jobs"
            runner.run_attempt(job_id)
        assert all(host.attempts(job.id)[0].state is states.AttemptState.RENDERED for job in jobs)
        with host.db.reading() as session:
            return session.get_one(Worker, WORKER)

    return render


def taker(host, names):
    """Gives the job of the next message that this worker's Celery would take, or None."""
    names = list(names)

    def take():
        for _ in names:
            names.append(names.pop(0))  # Celery goes round its queues
            message = host.bell.redis.rpop(names[-1])
            if message is not None:
                return int(json.loads(message)["headers"]["id"].partition(":")[0])
        return None

    return take


def test_two_alternating_models_are_loaded_far_less_often_than_there_are_jobs(
    host, runner, render_all, capsys
):
    """The counts are those that `rushes workers` shows."""
    jobs = [host.submit(1, model_path=MODELS[number % 2])[0] for number in range(JOBS)]
    row = render_all(runner, jobs, models=MODELS)
    with capsys.disabled():
        print(f"\n{row.renders} jobs of two alternating models: {row.loads} loads")  # noqa: T201
    assert row.renders == JOBS
    assert row.loads <= JOBS // 5


@pytest.mark.parametrize(
    ("part", "tensor"), [("transformer", "blocks.0.ffn.0.weight"), ("vae", "decoder.conv1.bias")]
)
def test_weights_that_are_not_finite_are_told_by_name_and_cost_their_jobs_nothing(
    host, runner, models, part, tensor
):
    """No machine is suspected, and mended files are loaded anew."""
    path = getattr(layout.find(models / "tiny"), part)[0]
    good = path.read_bytes()
    damage(path, tensor)
    host.register()
    job = host.submit()[0]
    runner.run_attempt(job.id)
    (attempt,) = host.attempts(job.id)
    assert attempt.state is states.AttemptState.RELEASED
    told = f"{path}: cannot be read as weights: {tensor} holds NaN or infinity in torch.float32"
    assert told in attempt.note
    assert host.job(job.id).error_count == 0
    path.write_bytes(good)
    host.db.write(workers.accept, WORKER, queue=queues.of_model("tiny"))
    again = host.submit()[0]
    runner.run_attempt(again.id)
    assert host.attempts(again.id)[0].state is states.AttemptState.RENDERED


def damage(path, tensor):
    """One NaN in one tensor."""
    if path.suffix == ".safetensors":
        tensors = safetensors.torch.load_file(path)
        tensors[tensor].view(-1)[0] = float("nan")
        safetensors.torch.save_file(tensors, path)
    else:
        tensors = torch.load(path)
        tensors[tensor].view(-1)[0] = float("nan")
        torch.save(tensors, path)


LORA = "tiny/loras/distill_lora.safetensors"
LORA_CHANGES = (
    {"dit_original_ckpt": "tiny/diffusion_pytorch_model.safetensors", "lora_configs": loras}
    for loras in ([], [{"path": LORA}], [{"path": LORA, "strength": -0.7}])
)


def test_alternating_loras_are_switched_far_less_often_than_there_are_jobs_and_leave_no_trace(
    host, models, render_all, capsys
):
    """Of one model that is loaded once; each video has the bits of a queue of its kind alone."""
    kinds = [dict(changes) for changes in LORA_CHANGES]

    def worker():
        return components.Components(
            models_dir=models, home=host.config.home, device=host.warm.device
        )

    alone = [host.submit(1, **changes)[0] for changes in kinds]
    for job in alone:
        render_all(host.runner(worker()), [job], models=["tiny"])
    jobs = [host.submit(1, **kinds[number % 3])[0] for number in range(JOBS)]
    row = render_all(host.runner(worker()), jobs, models=["tiny"])
    with capsys.disabled():
        told = f"\n{row.renders} jobs of three alternating LoRAs: {row.lora_switches} switches"
        print(told)  # noqa: T201
    assert (row.renders, row.loads) == (JOBS, 1)
    assert 2 <= row.lora_switches <= JOBS // 4
    hashes = [latents_of(host, job) for job in alone]
    assert len(set(hashes)) == 3
    assert [latents_of(host, job) for job in jobs] == [hashes[n % 3] for n in range(JOBS)]


def latents_of(host, job):
    attempt = host.attempts(job.id)[0]
    folder = scratch.AttemptFolder(
        root=host.config.scratch_dir, batch_id=job.batch_id, attempt_id=attempt.id
    )
    return json.loads(folder.sidecar.read_bytes())["latents_sha256"]
