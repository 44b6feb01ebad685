"""The benchmarks of steady state: what they start, and what they make of recorded times."""

import argparse
import os
import subprocess
import sys
import time
from datetime import datetime

import pytest
import torch

from benchmarks import farm, gpu_busy, random_model, scaling, steady
from models import config, layout
from worker import gpus


def worked(worker, *begins, takes=9.0):
    return [
        farm.Worked(
            worker=worker, job_id=0, began=begin, ended=begin + takes, busy=takes, seconds={}
        )
        for begin in begins
    ]


def test_a_rate_is_that_of_the_time_in_which_every_device_had_work():
    """The second one begins late and ends late: what the first does alone is not counted."""
    both = [*worked("a", 0, 10, 20, 30, 40), *worked("b", 5, 15, 25, 35, 45, 55)]
    found = scaling.rates(both, 2)
    # From 5 (b's first job begins) to 40 (a's last one begins), a job in ten seconds each.
    assert found["jobs_per_hour"] == pytest.approx(720)
    assert found["gap_median"] == pytest.approx(1.0)
    assert found["gap_share"] == pytest.approx(0.1)


def test_gaps_after_the_first_jobs_are_counted():
    """Devices wait longest there; the last one to end its first job waits least."""
    devices = [
        worked("a", 0, 31, 60, takes=28.0),
        worked("b", 5, 36, 65, takes=28.0),
        worked("c", 10, 39, 68, takes=28.0),
    ]
    found = scaling.rates([job for jobs in devices for job in jobs], 3)
    assert found["gap_most"] == pytest.approx(3.0)
    # From 10 to 60: a waits 3 and 1, b 3, c 1.
    assert found["gap_share"] == pytest.approx(8 / 150)


def test_a_99th_percentile_of_few_is_not_told():
    assert steady.p99(list(range(99))) is None
    assert steady.p99(list(range(200))) == 198
    assert steady.told_gaps([0.02, 0.03, 0.05]) == "median 30 ms, most 50 ms of 3"


def test_the_share_of_kernels_is_that_between_two_moments(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text(
        "#!/bin/sh\n"
        "echo '2026/11/28 10:00:01.000, 90'; echo '2026/11/28 10:00:02.000, 50'\n"
        "echo '2026/11/28 10:00:03.000, [N/A]'; echo '2026/11/28 10:00:09.000, 0'\n"
        "printf '2026/11/28 10:00'\n"
        "exec sleep 60\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    samples, limit = tmp_path / "kernels.csv", time.monotonic() + 20
    with gpu_busy.sampled("0", samples):
        while samples.read_text().count("10:00") < 5 and time.monotonic() < limit:
            time.sleep(0.01)
    ten = datetime(2026, 11, 28, 10).astimezone().timestamp()
    assert gpu_busy.share(samples, since=ten, until=ten + 5) == pytest.approx(0.7)
    assert gpu_busy.share(samples, since=ten + 20, until=ten + 30) is None


def test_a_device_that_rendered_nothing_is_told():
    with pytest.raises(SystemExit, match="only 1 of 2"):
        scaling.rates(worked("a", 0, 10, 20), 2)


def test_too_few_jobs_for_a_common_time_are_told():
    with pytest.raises(SystemExit, match="more --jobs"):
        scaling.rates([*worked("a", 0, 10), *worked("b", 20, 30)], 2)


@pytest.fixture
def a_gpu(monkeypatch):
    found = [gpus.Gpu(number="0.1", uuid="MIG-cccc3333", name="NVIDIA H200", memory_bytes=None)]
    monkeypatch.setattr(gpus, "find", lambda: found)
    monkeypatch.setattr(random_model, "write", lambda *_, **__: None)


@pytest.mark.parametrize(("device", "slot"), [("sim", "sim0"), ("cpu", "cpu0"), ("cuda", "gpu0.1")])
def test_the_launcher_knows_the_device_that_it_is_told(device, slot, a_gpu, tmp_path):
    arguments = argparse.Namespace(
        device=device, job_seconds=1.0, cards=True, size=None, text_layers=1, model="14b"
    )
    devices, _, _ = steady.prepare(arguments, tmp_path)
    assert [each.short_name for each in gpus.slots(devices, cores=2)] == [slot]


def test_a_gpu_that_random_weights_were_made_on_is_all_the_workers(tmp_path, monkeypatch):
    given_back = []
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: given_back.append(layout.find(tmp_path).weights)
    )
    random_model.write(
        tmp_path,
        text_layers=1,
        sizes=config.TINY,
        autoencoder=config.TINY_VAE,
        text=config.TINY_TEXT_ENCODER,
    )
    assert given_back == [layout.find(tmp_path).weights]


def test_no_worker_is_waited_for_whose_process_has_ended(tmp_path):
    (tmp_path / "worker.log").write_text("no GPU 7")
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    ended.wait()
    here = farm.Farm(
        home=tmp_path, config=None, db=None, store_kind="", processes={"worker": ended}
    )
    with pytest.raises(SystemExit, match="worker ended: no GPU 7"):
        here.wait_for_workers(1, seconds=60)
