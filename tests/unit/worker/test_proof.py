"""The self-test of a device: silent about a good one, and loud about each kind of bad one."""

import json
import subprocess
import sys

import pytest
import torch

from worker import device, errors, pipeline, proof, selftest
from worker.settings import WorkerSettings


@pytest.fixture
def here():
    return device.Device(torch_device=torch.device("cpu"), dtype=torch.float32, name="CPU here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny model in it is made once."""
    return tmp_path_factory.mktemp("proof")


@pytest.fixture
def spoil(monkeypatch):
    """`spoil(change)`: what the device under test computes as latents, and how often it did."""

    def spoil_by(change):
        right, calls = pipeline.make_latents, []

        def wrong(*arguments, device, **others):
            latents_BCTHW = right(*arguments, device=device, **others).clone()
            if device.name == "CPU here":
                calls.append(latents_BCTHW)
                change(latents_BCTHW, len(calls))
            return latents_BCTHW

        monkeypatch.setattr(pipeline, "make_latents", wrong)

    return spoil_by


def test_a_good_device_passes(here, folder):
    facts = proof.prove(here, folder)
    assert facts["device"] == "CPU here"
    assert set(facts["seconds"]) == {"renders", "multiplies", "remembers"}


def half_precision():
    return device.Device(torch_device=torch.device("cpu"), dtype=torch.bfloat16, name="CPU here")


def test_the_rounding_of_a_device_is_no_fault(folder):
    proof.prove(half_precision(), folder)


def flip_a_bit_the_second_time(latents_BCTHW, call):
    if call == 2:
        latents_BCTHW.view(torch.int32)[0, 0, 0, 0, 0] ^= 1


def scale_always(latents_BCTHW, _call):
    latents_BCTHW *= 1.05


def lose_a_number(latents_BCTHW, _call):
    latents_BCTHW[0, 0, 0, 0, 0] = torch.nan


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip_a_bit_the_second_time, "two renders of one seed differ"),
        (scale_always, "away from the processor's"),
        (lose_a_number, "NaN in the frames"),
    ],
)
def test_a_device_that_computes_wrongly_fails(here, folder, spoil, change, words):
    spoil(change)
    with pytest.raises((errors.DeviceFault, errors.NotFinite), match=words):
        proof.prove(here, folder)


def test_more_than_rounding_in_half_precision_is_a_fault(folder, spoil):
    def drown(latents_BCTHW, _call):
        latents_BCTHW += 0.2

    spoil(drown)
    with pytest.raises(errors.DeviceFault, match="away from"):
        proof.prove(half_precision(), folder)


def test_the_process_prints_its_verdict_as_json(monkeypatch, tmp_path):
    monkeypatch.setenv("RUSHES_DEVICE", "sim")
    monkeypatch.setenv("RUSHES_WORKER_NAME", "sim0@here")
    bad = tmp_path / "bad"
    monkeypatch.setenv("RUSHES_SIM_BAD_DEVICES", str(bad))

    def said():
        command = [sys.executable, "-m", "worker.selftest"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    assert said() == {"failure": None, "facts": {"device": "simulated"}}
    bad.write_text("sim0@elsewhere device\nsim0@here device\n")
    assert "fell off the bus" in said()["failure"]


def test_a_missing_device_fails_its_test():
    settings = WorkerSettings(RUSHES_DEVICE="cuda")
    if not torch.cuda.is_available():
        with pytest.raises(errors.DeviceFault, match="nvidia-smi"):
            selftest.run(settings)


def test_a_scratch_disk_that_takes_no_model_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RUSHES_SCRATCH_DIR", str(tmp_path / "file" / "scratch"))
    with pytest.raises(errors.DiskUnusable, match="Not a directory"):
        selftest.run(WorkerSettings(RUSHES_DEVICE="cpu"))
