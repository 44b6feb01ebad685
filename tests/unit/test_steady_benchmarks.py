"""The benchmarks of steady state: what they start, and what they make of recorded times."""

import argparse
import subprocess
import sys

import pytest

from benchmarks import farm, random_model, scaling, steady
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
    # From 14 (b's first job ends) to 40 (a's last one begins), a job in ten seconds each.
    assert found["jobs_per_hour"] == pytest.approx(720, rel=0.05)
    assert found["gap_median"] == pytest.approx(1.0)
    assert found["gap_share"] == pytest.approx(0.1)


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
        device=device, job_seconds=1.0, cards=True, size=None, text_layers=1
    )
    devices, _, _ = steady.prepare(arguments, tmp_path)
    assert [each.short_name for each in gpus.slots(devices, cores=2)] == [slot]


def test_no_worker_is_waited_for_whose_process_has_ended(tmp_path):
    (tmp_path / "worker.log").write_text("no GPU 7")
    ended = subprocess.Popen([sys.executable, "-c", "raise SystemExit(2)"])
    ended.wait()
    here = farm.Farm(
        home=tmp_path, config=None, db=None, store_kind="", processes={"worker": ended}
    )
    with pytest.raises(SystemExit, match="worker ended: no GPU 7"):
        here.wait_for_workers(1, seconds=60)
