"""A device that goes bad: taken out, tested, and back when it is mended; its jobs go elsewhere."""

import sys
import tempfile
import threading

import pytest

from jobs import dispatch, health, states, workers
from tests.waiting import until
from worker import launch, trial

BAD = "sim0@here"


def python(script):
    return (sys.executable, "-S", "-c", script)


def verdict_of(environment=None):
    begun = trial.Trial(environment or {})
    found = []
    until(lambda: found or found.append(begun.verdict()) or found[0] or found.clear())
    return found[0]


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("import os; os._exit(71)", "status 71"),
        ("import os; os.kill(os.getpid(), 9)", "status -9"),
        ("print('no verdict')", "status 0"),
        ("""print('{"other": 1}')""", "status 0"),
        ("""print('{"failure": "NaN", "facts": {}}')""", "NaN"),
    ],
)
def test_a_test_that_says_nothing_good_has_failed(monkeypatch, script, words):
    monkeypatch.setattr(trial, "COMMAND", python(script))
    assert words in verdict_of().failure


def test_a_test_that_hangs_is_ended(monkeypatch):
    monkeypatch.setattr(trial, "COMMAND", python("import time; time.sleep(600)"))
    monkeypatch.setattr(trial, "LIMIT_SECONDS", 0.3)
    begun = trial.Trial({})
    until(lambda: begun.verdict() is not None)
    assert begun._process.poll() is not None


def test_a_test_sees_the_device_of_its_worker(monkeypatch):
    script = """import os; print('{"failure": "%s", "facts": {}}' % os.environ["RUSHES_DEVICE"])"""
    monkeypatch.setattr(trial, "COMMAND", python(script))
    assert verdict_of({"RUSHES_DEVICE": "cuda"}).failure == "cuda"


def test_a_test_needs_no_temporary_folder(monkeypatch):
    monkeypatch.setattr(trial, "COMMAND", python("""print('{"failure": null, "facts": {}}')"""))
    monkeypatch.setattr(tempfile, "tempdir", "/dev/null")
    assert verdict_of().failure is None


@pytest.fixture
def farm(host, monkeypatch, tmp_path):
    """Two simulated devices with real processes, a dispatcher, and a file of those that are bad."""
    bad = tmp_path / "bad"
    monkeypatch.setenv("RUSHES_SIM_BAD_DEVICES", str(bad))
    monkeypatch.setenv("RUSHES_SIM_STEP_SECONDS", "0.01")
    monkeypatch.setattr(launch, "LOOK_SECONDS", 0.1)
    monkeypatch.setattr(workers, "BEAT_SECONDS", 0.3)
    made = launch.make(host.config, devices="sim:2")
    stop = threading.Event()
    dispatcher = dispatch.Dispatcher(
        host.config.model_copy(update={"tick_seconds": 0.3}), db=host.db
    )
    threads = [
        threading.Thread(target=made.run),
        threading.Thread(target=dispatcher.run, args=(stop,)),
    ]
    for thread in threads:
        thread.start()
    yield bad
    stop.set()
    made.stop.set()
    made.hurry.set()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def out(host):
    with host.db.reading() as session:
        return {held.worker: held for held in workers.refusals(session) if held.needs_test}


def succeeded(host, jobs):
    return all(host.job(job.id).state is states.JobState.SUCCEEDED for job in jobs)


def test_a_bad_device_is_taken_out_its_jobs_go_elsewhere_and_mended_it_comes_back(host, farm):
    farm.write_text(f"{BAD} internal\n")
    jobs = host.submit(12, model_path="simulated")
    until(lambda: BAD in out(host), seconds=120)
    until(lambda: "self-test failed" in out(host)[BAD].reason, seconds=60)
    until(lambda: succeeded(host, jobs), seconds=120)
    failed = [a for job in jobs for a in host.attempts(job.id) if a.failure_kind is not None]
    assert {attempt.worker for attempt in failed} == {BAD}
    assert len(failed) == len({attempt.job_id for attempt in failed}) == health.MAX_SUSPECTS
    farm.unlink()
    host.db.write(health.ask_for_test, BAD)
    until(lambda: out(host) == {}, seconds=60)

    def rendered_by_it():
        more = host.submit(4, model_path="simulated")
        until(lambda: succeeded(host, more), seconds=60)
        return any(a.worker == BAD for job in more for a in host.attempts(job.id))

    until(rendered_by_it, seconds=120)
