"""One attempt: how each way it may end is written down, and what it leaves on the disk."""

import errno
import hashlib
import io
import json
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta

import pytest
import safetensors.torch
import torch
from PIL import Image
from sqlalchemy import select, update
from sqlalchemy.exc import IntegrityError, OperationalError

from jobs import (
    attempt_ids,
    broker,
    database,
    lifecycle,
    orders,
    presets,
    retries,
    settings,
    states,
    stores,
    uploads,
    workers,
)
from jobs.schema import Job, Refusal, Worker
from models import config, vae
from tests.integration.worker.conftest import WORKER
from tests.waiting import until
from worker import (
    components,
    device,
    errors,
    finished,
    heartbeat,
    provenance,
    resident,
    runner,
    scratch,
    video,
    wanted,
)


class Raising(torch.nn.Module):
    """A network that fails."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def encode(self, _prompt):
        raise self.error


class Doing(torch.nn.Module):
    """A text encoder that does something first."""

    def __init__(self, encoder, action):
        super().__init__()
        self.encoder, self.action = encoder, action

    def encode(self, prompt):
        self.action()
        return self.encoder.encode(prompt)


@pytest.fixture
def first_doing(host):
    """`first_doing(action)`: networks that do it before they encode."""

    def make(action):
        real = host.networks_with().model.networks.text_encoder
        return host.networks_with(text_encoder=Doing(real, action))

    return make


@pytest.fixture
def failure_of(host):
    """Renders one job and returns it with its only attempt, which failed."""

    def run(networks=None, *, job=None, **changes):
        job = job or host.submit()[0]
        host.runner(networks, **changes).run_attempt(job.id)
        (attempt,) = host.attempts(job.id)
        return host.job(job.id), attempt

    return run


def leftovers(host):
    return scratch.folders(host.config.scratch_dir)


def test_a_rendered_job_is_a_finished_folder_and_a_message_to_the_publisher(host):
    job = host.submit()[0]
    host.runner().run_attempt(job.id)
    (attempt,) = host.attempts(job.id)
    assert attempt.state is states.AttemptState.RENDERED
    (folder,) = leftovers(host)
    assert (folder.attempt_id, folder.is_finished) == (attempt.id, True)
    assert host.waiting_publishes() == [attempt.id]
    info = video.probe(folder.video)
    assert (info.width, info.height, info.num_frames, info.fps) == (16, 16, 9, 8.0)


def test_the_end_of_an_attempt_wakes_the_dispatcher(host):
    """Else a device whose window is empty waits for the next tick."""
    host.runner().run_attempt(host.submit(model_path="gone")[0].id)
    assert host.bell.wait_for_kick(0.1)


def test_the_sidecar_tells_everything_that_made_the_video(host):
    job = host.submit()[0]
    host.runner().run_attempt(job.id)
    (folder,) = leftovers(host)
    told = json.loads(folder.sidecar.read_text())
    assert told["prompt"] == job.prompt
    assert told["seed"] == job.seed
    assert told["video"]["sha256"] == scratch.sha256(folder.video)
    assert told["video"]["bytes"] == folder.video.stat().st_size
    look = presets.load(str(host.preset)).look
    assert told["weights_sha256"] == host.warm.weight_hashes(host.warm.model_for(look).hashes)
    assert len(told["latents_sha256"]) == 64
    assert (told["encoder"], told["loras_sha256"]) == ("libx264", {})
    assert set(told["seconds"]) == {"load", "text", "denoise", "decode", "mux"}
    spans = [datetime.fromisoformat(told[f"device_{end}_at"]) for end in ("began", "ended")]
    on_device = sum(told["seconds"][stage] for stage in ("text", "denoise", "decode"))
    assert (spans[1] - spans[0]).total_seconds() >= on_device - 0.001  # rounding
    look = {"model_path", "width", "height", "num_frames", "fps", "step_rule", "sample_shift"}
    ours = {"batch_id", "job_id", "attempt_id", "attempt", "custom_id", "metadata"}
    machine = {"rushes", "torch", "device", "dtype", "worker", "peak_memory_bytes"}
    assert look | ours | machine | {"denoising_step_list", "negative_prompt"} <= set(told)


def test_the_sidecar_names_loras_by_their_content(host):
    path = "tiny/loras/distill_lora.safetensors"
    base = "tiny/diffusion_pytorch_model.safetensors"
    job = host.submit(dit_original_ckpt=base, lora_configs=[{"path": path}])[0]
    host.runner().run_attempt(job.id)
    (folder,) = leftovers(host)
    told = json.loads(folder.sidecar.read_text())
    assert told["loras_sha256"] == {path: scratch.sha256(host.config.models_dir / path)}


def test_each_video_has_a_peak_of_its_own(host, monkeypatch):
    """Memory of the job before it is not charged to it."""
    taken = []
    monkeypatch.setattr(device.Device, "reset_peak_memory", lambda _self: taken.clear())
    monkeypatch.setattr(device.Device, "synchronize", lambda _self: taken.append(1))
    monkeypatch.setattr(device.Device, "peak_memory_bytes", lambda _self: len(taken))
    for job in host.submit(2):
        host.runner().run_attempt(job.id)
    first, second = (folder.facts().peak_memory_bytes for folder in leftovers(host))
    assert first == second > 0


def test_a_video_with_a_frame_too_few_is_not_handed_over(host, failure_of, monkeypatch):
    write = video.Mp4Writer.write
    monkeypatch.setattr(video.Mp4Writer, "write", lambda self, frames: write(self, frames[:3]))
    _, attempt = failure_of()
    assert attempt.failure_kind is states.FailureKind.ENCODING
    assert "num_frames=9" in attempt.error
    assert "num_frames=7" in attempt.error


def test_a_doubled_message_renders_nothing(host):
    job = host.submit()[0]
    for _ in range(3):
        host.runner().run_attempt(job.id)
    assert len(host.attempts(job.id)) == 1
    assert len(host.waiting_publishes()) == 1


def test_a_claim_that_was_never_heard_of_is_given_back_at_once(host):
    """The connection broke after the commit: the claim tried again finds the job taken."""
    job = host.submit()[0]
    host.claim(job)
    host.runner().run_attempt(job.id)
    assert (host.job(job.id).state, host.job(job.id).crash_count) == (states.JobState.QUEUED, 0)
    host.runner().run_attempt(job.id)
    assert [attempt.state.value for attempt in host.attempts(job.id)] == ["released", "rendered"]


def test_a_refused_claim_gives_nothing_of_another_worker_back(host):
    job = host.submit()[0]
    claim = host.db.write(lifecycle.claim, job.id, worker="cpu1@here", lease_seconds=60.0)
    host.runner().run_attempt(job.id)
    assert host.job(job.id).attempt_id == claim.attempt_id


def test_a_message_for_a_job_that_is_gone_renders_nothing(host):
    host.runner().run_attempt(4711)
    assert leftovers(host) == []


def refused(host):
    with host.db.reading() as session:
        return {held.queue: held for held in workers.refusals(session, worker=WORKER)}


def assert_given_back(host, job):
    """At no cost, and not to be tried again at once."""
    (attempt,) = host.attempts(job.id)
    job = host.job(job.id)
    assert attempt.state is states.AttemptState.RELEASED
    assert (job.state, job.error_count, job.crash_count) == (states.JobState.QUEUED, 0, 0)
    assert job.not_before > attempt.finished_at
    assert leftovers(host) == []
    return attempt


def test_a_host_without_the_model_gives_the_job_back_and_takes_no_more_of_it(host):
    first, second = host.submit(2, model_path="gone")
    host.runner().run_attempt(first.id)
    assert "gone: expected a model folder" in assert_given_back(host, first).note
    (held,) = refused(host).values()
    assert (held.queue, held.kind) == (first.queue, states.FailureKind.WEIGHTS)
    assert "gone: expected a model folder" in held.reason
    host.runner().run_attempt(second.id)
    assert host.attempts(second.id) == []  # a whole batch of them costs nothing
    other = host.submit()[0]
    host.runner().run_attempt(other.id)
    assert host.attempts(other.id)[0].state is states.AttemptState.RENDERED


def test_two_refusals_in_one_moment_cost_no_job_an_attempt(host, monkeypatch):
    """PostgreSQL lets both find no row, and one of them write it."""

    def second(*_, **__):
        raise IntegrityError("insert", {}, Exception("duplicate key"))

    monkeypatch.setattr(workers, "refuse", second)
    job = host.submit(model_path="gone")[0]
    host.runner().run_attempt(job.id)
    assert_given_back(host, job)


def over(host):
    """As if the time of every refusal were over."""
    with host.db.transaction() as session:
        past = database.now(session) - timedelta(seconds=1)
        session.execute(update(Refusal).values(until=past))
        session.execute(update(Job).values(not_before=None))


def test_a_host_refuses_for_longer_each_time_until_a_job_goes_well(host, models_dir, tmp_path):
    job = host.submit(model_path=str(tmp_path / "moved"))[0]
    waits = []
    for times in (1, 2, 3):
        host.runner().run_attempt(job.id)
        held = refused(host)[job.queue]
        assert held.times == times
        waits.append((held.until - host.attempts(job.id)[-1].finished_at).total_seconds())
        over(host)
    for times, wait in enumerate(waits):
        longest = workers.FIRST_REFUSAL_SECONDS * 2**times
        assert longest / 2 - 1 < wait <= longest + 1
    (tmp_path / "moved").symlink_to(models_dir / "tiny")
    host.runner().run_attempt(job.id)
    assert host.attempts(job.id)[-1].state is states.AttemptState.RENDERED
    with host.db.reading() as session:
        assert session.scalars(select(Refusal)).all() == []
    assert host.job(job.id).error_count == 0


def test_a_lora_that_is_not_here_costs_its_own_job_alone(host, failure_of):
    """It may be nowhere: such jobs must end, and take no worker away from others."""
    job, attempt = failure_of(job=host.submit(lora_configs=[{"path": "nowhere.safetensors"}])[0])
    assert attempt.failure_kind is states.FailureKind.WEIGHTS
    assert "nowhere.safetensors" in attempt.error
    assert (job.state, job.error_count) == (states.JobState.QUEUED, 1)
    assert refused(host) == {}


def test_too_little_memory_is_named(host, failure_of):
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB\nmore")
    _, attempt = failure_of(host.networks_with(text_encoder=Raising(error)))
    assert attempt.failure_kind is states.FailureKind.OUT_OF_MEMORY
    assert attempt.error == (
        "CPU test: CUDA out of memory. Tried to allocate 20.00 GiB; there is no smaller memory mode"
    )


@pytest.mark.parametrize(
    ("asked", "mode", "lower"),
    [
        ({}, "resident", "model offload"),
        ({"cpu_offload": True, "offload_granularity": "model"}, "model offload", "block offload"),
        (
            {"cpu_offload": True, "offload_granularity": "block"},
            "block offload",
            "block offload, VAE in tiles",
        ),
    ],
)
def test_too_little_memory_steps_down_once_and_goes_on(host, monkeypatch, asked, mode, lower):
    """The same attempt renders with less on the device, says so, and others profit."""
    first, second = host.submit(2, **asked)
    host.runner().run_attempt(first.id)
    real, modes, held = resident.ResidentModel.encode_text, [], []

    def short_of_memory(model, prompt):
        modes.append(wanted.told(model.key.mode))
        if len(modes) == 1:
            of_the_first_try = torch.zeros(1)
            held.append(weakref.ref(of_the_first_try))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        assert held[0]() is None, "else the second try has less memory than the first"
        return real(model, prompt)

    monkeypatch.setattr(resident.ResidentModel, "encode_text", short_of_memory)
    host.runner().run_attempt(second.id)
    (attempt,) = host.attempts(second.id)
    assert attempt.state is states.AttemptState.RENDERED
    assert modes == [mode, lower]
    assert attempt.memory.startswith(f"{lower}; before: CPU test: CUDA out of memory")
    before, after = (json.loads(folder.sidecar.read_text()) for folder in leftovers(host))
    assert (before["memory"], after["memory"]) == (mode, lower)
    host.runner().run_attempt(host.submit(**asked)[0].id)
    assert modes[2:] == [lower]  # the next job of this look does not try in vain


def test_a_host_whose_encoder_is_broken_gives_the_job_back(host, monkeypatch):
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", "/bin/false")
    job = host.submit()[0]
    host.runner().run_attempt(job.id)
    assert "ffmpeg ended with 1" in assert_given_back(host, job).note
    assert refused(host)[workers.ALL_QUEUES].kind is states.FailureKind.ENCODING


def test_a_lora_that_cannot_fit_fails_its_job_at_once_and_one_that_cannot_be_read_does_not(
    host, failure_of, tmp_path
):
    """The first is the same everywhere; of the second another host may have a good copy."""
    path = tmp_path / "style.safetensors"
    pair = {f"lora_te_fc1.lora_{half}.weight": torch.zeros(2, 2) for half in ("down", "up")}
    safetensors.torch.save_file(pair, path)
    asked = {"lora_path": str(path)}
    job, attempt = failure_of(job=host.submit(**asked)[0])
    assert (job.state, job.failure_kind) == (states.JobState.FAILED, states.FailureKind.INPUT)
    assert f"{path}: 0 keys match the network; 2 keys do not (lora_te_fc1" in attempt.error
    path.write_bytes(path.read_bytes()[:-1])
    job, attempt = failure_of(job=host.submit(**asked)[0])
    assert (job.state, attempt.failure_kind) == (states.JobState.QUEUED, states.FailureKind.WEIGHTS)
    assert f"{path}: cannot be read as weights" in attempt.error


def test_a_disk_that_fills_up_gives_the_job_back(host, monkeypatch):
    monkeypatch.setattr(attempt_ids, "new", lambda _now: 17)
    job = host.submit()[0]
    full = host.config.scratch_dir / f"{job.batch_id}.17"
    full.mkdir(parents=True)
    (full / "video.mp4").symlink_to("/dev/full")
    host.runner().run_attempt(job.id)
    attempt = assert_given_back(host, job)
    assert attempt.id == 17
    assert "No space left on device" in attempt.note
    assert refused(host)[workers.ALL_QUEUES].kind is states.FailureKind.DISK


def test_a_disk_that_is_full_when_the_video_is_marked_gives_the_job_back(host, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(provenance, "mark", full)
    job = host.submit()[0]
    host.runner().run_attempt(job.id)
    assert "No space left" in assert_given_back(host, job).note


def test_a_host_without_room_takes_no_job(host, monkeypatch):
    """Its disk is full, the job is innocent: it stays queued for another host, untouched."""
    job = host.submit()[0]
    monkeypatch.setattr(workers, "MIN_FREE_BYTES", 1 << 60)
    host.runner().run_attempt(job.id)
    assert host.attempts(job.id) == []
    assert host.job(job.id).state is states.JobState.QUEUED
    assert "too little for a video" in refused(host)[workers.ALL_QUEUES].reason


def test_a_host_whose_disk_cannot_be_asked_takes_no_job(host, monkeypatch):
    def broken(_):
        raise OSError(5, "Input/output error")

    job = host.submit()[0]
    monkeypatch.setattr(scratch, "free_bytes", broken)
    host.runner().run_attempt(job.id)
    assert host.attempts(job.id) == []
    assert "Input/output error" in refused(host)[workers.ALL_QUEUES].reason


def test_a_scratch_folder_that_cannot_be_made_is_named(host, monkeypatch):
    monkeypatch.setenv("RUSHES_SCRATCH_DIR", "/proc/rushes")
    job = host.submit()[0]
    host.runner(config=settings.load()).run_attempt(job.id)
    (attempt,) = host.attempts(job.id)
    assert attempt.state is states.AttemptState.RELEASED
    assert "/proc/rushes" in attempt.note


@pytest.fixture
def with_image(host):
    """`with_image(key)`: a job whose first frame lies under this key of the store."""

    def make(key):
        job = host.submit()[0]
        with host.db.transaction() as session:
            session.execute(update(Job).where(Job.id == job.id).values(image_key=key))
        return job

    return make


def test_an_image_that_the_store_has_no_more_ends_its_job(host, failure_of, with_image):
    stores.open_store(host.config).put_bytes(b"x", "inputs/other", content_type="image/png")
    job, attempt = failure_of(job=with_image("inputs/aa/gone"))
    assert attempt.failure_kind is states.FailureKind.INPUT
    assert "no such object; submit it again, then retry" in attempt.error
    assert job.state is states.JobState.FAILED
    assert refused(host) == {}


def test_an_image_that_is_damaged_in_the_store_ends_its_job(host, failure_of, with_image):
    key = uploads.shared_key(hashlib.sha256(b"x").hexdigest())
    stores.open_store(host.config).put_bytes(b"x", key, content_type="image/png")
    job, attempt = failure_of(job=with_image(key))
    assert attempt.failure_kind is states.FailureKind.INPUT
    assert f"{key} in the results store: image" in attempt.error
    assert "submit it again, then retry" in attempt.error
    assert job.state is states.JobState.FAILED


def test_another_image_in_the_store_is_not_rendered(host, failure_of, with_image):
    """Whatever wrote it over the one that was submitted, which its key is made of."""
    picture = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(picture, "PNG")
    key = uploads.shared_key(hashlib.sha256(b"the picture of the submit").hexdigest())
    stores.open_store(host.config).put_bytes(picture.getvalue(), key, content_type="image/png")
    job, attempt = failure_of(job=with_image(key))
    assert attempt.failure_kind is states.FailureKind.INPUT
    assert f"{key} in the results store: not the image that was submitted" in attempt.error
    assert job.state is states.JobState.FAILED


def test_an_outage_of_the_store_delays_a_job_with_an_image(host, monkeypatch, with_image):
    monkeypatch.setenv("RUSHES_RESULTS_URL", "s3://videos")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-nobody")
    job = with_image("inputs/aa/there")
    host.runner(config=settings.load()).run_attempt(job.id)
    assert "127.0.0.1:1" in assert_given_back(host, job).note
    assert refused(host)[job.queue].kind is states.FailureKind.STORAGE


def test_a_store_that_holds_nothing_at_all_is_an_outage(host, with_image):
    """Such as a disk that is not mounted: else it would end every job for good."""
    job = with_image("inputs/aa/there")
    host.runner().run_attempt(job.id)
    assert "holds nothing at all" in assert_given_back(host, job).note


def test_a_worker_tells_what_it_holds_and_how_often_that_changed(host):
    host.register()
    warm = components.Components(
        models_dir=host.config.models_dir, home=host.config.home, device=host.warm.device
    )
    made = host.runner(warm)
    for job in host.submit(3):
        made.run_attempt(job.id)
    with host.db.reading() as session:
        row = session.get_one(Worker, WORKER)
    assert (row.renders, row.loads, row.lora_switches) == (3, 1, 0)
    (told,) = row.resident
    assert told["model"] == str(host.config.models_dir / "tiny")
    assert told["memory"] == "resident"
    assert 0 < told["host_bytes"] < row.host_used_bytes


def test_a_spec_that_no_worker_can_render_is_not_tried_again(host, failure_of):
    sizes = config.VAEConfig(
        base_dim=4, num_res_blocks=1, dim_mult=(1,) * 5, temporal_downsample=(True,) * 4
    )
    job, attempt = failure_of(host.networks_with(vae=vae.WanVAE(sizes)))
    assert attempt.failure_kind is states.FailureKind.INPUT
    assert (job.state, job.error) == (
        states.JobState.FAILED,
        "num_frames must be 16n+1 (e.g. 77, 81), got 9",
    )


def test_a_defect_of_ours_is_told_with_its_traceback(host, failure_of):
    job, attempt = failure_of(host.networks_with(text_encoder=Raising(ZeroDivisionError("oh"))))
    assert attempt.failure_kind is states.FailureKind.INTERNAL
    assert attempt.error == "ZeroDivisionError: oh"
    assert "in encode" in attempt.error_detail
    assert "Traceback (most recent call last)" in attempt.error_detail
    assert (job.state, job.error_count) == (states.JobState.QUEUED, 1)


@pytest.mark.parametrize("fault", [ZeroDivisionError(), torch.OutOfMemoryError("CUDA oom")])
def test_a_failure_leaves_no_files_and_a_worker_that_works(host, fault):
    first, second = host.submit(2)
    host.runner(host.networks_with(text_encoder=Raising(fault))).run_attempt(first.id)
    assert leftovers(host) == []
    host.runner().run_attempt(second.id)
    assert host.attempts(second.id)[0].state is states.AttemptState.RENDERED


DEVICE_FAULT = """
import dataclasses, torch
from worker import resident, runner
class Broken(torch.nn.Module):
    def encode(self, prompt):
        {before}
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
made = runner.make()
model_for = made.renderer.components.model_for
def broken(look):
    model = model_for(look)
    networks = dataclasses.replace(model.networks, text_encoder=Broken())
    return resident.ResidentModel(model.key, files=model.files, networks=networks,
                                  device=model.device, hashes=model.hashes)
