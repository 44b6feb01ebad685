"""What the benchmarks of steady state make of recorded times."""

import pytest

from benchmarks import farm, scaling


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
