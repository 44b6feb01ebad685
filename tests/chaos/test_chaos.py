"""The short form of `make chaos`: each kind of fault once, on real processes."""

import pytest

from tests.chaos import run, scripts


@pytest.mark.timeout(600)
def test_a_farm_that_is_struck_loses_nothing_and_commits_nothing_twice(tmp_path):
    """Kills, zombies, drains, lost servers, a full disk, wrong clocks: each at least once."""
    verdict = run.run(scripts.short(seed=5), tmp_path)
    assert verdict.is_good, verdict.told()
    assert verdict.figures["jobs_acknowledged"] == verdict.script.jobs
    struck = {strike.what for strike in verdict.strikes}
    assert struck | set(verdict.skipped) == set(scripts.SHORT_STRIKES)
    assert set(verdict.skipped) <= {"disk full"}
    assert set(verdict.exit_status.values()) == {0}  # SIGTERM at the end stops all in order