made.renderer.components.model_for = broken
made.run_attempt({job_id})
print("still here")
"""


def run_device_fault(job, before="pass"):
    script = DEVICE_FAULT.format(job_id=job.id, before=before)
    return subprocess.run(
        [sys.executable, "-c", script], check=False, capture_output=True, text=True
    )


def test_a_broken_device_is_told_and_ends_its_process(host):
    job = host.submit()[0]
    done = run_device_fault(job)
    assert done.returncode == runner.DEVICE_LOST
    assert "still here" not in done.stdout
    (attempt,) = host.attempts(job.id)
    assert attempt.failure_kind is states.FailureKind.DEVICE
    assert "illegal memory access" in attempt.error


def test_a_broken_device_ends_its_process_though_nobody_can_be_told(host):
    """Else the next job, and the next, would fail on it too."""
    job = host.submit()[0]
    path = host.config.home / "rushes.db"
    away = f"made.db.close(); import os; os.rename({str(path)!r}, 'away'); os.mkdir({str(path)!r})"
    host.db.close()
    assert run_device_fault(job, before=away).returncode == runner.DEVICE_LOST


LOST = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")


@pytest.mark.parametrize("fault", [None, ZeroDivisionError("oh")])
def test_a_lost_device_that_tells_nothing_of_its_memory_holds_up_no_job(host, monkeypatch, fault):
    """Neither the job on it nor the end of the one before."""

    def lost(_self):
        raise LOST

    monkeypatch.setattr(device.Device, "used_bytes", lost)
    job = host.submit()[0]
    host.bell.wait_for_kick(0.1)
    made = host.runner()
    if fault is not None:
        broken = host.networks_with(text_encoder=Raising(fault))
        monkeypatch.setattr(type(broken), "report", lambda _self, *, renders: lost(None))
        made = host.runner(broken)
    made.run_attempt(job.id)
    (attempt,) = host.attempts(job.id)
    ended = states.AttemptState.RENDERED if fault is None else states.AttemptState.FAILED
    assert attempt.state is ended
    assert host.bell.wait_for_kick(0.1)


def test_a_device_that_is_lost_when_it_is_to_hold_less_is_lost(host, monkeypatch):
    networks = host.networks_with()

    def lost(_self, _look):
        raise LOST

    monkeypatch.setattr(type(networks), "step_down", lost)
    with pytest.raises(errors.DeviceFault, match="illegal memory access"):
        host.runner(networks).renderer.step_down(presets.load(str(host.preset)).look)


def test_a_job_cancelled_in_mid_render_ends_so_and_leaves_no_files(host, first_doing):
    job = host.submit(target_video_length=33)[0]
    host.runner(first_doing(lambda: host.db.write(orders.cancel_job, job.id))).run_attempt(job.id)
    (attempt,) = host.attempts(job.id)
    assert attempt.state is states.AttemptState.CANCELLED
    assert host.job(job.id).state is states.JobState.CANCELLED
    assert leftovers(host) == []
    assert host.waiting_publishes() == []


def test_a_cancel_among_the_frames_leaves_no_half_video(host):
    """The verdict comes while ffmpeg already writes."""
    job = host.submit(target_video_length=33, target_width=64, target_height=64)[0]
    real = host.networks_with().model.networks.vae
    seen = []

    def cancel_and_be_heard():
        (folder,) = leftovers(host)
        seen.append(until(folder.video.exists))
        host.db.write(orders.cancel_job, job.id)
        told = host.attempts(job.id)[0].heartbeat_at
        until(lambda: host.attempts(job.id)[0].heartbeat_at > told)

    class Slow(torch.nn.Module):
        config = real.config

        def decode_chunks(self, latents):
            for number, chunk in enumerate(real.decode_chunks(latents)):
                yield chunk
                if number == 1:
                    cancel_and_be_heard()

    host.runner(host.networks_with(vae=Slow())).run_attempt(job.id)
    assert seen == [True]
    assert host.attempts(job.id)[0].state is states.AttemptState.CANCELLED
    assert leftovers(host) == []


def test_an_attempt_that_lost_its_job_says_nothing_more(host, first_doing):
    job = host.submit(target_video_length=33)[0]

    def lose():
        host.db.write(
            lifecycle.end_lost_attempts, budgets=retries.budgets(host.config), worker="cpu0@here"
        )

    host.runner(first_doing(lose)).run_attempt(job.id)
    (attempt,) = host.attempts(job.id)
    assert attempt.state is states.AttemptState.LOST
    assert host.job(job.id).state is states.JobState.QUEUED
    assert leftovers(host) == []
    assert host.waiting_publishes() == []


def test_a_database_that_is_down_at_the_end_costs_no_video(host):
    """The folder stays, and the launcher finds it."""
    job = host.submit()[0]
    networks = host.networks_with()

    def hashes():
        host.break_database()
        return {}

    made = host.runner(type(networks)(networks.model, hashes))
    made.run_attempt(job.id)
    (folder,) = leftovers(host)
    assert folder.is_finished
    assert host.waiting_publishes() == []
    host.mend_database()
    made.run_attempt(job.id)  # its message was doubled in the outage: nothing is given back
    assert finished.find_unfinished(host.db, host.bell, host.config) == [folder.attempt_id]
    assert host.waiting_publishes() == [folder.attempt_id]
    assert host.attempt(folder).state is states.AttemptState.RENDERED


def test_a_database_that_goes_at_the_very_end_costs_no_video(host, monkeypatch):
    """It does not know that the video is finished, and holds the attempt for a running one."""
    made, (job,), renew = host.runner(), host.submit(), finished.renew

    def away(*_, **__):
        monkeypatch.setattr(finished, "renew", renew)
        raise OperationalError("UPDATE", {}, Exception("no answer"))

    monkeypatch.setattr(finished, "renew", away)
    made.run_attempt(job.id)
    made.run_attempt(job.id)  # its message was doubled: nothing is given back
    (folder,) = leftovers(host)
    assert finished.find_unfinished(host.db, host.bell, host.config) == [folder.attempt_id]
    assert host.attempt(folder).state is states.AttemptState.RENDERED


def test_a_redis_that_is_down_costs_no_video(host, monkeypatch):
    job = host.submit()[0]
    with monkeypatch.context() as elsewhere:  # Celery itself looks into the environment
        elsewhere.setenv("CELERY_BROKER_URL", "redis://127.0.0.1:1/0")
        host.runner(bell=broker.Broker(settings.load())).run_attempt(job.id)
    (folder,) = leftovers(host)
    assert host.attempt(folder).state is states.AttemptState.RENDERED
    assert finished.find_unfinished(host.db, host.bell, host.config) == [folder.attempt_id]


def test_unknown_hashes_of_weights_cost_no_video(host):
    job = host.submit()[0]
    networks = host.networks_with()
    host.runner(type(networks)(networks.model, lambda: None)).run_attempt(job.id)
    (folder,) = leftovers(host)
    assert json.loads(folder.sidecar.read_text())["weights_sha256"] is None


@pytest.fixture
def tail(monkeypatch):
    """Holds up the end of each video until it is set."""
    may_end, real = threading.Event(), video.check

    def check(*given, **named):
        assert may_end.wait(30)
        return real(*given, **named)

    monkeypatch.setattr(video, "check", check)
    yield may_end
    may_end.set()


def state_of(host, job):
    return host.attempts(job.id)[-1].state


def test_a_job_begins_on_the_device_while_the_one_before_is_finished(host, tail, first_doing):
    first, second = host.submit(2)
    seen = []

    def look():
        seen.append([a.state for job in (first, second) for a in host.attempts(job.id)])
        if len(seen) == 2:
            tail.set()

    made = host.runner(first_doing(look))
    runner.Runner.run_attempt(made, first.id)
    made.run_attempt(second.id)
    assert seen[1] == [states.AttemptState.RUNNING, states.AttemptState.RUNNING]
    ends = (state_of(host, first), state_of(host, second))
    assert ends == (states.AttemptState.RENDERED, states.AttemptState.RENDERED)
    assert [folder.is_finished for folder in leftovers(host)] == [True, True]


def test_a_host_that_cannot_keep_up_holds_up_its_device(host, tail):
    """Else the frames of ever more videos would lie in its memory."""
    first, second = host.submit(2)
    made = host.runner()
    runner.Runner.run_attempt(made, first.id)
    with ThreadPoolExecutor(1) as threads:
        waits = threads.submit(runner.Runner.run_attempt, made, second.id)
        until(lambda: host.attempts(second.id) and host.attempts(second.id)[0].stage == "mux")
        with pytest.raises(TimeoutError):
            waits.result(1)
        tail.set()
        waits.result(30)
    made.tail.wait()
    assert state_of(host, second) is states.AttemptState.RENDERED


def test_a_claim_that_is_refused_leaves_the_tail_alone(host, tail):
    first, taken = host.submit(2)
    host.db.write(lifecycle.claim, taken.id, worker="cpu1@here", lease_seconds=60.0)
    made = host.runner()
    runner.Runner.run_attempt(made, first.id)
    runner.Runner.run_attempt(made, taken.id)
    assert state_of(host, first) is states.AttemptState.RUNNING
    tail.set()
    made.tail.wait()
    assert state_of(host, first) is states.AttemptState.RENDERED
    assert made.tally.held == set()


def test_a_tail_that_fails_costs_its_own_job_and_not_the_next(host, monkeypatch):
    first, second = host.submit(2)
    real = [video.check]

    def check(*given, **named):
        if real[1:]:
            return real[0](*given, **named)
        real.append(None)
        raise errors.EncodingFailed("the file cannot be decoded")

    monkeypatch.setattr(video, "check", check)
    made = host.runner()
    for job in (first, second):
        runner.Runner.run_attempt(made, job.id)
    made.tail.wait()
    (failed,) = host.attempts(first.id)
    assert (failed.state, failed.failure_kind) == (states.AttemptState.FAILED, "encoding")
    assert state_of(host, second) is states.AttemptState.RENDERED


def test_a_cancel_in_the_tail_is_heard(host, tail):
    (job,) = host.submit(1)
    made = host.runner()
    runner.Runner.run_attempt(made, job.id)
    host.db.write(orders.cancel_job, job.id)
    tail.set()
    made.tail.wait()
    assert state_of(host, job) is states.AttemptState.CANCELLED
    assert leftovers(host) == []


def test_a_stall_is_charged_to_the_job_that_stands_still(host, tail, monkeypatch):
    """And not to the one on the device, though that is the newest."""
    first, second = host.submit(2)
    monkeypatch.setattr(heartbeat, "end_process", lambda: ended.append(1))
    ended: list[int] = []
    settings = host.worker_settings.model_copy(update={"stall_seconds": 0.3})
    made = host.runner(worker_settings=settings)
    runner.Runner.run_attempt(made, first.id)
    host.claim(second)
    until(lambda: ended)
    until(lambda: state_of(host, second) is states.AttemptState.RELEASED)
    (stalled,) = host.attempts(first.id)
    assert (stalled.state, stalled.failure_kind) == (states.AttemptState.LOST, "worker_lost")
    assert (host.job(first.id).crash_count, host.job(second.id).crash_count) == (1, 0)


def test_every_error_class_has_its_own_kind_or_is_a_defect():
    kinds = {cls.__name__: cls.kind for cls in errors.RenderError.__subclasses__()}
    assert kinds == {
        "SpecUnusable": states.FailureKind.INPUT,
        "LoraUnfit": states.FailureKind.INPUT,
        "Refused": states.FailureKind.REFUSED,
        "CheckBreaksAgain": states.FailureKind.CHECK,
        "NotFinite": states.FailureKind.INTERNAL,
        "HostFault": states.FailureKind.INTERNAL,
        "WeightsUnusable": states.FailureKind.WEIGHTS,
        "ImageLost": states.FailureKind.INPUT,
        "DeviceOutOfMemory": states.FailureKind.OUT_OF_MEMORY,
        "HostOutOfMemory": states.FailureKind.OUT_OF_MEMORY,
        "DeviceFault": states.FailureKind.DEVICE,
        "EncodingFailed": states.FailureKind.ENCODING,
    }
    faults = {cls.__name__: cls.kind for cls in errors.HostFault.__subclasses__()}
    assert faults == {
        "WeightsAbsent": states.FailureKind.WEIGHTS,
        "StoreUnavailable": states.FailureKind.STORAGE,
        "CheckBroken": states.FailureKind.CHECK,
        "NotSigned": states.FailureKind.ENCODING,
        "EncoderBroken": states.FailureKind.ENCODING,
        "DiskUnusable": states.FailureKind.DISK,
    }
