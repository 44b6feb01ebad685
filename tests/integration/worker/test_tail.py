"""The end of one video beside the beginning of the next: neither pays for the other."""

import dataclasses
import json
import threading
import time
from concurrent.futures import Future

import imageio_ffmpeg
import pytest
import sqlalchemy.exc

from jobs import lifecycle, orders, retries, safety, states, workers
from tests.waiting import until
from worker import checks, errors, heartbeat, rendering, runner, scratch, video

pytestmark = pytest.mark.timeout(60)
begin = runner.Runner.run_attempt  # without the wait for its tail that `host.runner` adds


@pytest.fixture
def ended(monkeypatch):
    """When a heartbeat would have ended this process."""
    found = []
    monkeypatch.setattr(heartbeat, "end_process", lambda: found.append(time.monotonic()))
    return found


@pytest.fixture
def slow_hashes(host, monkeypatch):
    """A host whose weights' hashes are known when the test says so."""
    monkeypatch.setattr(rendering, "HASH_LOOK_SECONDS", 0.1)
    networks = host.networks_with()
    networks.model.hashes = Future()
    yield networks, networks.model.hashes
    if not networks.model.hashes.done():
        networks.model.hashes.set_result({})


def test_a_video_that_waits_for_the_tail_before_it_is_no_stall(
    host, slow_hashes, ended, monkeypatch
):
    monkeypatch.setattr(runner, "TAIL_LOOK_SECONDS", 0.1)
    monkeypatch.setattr(runner, "MOST_AWAITING_HASHES", 0)
    first, second = host.submit(2)
    networks, hashes = slow_hashes
    own = host.worker_settings.model_copy(update={"stall_seconds": 1.0})
    made = host.runner(networks, worker_settings=own)
    begin(made, first.id)
    until(lambda: host.attempts(first.id)[0].stage == "hash")
    beside = threading.Thread(target=begin, args=(made, second.id))
    beside.start()
    beside.join(3.0)
    assert beside.is_alive(), "it waits"
    hashes.set_result({})
    beside.join()
    made.tail.wait()
    assert not ended
    for job in (first, second):
        assert host.attempts(job.id)[0].state is states.AttemptState.RENDERED


def test_weights_that_are_being_hashed_hold_up_no_device(host, slow_hashes, ended, monkeypatch):
    jobs = host.submit(4)
    networks, hashes = slow_hashes
    own = host.worker_settings.model_copy(update={"stall_seconds": 2.0})
    made = host.runner(networks, worker_settings=own)
    for job in jobs:
        begin(made, job.id)
    until(lambda: {host.attempts(job.id)[0].stage for job in jobs} == {"hash"})
    time.sleep(2.5)
    assert not ended, "each of them tells that it waits"
    hashes.set_result({"a": "b"})
    made.tail.wait()
    assert {host.attempts(job.id)[0].state for job in jobs} == {states.AttemptState.RENDERED}
    assert made.tally.held == set()
    assert made.renderer.num_waiting() == 0


def test_a_process_that_ends_waits_for_no_hash(host, slow_hashes):
    """Else its finished videos would be rendered once more."""
    jobs = host.submit(3)
    networks, _ = slow_hashes
    made = host.runner(networks)
    for job in jobs:
        begin(made, job.id)
    until(lambda: {host.attempts(job.id)[0].stage for job in jobs} == {"hash"})
    assert made.end(seconds=20)
    for job in jobs:
        [attempt] = host.attempts(job.id)
        assert attempt.state is states.AttemptState.RENDERED
    sidecars = [
        json.loads(folder.sidecar.read_text())
        for folder in scratch.folders(host.config.scratch_dir)
    ]
    assert [told["weights_sha256"] for told in sidecars] == [None] * 3


