"""Real processes from the prompt file to the bucket, and what happens when some of them die."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import openai
import psutil
import pytest
import requests
from PIL import Image

from jobs import broker, cancelling, orders, queues, results, settings, states, workers
from tests.waiting import until
from worker import video

pytestmark = pytest.mark.timeout(300)

TINY_QUEUE = queues.of_model("tiny")


def test_twelve_jobs_on_two_workers_all_lie_in_the_bucket(farm, tmp_path):
    """Every video decodes with the size, frame count and rate that its row asked for."""
    asked = [
        {"prompt": f"clip {i}", "seed": i, "size": size, "num_frames": frames, "fps": fps}
        for i, (size, frames, fps) in enumerate(
            [("64x64", 17, 8), ("96x64", 9, 12), ("64x80", 5, 24), ("80x48", 1, 16)] * 3
        )
    ]
    batch_id = farm.submit(asked)
    progress = farm.wait_finished(batch_id)
    assert (progress.state, progress.batch.succeeded) == (states.BatchState.SUCCEEDED, 12)
    workers = set()
    for job, row in zip(farm.jobs(batch_id), asked, strict=True):
        attempt = farm.winner(job)
        workers.add(attempt.worker)
        path = tmp_path / f"{job.id}.mp4"
        farm.store.download(attempt.video_key, path)
        width, height = map(int, row["size"].split("x"))
        assert video.probe(path) == video.VideoInfo(
            width=width,
            height=height,
            num_frames=row["num_frames"],
            fps=float(row["fps"]),
            codec="h264",
            pixel_format="yuv420p",
        )
        assert _index_is_at_the_front(path)
    assert {name.split("@")[0] for name in workers} == {"cpu0", "cpu1"}


def test_a_seed_decides_the_latents_and_the_sidecar_tells_everything(farm):
    """Same seed, same bytes of latents, whichever worker rendered; another seed, other bytes."""
    prompt = "a red circle moves right"
    rows = [{"prompt": prompt, "seed": seed} for seed in (7, 7, 8, 7)]
    batch_id = farm.submit(rows)
    farm.wait_finished(batch_id)
    jobs = farm.jobs(batch_id)
    sidecars = [farm.sidecar(job) for job in jobs]
    first, same, other, again = (sidecar["latents_sha256"] for sidecar in sidecars)
    assert first == same == again
    assert first != other
    told = sidecars[0]
    assert told["prompt"] == prompt
    assert told["seed"] == 7
    assert (told["step_rule"], told["denoising_step_list"]) == ("renoise", [1000, 700, 400, 150])
    assert set(told["seconds"]) == {"load", "text", "denoise", "decode", "mux"}
    assert all(len(digest) == 64 for digest in told["weights_sha256"].values())
    assert len(told["weights_sha256"]) == 8
    assert told["video"]["sha256"] == farm.winner(jobs[0]).video_sha256
    assert {"rushes", "torch", "device", "dtype", "worker"} <= set(told)


def test_result_files_list_every_job_and_links_open_without_keys(farm):
    rows = [{"custom_id": f"clip/{i}", "prompt": f"clip {i}"} for i in range(3)]
    batch_id = farm.submit(rows)
    farm.wait_finished(batch_id)
    lines = farm.store.read_bytes(results.batch_key(batch_id, "output.jsonl")).splitlines()
    entries = [json.loads(line) for line in lines]
    assert [entry["custom_id"] for entry in entries] == ["clip/0", "clip/1", "clip/2"]
    manifest = json.loads(farm.store.read_bytes(results.batch_key(batch_id, "manifest.json")))
    assert manifest["state"] == "succeeded"
    assert manifest["counts"] == {"total": 3, "succeeded": 3, "failed": 0, "cancelled": 0}
    link = farm.store.presign(entries[0]["video"]["key"], seconds=60)
    with urllib.request.urlopen(link) as answer:  # noqa: S310  # our own store
        assert len(answer.read()) == entries[0]["video"]["bytes"]


def test_a_doubled_message_renders_once(farm):
    batch_id = farm.submit([{"prompt": "once"}], preset=farm.long_preset)
    job = farm.jobs(batch_id)[0]
    farm.send_render(job.id, times=10)
    farm.wait_stage(job.id, "denoise", "decode")
    farm.send_render(job.id, times=10)
    farm.wait_finished(batch_id)
    farm.send_render(job.id, times=10)
    _queue_is_empty(farm, TINY_QUEUE)
    assert len(farm.attempts(job.id)) == 1


def test_a_message_for_a_cancelled_job_renders_nothing(farm, tmp_path):
    """Its own queue is served by nobody, so that nothing can start it before the cancel."""
    path = tmp_path / "unserved.json"
    path.write_text(json.dumps(json.loads(farm.long_preset.read_text()) | {"model_path": "gone"}))
    batch_id = farm.submit([{"prompt": "never"}], preset=path)
    job = farm.jobs(batch_id)[0]
    assert farm.db.write(orders.cancel_job, job.id) is states.JobState.CANCELLED
    broker.Broker(farm.config).send_renders(TINY_QUEUE, [job.id] * 3)
    _queue_is_empty(farm, TINY_QUEUE)
    assert farm.attempts(job.id) == []
    assert farm.wait_finished(batch_id).state is states.BatchState.CANCELLED


def test_cancel_stops_a_running_job_at_its_next_step_and_frees_the_device(farm):
    batch_id = farm.submit([{"prompt": f"long {i}"} for i in range(40)], preset=farm.long_preset)

    def at_work() -> int:
        newest = [
            attempts[-1] for job in farm.jobs(batch_id) if (attempts := farm.attempts(job.id))
        ]
        running = [each for each in newest if each.state is states.AttemptState.RUNNING]
        return sum(each.stage in ("denoise", "decode") for each in running)

    # Many more jobs than workers: one of these may have ended some before the other begins.
    until(at_work, lambda number: number == 2, seconds=60.0)
    asked = time.monotonic()
    cancelling.cancel_batch(farm.db, batch_id)
    until(
        lambda: farm.progress(batch_id).state,
        lambda state: state is states.BatchState.CANCELLED,
        seconds=5.0,
    )
    assert time.monotonic() - asked < 5.0
    following = farm.submit([{"prompt": "next"}])
    assert farm.wait_finished(following).state is states.BatchState.SUCCEEDED
    # The publisher tells that a job has succeeded before it clears its folder.
    until(lambda: list((farm.home / "scratch").iterdir()), lambda folders: not folders, seconds=5.0)


@pytest.mark.parametrize("victim", ["child", "parent"])
def test_a_worker_killed_in_mid_render_gives_its_job_back(farm, victim):
    """SIGKILL to the rendering process, or to the process above it: the batch completes."""
    batch_id = farm.submit([{"prompt": f"killed {i}"} for i in range(3)], preset=farm.long_preset)
    job = farm.jobs(batch_id)[0]
    attempt = farm.wait_stage(job.id, "denoise", "decode")
    parent = farm.worker_process(attempt.worker)
    process = _rendering_child(parent) if victim == "child" else parent
    process.kill()
    progress = farm.wait_finished(batch_id)
    assert progress.state is states.BatchState.SUCCEEDED
    first, *others = farm.attempts(job.id)
    assert first.id == attempt.id
    assert first.state is states.AttemptState.LOST
    assert [other.state for other in others] == [states.AttemptState.SUCCEEDED]
    lost_seconds = (first.finished_at - first.heartbeat_at).total_seconds()
    assert lost_seconds < farm.config.lease_seconds + 15


def test_an_emptied_redis_loses_nothing(farm):
    batch_id = farm.submit([{"prompt": f"clip {i}", "seed": i} for i in range(16)])
    for _ in range(4):
        done = farm.progress(batch_id).batch.succeeded
        farm.redis.flushall()
        until(
            lambda: farm.progress(batch_id).batch.succeeded,
            lambda succeeded, done=done: succeeded > done or succeeded == 16,
            seconds=60,
        )
    progress = farm.wait_finished(batch_id)
    assert progress.batch.succeeded == 16
    assert all(len(farm.attempts(job.id)) == 1 for job in farm.jobs(batch_id))


def test_a_model_that_vanished_costs_its_jobs_nothing_and_the_worker_says_why(farm, tmp_path):
    """Its jobs wait, the worker steps aside for that model alone and renders the others."""
    preset = json.loads(farm.long_preset.read_text()) | {"model_path": "tiny/gone"}
    path = tmp_path / "gone.json"
    path.write_text(json.dumps(preset))
    batch_id = farm.submit([{"prompt": "no weights"}], preset=path)
    job = farm.jobs(batch_id)[0]
    bell = broker.Broker(farm.config)
    deadline = time.monotonic() + 60
    while not farm.attempts(job.id):
        assert time.monotonic() < deadline
        bell.send_renders(TINY_QUEUE, [job.id])
        time.sleep(0.5)
    following = farm.submit([{"prompt": "still alive"}])
    assert farm.wait_finished(following).state is states.BatchState.SUCCEEDED
    assert {a.state for a in farm.attempts(job.id)} == {states.AttemptState.RELEASED}
    waiting = farm.jobs(batch_id)[0]
    assert (waiting.state, waiting.error_count, waiting.crash_count) == ("queued", 0, 0)
    with farm.db.reading() as session:
        refusals = workers.refusals(session)
    assert {refusal.queue for refusal in refusals} == {job.queue}
    assert all("tiny/gone" in refusal.reason for refusal in refusals)


def _rendering_child(parent: psutil.Process) -> psutil.Process:
    """Of Celery's children, the one that has torch loaded: by far the largest."""
    return max(parent.children(), key=lambda process: process.memory_info().rss)


