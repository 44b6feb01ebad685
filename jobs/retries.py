"""Retry or give up, and when. Pure: the worker only names the failure."""

import random
from dataclasses import dataclass

from jobs import settings, states

LONGEST_WAIT_SECONDS = 600.0
MAX_DOUBLINGS = 1_000  # what a float can hold
FIRST_RELEASE_SECONDS = 5.0  # soon: another host may well do it
SHORTEST_LEFT_SECONDS = 20.0  # to others, before its message is sent again
LONGEST_LEFT_SECONDS = 120.0  # one of them may have become idle meanwhile

NEVER_RETRIED = frozenset({states.FailureKind.REFUSED})
SAID_TWICE = frozenset({states.FailureKind.INPUT})
"""The same everywhere, unless this host's files or store are other ones: a second is asked."""
OF_JOB = NEVER_RETRIED | SAID_TWICE
"""Its own fault as far as is known: tried again as it is, it will probably fail as before."""
OF_HOST = SAID_TWICE | {states.FailureKind.WEIGHTS}
"""What may lie at the files of a host: all of its workers fail alike."""
CRASHES = frozenset({states.FailureKind.WORKER_LOST})
OF_MACHINE = CRASHES | {states.FailureKind.DEVICE, states.FailureKind.INTERNAL}
"""What a broken machine does to any job; a broken job does it to any machine."""
TRIED_ELSEWHERE = (
    OF_MACHINE | OF_HOST | {states.FailureKind.ENCODING, states.FailureKind.OUT_OF_MEMORY}
)
"""What another machine may well do; it says nothing against the one that could not."""
MAX_ROUNDS = 3  # budgets of errors spent, repeats counted: those that are there do not take it
MAX_MACHINES = 3  # that a job may fail on in such a way: then it is to blame


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """How often a job may fail. Attempts given back by a stopping worker count in neither."""

    max_errors: int
    max_crashes: int
    retry_seconds: float


def budgets(config: settings.Settings) -> Budgets:
    return Budgets(
        max_errors=config.max_errors,
        max_crashes=config.max_crashes,
        retry_seconds=config.retry_seconds,
    )


@dataclass(frozen=True, kw_only=True)
class RetryDecision:
    """Try again, not before `wait_seconds` from now."""

    wait_seconds: float


def decide(
    kind: states.FailureKind,
    *,
    errors: int,
    crashes: int,
    budgets: Budgets,
    machines: int = 0,
    hosts: int | None = None,
    repeats: int = 0,
) -> RetryDecision | None:
    """None: give up. The numbers include the failure that is being decided.

    `machines`: different workers on which the job failed by a kind of OF_MACHINE. `hosts`: on how
    many it failed by this kind, which is one of OF_HOST; None: no other one takes its jobs.
    `repeats`: those of the errors by which a host said again, by a kind of OF_HOST, what it had.
    """
    if kind in NEVER_RETRIED or machines >= MAX_MACHINES:
        return None
    if kind in SAID_TWICE and (hosts is None or hosts > 1):
        return None
    if kind in CRASHES:
        # The worker died, the job may be innocent: at once, but not often.
        return RetryDecision(wait_seconds=0.0) if crashes < budgets.max_crashes else None
    if errors >= MAX_ROUNDS * budgets.max_errors:
        return None
    if kind not in OF_HOST or hosts is not None:
        errors -= repeats  # they say nothing new, and the other hosts may be busy
    if errors >= budgets.max_errors:
        return None
    return RetryDecision(wait_seconds=growing_wait(budgets.retry_seconds, errors))


def may_go_well(kind: states.FailureKind | None, *, quarantined: bool) -> bool:
    """Whether a job that failed so may do better when a person asks for it again, as it is."""
    return not quarantined and kind not in OF_JOB


def wait_after_release(attempt_number: int) -> float:
    """Seconds until a job that its host gave back is tried again: longer each time, no budget."""
    return growing_wait(FIRST_RELEASE_SECONDS, attempt_number)


def wait_for_others(seconds_since_failure: float) -> float:
    """Seconds until a job that a worker leaves to others is sent again: longer each time.

    Else such jobs would come again before all others, and none of these would reach the worker.
    """
    return min(max(seconds_since_failure, SHORTEST_LEFT_SECONDS), LONGEST_LEFT_SECONDS)


def growing_wait(
    first_seconds: float, times: int, *, longest_seconds: float = LONGEST_WAIT_SECONDS
) -> float:
    """Twice as long each time, up to `longest_seconds`; up to half less, by chance.

    What failed together, as of one lost disk, then does not come back all at once.
    """
    longest = min(first_seconds * 2.0 ** min(times - 1, MAX_DOUBLINGS), longest_seconds)
    return random.uniform(longest / 2, longest)  # noqa: S311