def test_a_host_that_cannot_keep_up_holds_up_its_device_while_weights_are_hashed_too(
    host, slow_hashes, monkeypatch
):
    """Only what waits for nothing but a hash may pile up: an encoder holds a video's frames."""
    monkeypatch.setattr(runner, "TAIL_LOOK_SECONDS", 0.1)
    may_end, check = threading.Event(), video.check
    monkeypatch.setattr(video, "check", lambda *a, **k: (may_end.wait(30), check(*a, **k))[1])
    jobs = host.submit(3)
    networks, hashes = slow_hashes
    made = host.runner(networks)
    begin(made, jobs[0].id)
    beside = threading.Thread(target=begin, args=(made, jobs[1].id))
    beside.start()
    beside.join(2.0)
    assert beside.is_alive(), "it waits"
    may_end.set()
    beside.join(30)
    begin(made, jobs[2].id)
    until(lambda: {host.attempts(job.id)[0].stage for job in jobs} == {"hash"})
    hashes.set_result({})
    made.tail.wait()


@pytest.fixture
def slow_end(monkeypatch, tmp_path):
    """An ffmpeg that goes on writing its file for so many tenths of a second."""
    monkeypatch.setattr(video, "LOOK_SECONDS", 0.1)

    def put(tenths):
        program = tmp_path / "ffmpeg"
        program.write_text(
            f"""#!/bin/sh
            {imageio_ffmpeg.get_ffmpeg_exe()} "$@" || exit
            for file; do :; done
            case "$*" in *pipe:0*) for _ in $(seq {tenths}); do touch "$file"; sleep 0.1; done; esac
            """
        )
        program.chmod(0o755)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(program))

    return put


def test_many_frames_that_are_still_to_encode_are_no_stall(host, slow_end, ended):
    slow_end(30)
    (job,) = host.submit(1)
    own = host.worker_settings.model_copy(update={"stall_seconds": 1.5})
    host.runner(worker_settings=own).run_attempt(job.id)
    assert not ended
    assert host.attempts(job.id)[0].state is states.AttemptState.RENDERED


def test_a_cancel_is_heard_while_frames_are_still_to_encode(host, slow_end):
    slow_end(600)
    (job,) = host.submit(1)
    made = host.runner()
    begin(made, job.id)
    until(lambda: host.attempts(job.id)[0].stage == "mux")
    host.db.write(orders.cancel_job, job.id)
    made.tail.wait(seconds=20)
    assert host.attempts(job.id)[0].state is states.AttemptState.CANCELLED


@pytest.fixture
def lose_device(host, slow_hashes, monkeypatch):
    """Loses the device on a second job while the tail of the first is at work; that one."""
    monkeypatch.setattr(runner, "LAST_TAIL_SECONDS", 0.2)

    class Exit(BaseException):
        pass

    def leave(_status):
        raise Exit

    monkeypatch.setattr(runner.os, "_exit", leave)
    first, second = host.submit(2)
    networks, _ = slow_hashes
    made = host.runner(networks)

    def lose():
        begin(made, first.id)
        until(lambda: host.attempts(first.id)[0].stage == "hash")
        broken = Broken(made, errors.DeviceFault("gone"))
        broken.hurry = lambda: None  # this tail is not in a hurry, as one that encodes
        with pytest.raises(Exit):
            begin(dataclasses.replace(made, renderer=broken), second.id)
        return first

    return lose


def test_a_lost_device_charges_no_unfinished_tail(host, lose_device):
    """Nor does the process that comes after it."""
    first = lose_device()
    name = host.worker_settings.worker_name
    host.db.write(lifecycle.end_lost_attempts, budgets=retries.budgets(host.config), worker=name)
    assert host.attempts(first.id)[0].state is states.AttemptState.RELEASED
    assert host.job(first.id).crash_count == 0


def test_a_process_without_a_device_ends_whatever_the_database_says(lose_device, monkeypatch):
    """Else it would fail one job after the other."""

    def away(*_, **__):
        raise sqlalchemy.exc.OperationalError("UPDATE", {}, Exception("no answer"))

    monkeypatch.setattr(lifecycle, "release_worker", away)
    lose_device()


