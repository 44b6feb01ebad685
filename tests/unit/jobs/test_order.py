"""Who goes first: priority, then turns, then weights within bounds."""

import itertools
from collections import Counter
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from jobs import order


def waits(owners: dict[str, float], batches: dict[str, float]) -> order.Waits:
    return order.Waits(owners=owners, batches=batches)


def job(
    number: int, *, batch: str = "b", owner: str = "o", rank: int = 0, weights: str = "w"
) -> order.Candidate:
    return order.Candidate(
        id=number, batch_id=batch, owner=owner, queue="q", rank=rank, weights=weights
    )


def ids(jobs: Sequence[order.Candidate]) -> list[int]:
    return [one.id for one in jobs]


ONE = waits({"o": 0}, {"b": 0})


def test_priority_goes_before_turns_and_warm_weights() -> None:
    jobs = [job(1, weights="warm"), job(9, rank=-5, weights="cold")]
    assert ids(order.arrange(jobs, ONE, running="warm")) == [9, 1]


def test_a_batch_keeps_its_order() -> None:
    assert ids(order.arrange([job(3), job(1), job(2)], ONE, running=None)) == [1, 2, 3]


def test_owners_take_turns_whatever_the_size_and_number_of_their_batches() -> None:
    many = [job(n, owner="many", batch=f"m{n}") for n in range(50)]
    one = [job(100 + n, owner="one", batch="only") for n in range(50)]
    waiting = waits({"many": 5, "one": 3}, {f"m{n}": 900 - n for n in range(50)} | {"only": 1})
    first = order.arrange([*many, *one], waiting, running="w")[:20]
    assert Counter(one.owner for one in first) == {"many": 10, "one": 10}
    assert ids(first)[:4] == [0, 100, 1, 101]


def test_who_was_served_least_recently_goes_first() -> None:
    jobs = [job(1, owner="a", batch="a1"), job(2, owner="b", batch="b1")]
    batches = {"a1": 10.0, "b1": 10.0}
    assert ids(order.arrange(jobs, waits({"a": 1, "b": 2}, batches), running="w")) == [2, 1]
    assert ids(order.arrange(jobs, waits({"a": 2, "b": 1}, batches), running="w")) == [1, 2]


def test_where_nothing_is_loaded_the_weights_of_whose_turn_it_is_go_first() -> None:
    jobs = [
        job(1, owner="a", batch="a1", weights="one"),
        job(2, owner="b", batch="b1", weights="other"),
    ]
    batches = {"a1": 10.0, "b1": 10.0}
    assert ids(order.arrange(jobs, waits({"a": 1, "b": 2}, batches), running=None)) == [2, 1]
    assert ids(order.arrange(jobs, waits({"a": 2, "b": 1}, batches), running=None)) == [1, 2]


def test_a_run_of_warm_jobs_goes_on_until_another_batch_has_waited_long_enough() -> None:
    jobs = [job(1, owner="a", batch="a1", weights="cold"), job(2, owner="b", batch="b1")]
    short = waits({"a": 50, "b": 0}, {"a1": order.PATIENCE_SECONDS - 1, "b1": 0})
    long = waits({"a": 50, "b": 0}, {"a1": order.PATIENCE_SECONDS + 1, "b1": 0})
    assert ids(order.arrange(jobs, short, running="w")) == [2, 1]
    assert ids(order.arrange(jobs, long, running="w")) == [1, 2]


def test_a_batch_waits_longer_where_more_kinds_of_weights_take_turns() -> None:
    """Else ten kinds would mean a switch per job."""
    cold = [job(n, batch=f"c{n}", weights=f"cold{n}") for n in range(3)]
    batches = {f"c{n}": 2 * order.PATIENCE_SECONDS for n in range(3)} | {"b": 0.0}
    one_kind = order.arrange([cold[0], job(9)], waits({"o": 0}, batches), running="w")
    three = order.arrange([*cold, job(9)], waits({"o": 0}, batches), running="w")
    assert (one_kind[0].id, three[0].id) == (0, 9)


