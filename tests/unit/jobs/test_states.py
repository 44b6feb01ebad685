"""The table of transitions, and the words that are stored."""

import re
from pathlib import Path

import pytest

from jobs import moves, states
from jobs.states import FINAL_JOB_STATES, LIVE_ATTEMPT_STATES, TRANSITIONS, AttemptState, JobState

REPOSITORY = Path(__file__).resolve().parents[3]


def test_every_state_has_its_row() -> None:
    assert set(TRANSITIONS) == set(JobState)
    assert all(after <= set(JobState) for after in TRANSITIONS.values())


def test_no_state_follows_itself() -> None:
    assert all(state not in after for state, after in TRANSITIONS.items())


def test_only_a_retry_leaves_a_final_state_and_nothing_leaves_success() -> None:
    for state in FINAL_JOB_STATES:
        assert TRANSITIONS[state] <= {JobState.QUEUED}
    assert TRANSITIONS[JobState.SUCCEEDED] == frozenset()
    assert {JobState.QUEUED, JobState.RUNNING}.isdisjoint(FINAL_JOB_STATES)


def test_every_state_can_be_reached_from_queued() -> None:
    reached = {JobState.QUEUED}
    while more := {after for state in reached for after in TRANSITIONS[state]} - reached:
        reached |= more
    assert reached == set(JobState)


def test_an_attempt_lives_or_has_ended() -> None:
    assert {AttemptState.RUNNING, AttemptState.RENDERED} == LIVE_ATTEMPT_STATES


def test_stored_words_fit_their_columns() -> None:
    for kind in (states.JobState, states.AttemptState, states.FailureKind):
        assert all(len(member.value) <= 20 for member in kind)


def test_a_move_that_the_table_does_not_know_is_refused() -> None:
    with pytest.raises(AssertionError, match="succeeded -> queued"):
        moves.move(None, 1, JobState.SUCCEEDED, JobState.QUEUED)  # type: ignore[arg-type]


def test_the_drawing_of_the_states_is_the_table() -> None:
    """In docs/architecture.md, as mermaid."""
    text = (REPOSITORY / "docs" / "architecture.md").read_text("utf-8")
    names = "|".join(JobState)
    drawn = set(re.findall(rf"^\s*({names}) --> ({names})\b", text, re.MULTILINE))
    assert drawn == {(state, after) for state, next_ in TRANSITIONS.items() for after in next_}