def test_a_tail_takes_back_no_refusal_that_came_after_it_began(host, monkeypatch):
    may_end, check = threading.Event(), video.check
    monkeypatch.setattr(video, "check", lambda *a, **k: (may_end.wait(30), check(*a, **k))[1])
    host.register()
    first, second = host.submit(2)
    made = host.runner()
    begin(made, first.id)
    full = Broken(made, errors.DiskUnusable("full"))
    begin(dataclasses.replace(made, renderer=full), second.id)
    may_end.set()
    made.tail.wait()
    with host.db.reading() as session:
        assert [refusal.reason for refusal in workers.refusals(session)] == ["full"]


def test_what_goes_wrong_after_a_tail_is_not_heard_by_the_next_job(host, monkeypatch):
    """Nor by the end of the process, which waits for the tail."""
    first, second = host.submit(2)
    report, made = runner.Runner._report, host.runner()

    def odd(_runner):
        monkeypatch.setattr(runner.Runner, "_report", report)
        raise KeyError("odd")

    monkeypatch.setattr(runner.Runner, "_report", odd)
    for job in (first, second):
        begin(made, job.id)
    made.tail.wait()
    for job in (first, second):
        assert host.attempts(job.id)[0].state is states.AttemptState.RENDERED


def test_a_process_that_stands_still_ends_whatever_the_database_says(host, ended, monkeypatch):
    (job,) = host.submit(1)
    claim = host.claim(job)
    made = host.runner()

    def fail(*_, **__):
        raise sqlalchemy.exc.TimeoutError("QueuePool limit")

    monkeypatch.setattr(made.db, "write", fail)
    made._stalled(claim)
    assert len(ended) == 1


def test_frames_of_two_videos_are_checked_one_after_the_other(host):
    first, second = host.submit(2, target_video_length=9)
    inside, most = [], []

    def check(_asked):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.2)
        inside.pop()

    made = with_check(host.runner(), check)
    for job in (first, second):
        begin(made, job.id)
    made.tail.wait()
    assert max(most) == 1
    assert len(most) == 6


def test_a_device_waits_for_frames_that_nobody_takes(host, monkeypatch):
    """Else those of a large video would fill the memory of its host."""
    monkeypatch.setattr(rendering, "MOST_WAITING_BYTES", 0)
    [job] = host.submit(target_video_length=9)
    looking, go_on = threading.Event(), threading.Event()

    def check(_asked):
        looking.set()
        go_on.wait(30)

    made = with_check(host.runner(), check)
    render = threading.Thread(target=begin, args=(made, job.id))
    render.start()
    assert looking.wait(30)
    render.join(1.0)
    assert render.is_alive(), "it waits"
    go_on.set()
    render.join()
    made.tail.wait()
    assert host.attempts(job.id)[0].state is states.AttemptState.RENDERED


def test_a_check_that_takes_long_over_each_piece_is_no_stall(host, ended):
    [job] = host.submit(target_video_length=9)
    pieces = []

    def check(_asked):
        pieces.append(1)
        time.sleep(0.7)

    own = host.worker_settings.model_copy(update={"stall_seconds": 1.5})
    with_check(host.runner(worker_settings=own), check).run_attempt(job.id)
    assert len(pieces) * 0.7 > 1.5, "all of them together would be one"
    assert not ended
    assert host.attempts(job.id)[0].state is states.AttemptState.RENDERED


def with_check(made, check):
    asked = checks.Checks(frames=safety.Check("x:y", check))
    return dataclasses.replace(made, renderer=dataclasses.replace(made.renderer, safety=asked))


class Broken:
    """Fails every render, and tells what the other one would."""

    def __init__(self, made, error):
        self.report = made.renderer.report
        self.num_waiting = made.renderer.num_waiting
        self.hurry = made.renderer.hurry
        self.error = error

    def render(self, *_, **__):
        raise self.error