def _queue_is_empty(farm, queue: str) -> None:
    until(lambda: not farm.redis.llen(queue))
    time.sleep(1.0)  # the last message may be between Redis and the claim


def _index_is_at_the_front(path: Path) -> bool:
    head = path.read_bytes()
    return head.index(b"moov") < head.index(b"mdat")


def test_stopping_mid_render_gives_the_job_back_at_no_cost(start):
    """SIGTERM without any grace: the attempt is released, and the next start renders it."""
    farm = start(devices="cpu", RUSHES_GRACE_SECONDS="0")
    batch_id = farm.submit([{"prompt": "interrupted"}], preset=farm.long_preset)
    job = farm.jobs(batch_id)[0]
    farm.wait_stage(job.id, "denoise", "decode")
    farm.process.send_signal(signal.SIGTERM)
    assert farm.process.wait(60) == 0
    first = farm.attempts(job.id)[0]
    assert first.state is states.AttemptState.RELEASED
    waiting = farm.jobs(batch_id)[0]
    assert (waiting.state, waiting.error_count, waiting.crash_count) == ("queued", 0, 0)
    again = start(devices="cpu")
    assert again.wait_finished(batch_id).state is states.BatchState.SUCCEEDED
    assert [a.state.value for a in again.attempts(job.id)] == ["released", "succeeded"]


