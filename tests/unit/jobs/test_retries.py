"""Retry or give up, and when."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import retries, settings, states
from jobs.states import FailureKind

BUDGETS = retries.Budgets(max_errors=3, max_crashes=2, retry_seconds=10.0)
FINAL = (FailureKind.INPUT, FailureKind.REFUSED)
ERRORS = [kind for kind in FailureKind if kind not in (*FINAL, FailureKind.WORKER_LOST)]


def decide(kind: FailureKind, *, errors: int = 0, crashes: int = 0) -> retries.RetryDecision | None:
    return retries.decide(kind, errors=errors, crashes=crashes, budgets=BUDGETS)


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_is_retried_until_the_budget_is_spent(kind: FailureKind) -> None:
    assert [decide(kind, errors=number) is None for number in (1, 2, 3, 4)] == [
        False,
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("kind", FINAL)
def test_what_cannot_heal_is_never_retried(kind: FailureKind) -> None:
    assert decide(kind, errors=1) is None


@pytest.mark.parametrize("kind", FailureKind)
def test_a_retry_by_hand_may_help_what_was_not_the_job_itself(kind: FailureKind) -> None:
    assert retries.may_go_well(kind, quarantined=False) is (kind not in FINAL)
    assert not retries.may_go_well(kind, quarantined=True)


def test_what_should_be_the_same_everywhere_is_final_once_a_second_host_says_so() -> None:
    told = {"errors": 1, "crashes": 0, "budgets": BUDGETS}
    ends = [retries.decide(FailureKind.INPUT, **told, hosts=hosts) for hosts in (None, 1, 2, 3)]
    assert [end is None for end in ends] == [True, False, True, True]


@pytest.mark.parametrize("kind", sorted(retries.OF_HOST))
def test_a_host_that_fails_a_job_again_costs_it_nothing_while_there_is_another(
    kind: FailureKind,
) -> None:
    told = {"errors": 5, "crashes": 0, "budgets": BUDGETS}
    assert retries.decide(kind, **told, hosts=1, repeats=4) is not None
    assert retries.decide(kind, **told, hosts=1, repeats=2) is None
    assert retries.decide(kind, **told, hosts=None, repeats=4) is None
    assert retries.decide(FailureKind.DISK, **told, repeats=4) is not None
    once = retries.Budgets(max_errors=1, max_crashes=1, retry_seconds=0)
    told = {"errors": 1, "crashes": 0, "budgets": once}
    assert retries.decide(kind, **told, hosts=1) is None


@pytest.mark.parametrize("kind", sorted(retries.OF_HOST))
def test_what_no_other_host_takes_ends_all_the_same(kind: FailureKind) -> None:
    told = {"crashes": 0, "budgets": BUDGETS, "hosts": 1}
    most = retries.MAX_ROUNDS * BUDGETS.max_errors
    assert retries.decide(kind, errors=most - 1, repeats=most - 2, **told) is not None
    assert retries.decide(kind, errors=most, repeats=most - 1, **told) is None


def test_a_crash_is_retried_at_once_but_once() -> None:
    assert decide(FailureKind.WORKER_LOST, crashes=1) == retries.RetryDecision(wait_seconds=0.0)
    assert decide(FailureKind.WORKER_LOST, crashes=2) is None


def test_crashes_and_errors_have_budgets_of_their_own() -> None:
    assert decide(FailureKind.WORKER_LOST, errors=99, crashes=1) is not None
    assert decide(FailureKind.INTERNAL, errors=1, crashes=99) is not None


@given(errors=st.integers(1, 99), retry_seconds=st.floats(0, settings.LONGEST_SECONDS))
def test_waits_double_within_bounds_whatever_the_settings(
    errors: int, retry_seconds: float
) -> None:
    budgets = retries.Budgets(max_errors=100, max_crashes=1, retry_seconds=retry_seconds)
    decision = retries.decide(FailureKind.ENCODING, errors=errors, crashes=0, budgets=budgets)
    assert decision is not None
    longest = min(retry_seconds * 2.0 ** (errors - 1), retries.LONGEST_WAIT_SECONDS)
    assert longest / 2 <= decision.wait_seconds <= longest


def test_jobs_that_failed_together_do_not_come_back_together() -> None:
    waits = {decide(FailureKind.STORAGE, errors=1) for _ in range(20)}
    assert len(waits) > 10


def test_every_kind_of_failure_is_decided() -> None:
    for kind in states.FailureKind:
        assert decide(kind, errors=100, crashes=100) is None


def test_what_hosts_give_back_comes_later_each_time() -> None:
    waits = [retries.wait_after_release(number) for number in (1, 3, 5, 30)]
    assert waits == sorted(waits)
    assert waits[0] <= retries.FIRST_RELEASE_SECONDS < waits[1]
    assert waits[-1] <= retries.LONGEST_WAIT_SECONDS
