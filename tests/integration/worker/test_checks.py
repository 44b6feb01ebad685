"""A user's own safety checks: what they refuse is final, and what they raise is no refusal."""

import dataclasses

import pytest

from jobs import database, safety, settings, states, workers
from worker import checks, scratch
from worker.settings import WorkerSettings

MODULE = """
import numpy

seen = []

def no_circles(asked):
    return "no circles today" if "circle" in asked.prompt else None

def forgetful(asked):
    return asked.prompt == "clip 0"

def broken(asked):
    raise ConnectionError("the moderation service is away")

def all_black(asked):
    seen.append((asked.first, asked.frames_THWC.shape, asked.frames_THWC.dtype))
    assert not asked.frames_THWC.flags.writeable
    return "it moves" if asked.first > 0 else None

def watching(asked):
    seen.append(asked.first)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A user's module on the path."""
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "house_rules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path / "own"))
    monkeypatch.delitem(__import__("sys").modules, "house_rules", raising=False)
    import house_rules

    return house_rules


@pytest.fixture
def runner_with(host, module, monkeypatch):
    """`runner_with(prompt="broken")`: the host's runner, with checks from its settings."""

    def make(*, prompt=None, frames=None):
        for name, function in {"RUSHES_PROMPT_CHECK": prompt, "RUSHES_FRAME_CHECK": frames}.items():
            if function is not None:
                monkeypatch.setenv(name, f"house_rules:{function}")
        asked = checks.Checks.load(settings.load(), WorkerSettings())
        runner = host.runner(safety=asked)
        return dataclasses.replace(
            runner, renderer=dataclasses.replace(runner.renderer, safety=asked)
        )

    return make


def ended(host, job):
    """The job after its only attempt; nothing of it is left on the disk."""
    assert scratch.folders(host.config.scratch_dir) == []
    (attempt,) = host.attempts(job.id)
    return host.job(job.id), attempt


def test_a_refused_prompt_is_failed_at_once_with_the_reason(host, runner_with):
    job = host.submit()[0]
    with host.db.transaction() as session:
        session.merge(job).prompt = "a red circle"
    runner_with(prompt="no_circles").run_attempt(job.id)
    job, attempt = ended(host, job)
    assert (job.state, job.failure_kind) == (states.JobState.FAILED, states.FailureKind.REFUSED)
    assert job.error == "refused by the safety check house_rules:no_circles: no circles today"
    assert attempt.seconds is None


def test_refused_frames_end_the_video_before_anything_is_uploaded(host, runner_with, module):
    job = host.submit()[0]
    runner_with(frames="all_black").run_attempt(job.id)
    job, _ = ended(host, job)
    assert (job.state, job.failure_kind) == (states.JobState.FAILED, states.FailureKind.REFUSED)
    assert job.error.endswith(": it moves")
    assert host.waiting_publishes() == []
    first, second = module.seen
    assert (first[0], second[0]) == (0, first[1][0])
    assert first[1][1:] == (16, 16, 3)


def test_a_check_that_finds_nothing_sees_every_frame_and_changes_nothing(host, runner_with, module):
    plain, checked = host.submit(2)
    host.runner().run_attempt(plain.id)
    runner_with(prompt="no_circles", frames="watching").run_attempt(checked.id)
    assert [host.attempts(job.id)[0].state for job in (plain, checked)] == ["rendered"] * 2
    assert module.seen[0] == 0
    assert len(module.seen) > 1


@pytest.mark.parametrize(
    ("function", "told"),
    [
        ("broken", "ConnectionError: the moderation service is away"),
        ("forgetful", "must return None or a reason as text, got True"),
    ],
)
def test_a_check_that_breaks_is_the_hosts_fault_and_no_refusal(host, runner_with, function, told):
    job = host.submit()[0]
    host.register()
    runner_with(prompt=function).run_attempt(job.id)
    job, attempt = ended(host, job)
    assert (job.state, job.error_count) == (states.JobState.QUEUED, 0)
    assert attempt.state is states.AttemptState.RELEASED
    assert told in attempt.note
    with host.db.reading() as session:
        now = database.now(session)
        assert workers.refuses(session, "cpu0@here", job.queue, now=now)


def test_a_job_that_always_breaks_the_check_does_not_keep_the_farm_busy(host, runner_with):
    asked = runner_with(prompt="broken").safety
    claim = host.claim(host.submit()[0])
    assert _kind(asked, claim) == "CheckBroken"
    last = dataclasses.replace(claim, number=checks.HOSTS_FAULT_TRIES)
    assert _kind(asked, last) == "CheckBroken"
    again = dataclasses.replace(claim, number=checks.HOSTS_FAULT_TRIES + 1)
    assert _kind(asked, again) == "CheckBreaksAgain"


def _kind(asked, claim):
    with pytest.raises(Exception, match="is broken") as raised:
        asked.look_at_prompt(claim)
    return type(raised.value).__name__


@pytest.mark.parametrize(
    "path", ["house_rules", "house_rules:absent", "absent:f", "house_rules:seen"]
)
def test_a_check_that_cannot_be_loaded_is_told_by_its_setting(module, path):
    with pytest.raises(Exception, match=f"RUSHES_PROMPT_CHECK={path}"):
        safety.load(path, setting="RUSHES_PROMPT_CHECK")