def test_a_store_outage_delays_and_renders_nothing_again(start):
    """The bucket goes while a video is rendered, then the farm ends: the next start uploads."""
    farm = start(devices="cpu")
    batch_id = farm.submit([{"prompt": "patient"}], preset=farm.long_preset)
    job = farm.jobs(batch_id)[0]
    farm.wait_stage(job.id, "denoise", "decode")
    bucket = farm.home / settings.LOCAL_RESULTS
    bucket.rename(bucket.with_name("away"))
    attempt = until(
        lambda: farm.attempts(job.id)[0],
        lambda attempt: (
            attempt.state is states.AttemptState.RENDERED
            and "does not take" in (attempt.note or "")
        ),
        seconds=60,
    )
    farm.process.send_signal(signal.SIGTERM)
    farm.process.wait(90)
    bucket.with_name("away").rename(bucket)
    again = start(devices="cpu")
    assert again.wait_finished(batch_id).state is states.BatchState.SUCCEEDED
    assert [a.id for a in again.attempts(job.id)] == [attempt.id]


def test_all_ways_of_the_family_render(farm, tmp_path):
    """Text or image, complete model or LoRA: four students, four videos."""
    image = tmp_path / "frame.png"
    Image.new("RGB", (90, 60), (200, 30, 30)).save(image)
    text, pictured = {"prompt": "a red circle moves right", "seed": 5}, {"image": str(image)}
    hashes = {}
    for preset, row in [
        ("tiny", text),
        ("tiny_lora", text),
        ("tiny_i2v", text | pictured),
        ("tiny_i2v_lora", text | pictured),
    ]:
        batch_id = farm.submit([row], preset=preset)
        assert farm.wait_finished(batch_id).state is states.BatchState.SUCCEEDED
        (job,) = farm.jobs(batch_id)
        told = farm.sidecar(job)
        hashes[preset] = told["latents_sha256"]
        if "image" in row:
            assert (told["width"], told["height"]) == (48, 32)  # the image's aspect, whole tokens
            assert farm.store.head(told["image_key"]).size_bytes == image.stat().st_size
    assert len(set(hashes.values())) == 4


