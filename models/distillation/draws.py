"""Every random number of a training, from the seed and its place in it.

There is no state to keep: a number depends on the seed, the count of batches so far and the place
of its sample in the batch. So a training that is resumed, or spread over other devices, draws what
it would have drawn anyway.
"""

# B samples of this process

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_SAMPLE, _EXIT, _ORDER, _WEIGHTS, _PAIR = range(5)  # what a number is for


def _generators(count: int, seed: int, *place: int) -> list[torch.Generator]:
    words = np.random.SeedSequence([seed, *place]).generate_state(count, np.uint64)
    return [torch.Generator().manual_seed(word) for word in words.tolist()]


def _generator(seed: int, *place: int) -> torch.Generator:
    return _generators(1, seed, *place)[0]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which batch of a training this is, and which of its samples are this process's."""

    batch: int
    """Counted from the beginning, through student and critic updates."""
    first: int = 0
    size: int = 1
    total: int = 1
    """Samples of the batch in all processes."""


class Draws:
    """The random numbers of one batch. Each sample has its own, on the CPU, in fp32."""

    def __init__(self, seed: int, place: Place) -> None:
        self._shared = _generator(seed, _EXIT, place.batch)
        every = _generators(place.first + place.size, seed, _SAMPLE, place.batch)
        self._own = every[place.first :]

    def exit_step(self, num_steps: int) -> int:
        """The step that is trained, evenly from 0 to num_steps - 1, one for all processes."""
        return int(torch.randint(num_steps, (), generator=self._shared))

    def normal(self, shape: Sequence[int]) -> Tensor:
        """[B, *shape]"""
        return torch.stack([torch.randn(*shape, generator=own) for own in self._own])

    def integers(self, high: int) -> Tensor:
        """[B], evenly from 0 to high - 1."""
        return torch.stack([torch.randint(high, (), generator=own) for own in self._own])


def examples_of(seed: int, place: Place, num_examples: int) -> list[int]:
    """Which examples make this batch: all of them once in a random order, then in another one."""
    first = place.batch * place.total + place.first
    found: list[int] = []
    order: list[int] = []
    for number in range(first, first + place.size):
        epoch, position = divmod(number, num_examples)
        if not order or position == 0:
            generator = _generator(seed, _ORDER, epoch)
            order = torch.randperm(num_examples, generator=generator).tolist()
        found.append(order[position])
    return found


def for_weights(seed: int, number: int) -> torch.Generator:
    """For the first values of LoRA number `number`."""
    return _generator(seed, _WEIGHTS, number)


def for_pair(seed: int, number: int) -> torch.Generator:
    """For the noise that the teacher answers."""
    return _generator(seed, _PAIR, number)
