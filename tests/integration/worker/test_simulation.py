"""Simulated devices: as real to the farm as any, and never mistaken for one."""

import json
import subprocess
import sys

import pytest

from jobs import queues, states
from jobs.schema import Job
from worker import errors, launch, provenance, scratch, simulation, video


@pytest.fixture
def sim(host, monkeypatch):
    """A worker with a simulated device that takes no time."""
    monkeypatch.setenv("RUSHES_DEVICE", "sim")
    monkeypatch.setenv("RUSHES_SIM_STEP_SECONDS", "0")
    settings = type(host.worker_settings)()
    return host.runner(renderer=simulation.SimulatedRenderer(settings))


def rendered(host, sim, **changes):
    """A simulated job's finished folder."""
    job = host.submit(**({"model_path": "simulated"} | changes))[0]
    sim.run_attempt(job.id)
    (attempt,) = host.attempts(job.id)
    assert attempt.state is states.AttemptState.RENDERED, attempt.error
    return next(f for f in scratch.folders(host.config.scratch_dir) if f.attempt_id == attempt.id)


def test_a_simulated_video_has_the_form_that_was_asked_for_and_says_what_it_is(host, sim):
    folder = rendered(host, sim)
    assert video.probe(folder.video) == video.VideoInfo(
        width=16, height=16, num_frames=9, fps=8.0, codec="h264", pixel_format="yuv420p"
    )
    told = json.loads(folder.sidecar.read_text())
    assert told["simulated"] is True
    assert told["device"] == "simulated"
    assert set(told["seconds"]) == {"load", "text", "denoise", "decode", "mux"}
    assert b'"simulated": true' in folder.video.read_bytes()


def test_equal_seeds_make_equal_files_but_for_the_name_of_the_job(host, sim):
    files = [rendered(host, sim).video.read_bytes() for _ in range(2)]
    first, second = (data[: data.index(provenance.XMP_BOX.bytes)] for data in files)
    assert first == second


def test_a_real_model_is_refused_by_a_simulated_device(host, sim):
    """Whatever a message says: a night's batch is never answered with test cards."""
    job = host.submit()[0]
    sim.run_attempt(job.id)
    (attempt,) = host.attempts(job.id)
    assert attempt.state is states.AttemptState.RELEASED
    assert "tiny needs a real device" in attempt.note


def test_simulated_workers_take_from_simulated_queues_alone(host, monkeypatch, tmp_path):
    monkeypatch.setenv("RUSHES_PRESETS_DIR", str(tmp_path))
    preset = json.loads(host.preset.read_text()) | {"model_path": "simulated/large"}
    (tmp_path / "rehearsal.json").write_text(json.dumps(preset))
    config = type(host.config)()
    taken = launch.make(config, devices="sim:2").queues
    assert set(taken) == {queues.of_model("simulated"), queues.of_model("simulated/large")}
    assert launch.make(config, devices="cpu").queues == (queues.of_model("tiny"),)


def failed(host, sim, fault):
    """The only attempt of a job that asks for this fault."""
    job = host.submit(model_path="simulated")[0]
    with host.db.transaction() as session:
        session.get_one(Job, job.id).meta = {simulation.FAULT: fault}
    sim.run_attempt(job.id)
    (attempt,) = host.attempts(job.id)
    return attempt


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("out_of_memory", states.FailureKind.OUT_OF_MEMORY),
        ("internal", states.FailureKind.INTERNAL),
    ],
)
def test_a_rehearsed_fault_fails_as_the_real_one_does(host, sim, fault, kind):
    assert failed(host, sim, fault).failure_kind is kind


def test_a_rehearsed_lack_of_memory_steps_down_once(host, sim):
    assert failed(host, sim, "tight_memory").state is states.AttemptState.RENDERED


def test_a_simulated_device_loads_no_torch(host, sim):
    script = "import sys; from worker import runner; runner.make(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_a_scratch_disk_that_takes_no_card_is_the_hosts_fault(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(errors.DiskUnusable, match="Not a directory"):
        simulation._encode_card(tmp_path / "file", 64, 64, 5, 8, ())
