"""Which of the jobs that could be sent goes first. Pure: no database, no clock.

Priority decides first. Then owners take turns, the one that has waited longest first, and among an
owner's batches likewise. Weights that are loaded may change this order within bounds: a run of jobs
for the same weights goes on until somebody has waited for too long.
"""

import itertools
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

LOOK_AHEAD = 32  # jobs that may be looked at for weights that are loaded already
OVERTAKEN_BY = 4 * LOOK_AHEAD  # ids; then it is a job's turn, whatever is loaded
PATIENCE_SECONDS = 120.0  # a batch waits this long for each kind of weights before its own turn


@dataclass(frozen=True, kw_only=True, slots=True)
class Lane:
    """The queued jobs of one batch in one queue."""

    batch_id: str
    owner: str
    queue: str
    rank: int
    """Of its most urgent job; lower goes first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """A job that may be sent now."""

    id: int
    batch_id: str
    owner: str
    queue: str
    rank: int
    weights: str
    """What its worker must have loaded; equal for jobs that need no switch between them."""


@dataclass(frozen=True, kw_only=True)
class Waits:
    """Seconds since somebody was last served, or since they came if they never were."""

    owners: Mapping[str, float]
    batches: Mapping[str, float]


class _Owned(Protocol):
    @property
    def owner(self) -> str: ...
    @property
    def batch_id(self) -> str: ...


T = TypeVar("T")
O = TypeVar("O", bound=_Owned)  # noqa: E741  # an owned thing


def shares(lanes: Sequence[Lane], waits: Waits, *, number: int) -> dict[Lane, int]:
    """How many of the next `number` jobs come from each lane, those first whose turn it is."""
    turns = in_turn(lanes, waits, endless=True)
    return dict(Counter(itertools.islice(turns, number)))


def arrange(
    candidates: Iterable[Candidate], waits: Waits, *, running: str | None
) -> list[Candidate]:
    """In the order in which they are sent; `running` are the weights of the job sent last."""
    ordered: list[Candidate] = []
    by_rank = sorted(candidates, key=lambda job: (job.rank, job.id))
    for _, equals in itertools.groupby(by_rank, key=lambda job: job.rank):
        ordered += _in_runs(list(in_turn(equals, waits)), waits, running)
    return ordered


def in_turn(things: Iterable[O], waits: Waits, *, endless: bool = False) -> Iterator[O]:
    """Owners take turns, within an owner its batches, within a batch the order given."""
    owners: dict[str, dict[str, list[O]]] = {}
    for thing in things:
        owners.setdefault(thing.owner, {}).setdefault(thing.batch_id, []).append(thing)

    def of_owner(name: str) -> Iterator[O]:
        batches = owners[name]
        longest_first = sorted(batches, key=lambda batch_id: (-waits.batches[batch_id], batch_id))
        in_batch = itertools.cycle if endless else iter
        return _round_robin([in_batch(batches[batch_id]) for batch_id in longest_first])

    longest_first = sorted(owners, key=lambda name: (-waits.owners[name], name))
    return _round_robin([of_owner(name) for name in longest_first])


def _round_robin(those: Iterable[Iterator[T]]) -> Iterator[T]:
    waiting = deque(those)
    while waiting:
        turn = waiting.popleft()
        for thing in turn:
            yield thing
            waiting.append(turn)
            break


def _in_runs(jobs: Sequence[Candidate], waits: Waits, running: str | None) -> list[Candidate]:
    """Jobs of one rank, given in turn: those for one kind of weights after each other."""
    kinds = list(dict.fromkeys(job.weights for job in jobs))
    first = _kind_to_go_on_with(jobs, waits, running)
    if first is not None:
        kinds.sort(key=lambda kind: kind != first)
    newest: dict[str, int] = {}
    for job in jobs:
        newest[job.batch_id] = max(newest.get(job.batch_id, 0), job.id)

    def place(job: Candidate) -> tuple[bool, int]:
        was_overtaken = newest[job.batch_id] - job.id > OVERTAKEN_BY
        return (not was_overtaken, kinds.index(job.weights))

    return sorted(jobs, key=place)  # stable: within a kind they stay in turn


def _kind_to_go_on_with(jobs: Sequence[Candidate], waits: Waits, running: str | None) -> str | None:
    """The weights that run, unless a batch that needs others has waited for too long."""
    served = {job.batch_id for job in jobs if job.weights == running}
    passed_over = [job for job in jobs if job.batch_id not in served]
    patience = PATIENCE_SECONDS * max(1, len({job.weights for job in passed_over}))
    due = (job for job in passed_over if waits.batches[job.batch_id] > patience)
    return next((job.weights for job in due), running)