def test_memory_modes_change_nothing_but_memory(farm, tmp_path):
    row = {"prompt": "a red square", "seed": 5}
    hashes = set()
    for granularity in (None, "model", "block"):
        preset = json.loads(farm.long_preset.read_text()) | {"target_width": 64}
        if granularity:
            preset |= {"cpu_offload": True, "offload_granularity": granularity}
        path = tmp_path / f"{granularity}.json"
        path.write_text(json.dumps(preset))
        batch_id = farm.submit([row], preset=path)
        assert farm.wait_finished(batch_id).state is states.BatchState.SUCCEEDED
        told = farm.sidecar(farm.jobs(batch_id)[0])
        assert told["memory"] == (f"{granularity} offload" if granularity else "resident")
        hashes.add(told["latents_sha256"])
    assert len(hashes) == 1


def test_quantized_weights_are_made_fit_and_render(farm, tmp_path):
    """`rushes quantize`, then a preset that asks for 8-bit weights, then `rushes doctor`."""
    environment = os.environ | {"RUSHES_HOME": str(farm.home)}
    rushes = [sys.executable, "-m", "jobs"]
    for scheme in ("fp8", "int8"):
        made = subprocess.run(
            [*rushes, "quantize", "tiny", "--scheme", scheme, "-o", "json"],
            check=True,
            capture_output=True,
            env=environment,
        )
        assert 0 < json.loads(made.stdout)["relative_error"] < 0.05
        by_scheme = {"dit_quantized": True, "dit_quant_scheme": f"{scheme}-sgl"}
        told_keys = json.loads(made.stdout)["preset"]
        preset = json.loads(farm.long_preset.read_text()) | {"target_width": 64}
        preset |= by_scheme if scheme == "fp8" else told_keys
        path = tmp_path / f"{scheme}.json"
        path.write_text(json.dumps(preset))
        batch_id = farm.submit([{"prompt": "a red square", "seed": 5}], preset=path)
        assert farm.wait_finished(batch_id).state is states.BatchState.SUCCEEDED
        told = farm.sidecar(farm.jobs(batch_id)[0])
        assert f"distill_{scheme}/distill_model.safetensors" in told["weights_sha256"]
        checked = subprocess.run(
            [*rushes, "doctor", "--preset", str(path), "-o", "json"],
            check=True,
            capture_output=True,
            env=environment,
        )
        assert "needs about" in json.loads(checked.stdout)["checks"][0]["seen"]


def test_the_demo_renders_tells_where_and_stops_what_it_started(tmp_path):
    """`rushes demo`, as `make demo` calls it, with nothing but a shell's environment."""
    home = tmp_path / "home"
    kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "demo", "--devices", "cpu"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=kept | {"RUSHES_HOME": str(home)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 of 8 succeeded" in done.stdout
    assert "s3://rushes/batches/" in done.stdout
    assert "X-Amz-Signature=" in done.stdout
    files = [Path(word) for word in done.stdout.split() if word.endswith("video.mp4")]
    assert len(files) == 8
    assert all(video.probe(path).num_frames == 17 for path in files)
    assert not (home / settings.UP_FILE).exists()
    left = [
        p
        for p in psutil.process_iter(["cmdline"])
        if str(home) in " ".join(p.info["cmdline"] or [])
    ]
    assert left == []


@pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
def test_a_video_over_http_is_rendered_and_fetched(farm):
    """As a program that was written for OpenAI's API has it, against what `rushes up` serves."""
    address = next(
        line.split()[1]
        for line in (farm.home / "up.log").read_text().splitlines()
        if line.startswith("web ")
    )
    until(lambda: _answers(f"{address}/healthz"), seconds=60)
    with openai.OpenAI(base_url=f"{address}/v1", api_key="unused") as client:
        made = client.videos.create(prompt="a cat", extra_body={"seed": 3})
        done = until(
            lambda: client.videos.retrieve(made.id),
            lambda video: video.status in ("completed", "failed"),
            seconds=120,
        )
        assert done.status == "completed", done.error
        assert client.videos.download_content(made.id).read()[4:8] == b"ftyp"
        part = client.videos.download_content(made.id, extra_headers={"Range": "bytes=4-7"})
        assert part.read() == b"ftyp"


def _answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=5).ok
    except requests.ConnectionError:
        return False