def test_jobs_of_one_batch_are_sent_in_runs_of_the_same_weights() -> None:
    jobs = [job(n, weights="ab"[n % 2]) for n in range(8)]
    assert ids(order.arrange(jobs, ONE, running="b")) == [1, 3, 5, 7, 0, 2, 4, 6]
    assert ids(order.arrange(jobs, ONE, running=None)) == [0, 2, 4, 6, 1, 3, 5, 7]


def test_no_job_is_overtaken_for_ever_within_its_batch() -> None:
    lonely = job(1, weights="rare")
    flood = [job(n, weights="w") for n in range(2, 3 + order.OVERTAKEN_BY)]
    near, far = flood[: order.LOOK_AHEAD], flood[-order.LOOK_AHEAD :]
    assert order.arrange([lonely, *near], ONE, running="w")[0] is near[0]
    assert order.arrange([lonely, *far], ONE, running="w")[0] is lonely


def test_two_equal_owners_with_different_weights_share_the_time_in_few_runs() -> None:
    """An hour on one device, 14 s a job: equal within 5 %, and a switch every two minutes."""
    seconds, now = 14.0, 0.0
    served = {"a": 0.0, "b": 0.0}
    jobs = {
        name: [job(n, owner=name, batch=name, weights=name) for n in range(300)] for name in "ab"
    }
    sent: list[order.Candidate] = []
    while now < 3600:
        waited = {name: now - moment for name, moment in served.items()}
        looked_at = [*jobs["a"][: order.LOOK_AHEAD], *jobs["b"][: order.LOOK_AHEAD]]
        running = sent[-1].weights if sent else None
        first = order.arrange(looked_at, waits(waited, waited), running=running)[0]
        jobs[first.owner].remove(first)
        served[first.owner] = now
        sent.append(first)
        now += seconds
    counts = Counter(one.owner for one in sent)
    switches = sum(then.weights != one.weights for then, one in itertools.pairwise(sent))
    assert abs(counts["a"] - counts["b"]) <= 0.05 * len(sent)
    assert switches <= 3600 / order.PATIENCE_SECONDS + 3


def test_shares_follow_the_turns() -> None:
    lanes = [
        order.Lane(batch_id=name, owner=owner, queue="q", rank=0)
        for name, owner in (("a1", "a"), ("a2", "a"), ("b1", "b"))
    ]
    waiting = waits({"a": 2, "b": 1}, {"a1": 1, "a2": 3, "b1": 0})
    assert order.shares(lanes, waiting, number=8) == {lanes[1]: 2, lanes[2]: 4, lanes[0]: 2}
    assert list(order.shares(lanes, waiting, number=1)) == [lanes[1]]
    assert order.shares([], waiting, number=5) == {}


@given(
    st.lists(
        st.tuples(
            st.sampled_from("xyz"), st.integers(0, 3), st.integers(-2, 2), st.sampled_from("vw")
        ),
        max_size=40,
    ),
    st.sampled_from([None, "v", "w", "u"]),
)
def test_arranging_loses_nothing_and_keeps_priorities(
    drawn: list[tuple[str, int, int, str]], running: str | None
) -> None:
    jobs = [
        job(n, owner=owner, batch=f"{owner}{batch}", rank=rank, weights=weights)
        for n, (owner, batch, rank, weights) in enumerate(drawn)
    ]
    waiting = waits(
        {one.owner: n * 7.0 % 200 for n, one in enumerate(jobs)},
        {one.batch_id: n * 11.0 % 300 for n, one in enumerate(jobs)},
    )
    arranged = order.arrange(jobs, waiting, running=running)
    assert sorted(ids(arranged)) == sorted(ids(jobs))
    assert [one.rank for one in arranged] == sorted(one.rank for one in jobs)
