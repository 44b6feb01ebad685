"""One forward by several processes: each holds some of the tokens, or all of them by some heads.

Nearly everything in the transformer works token by token, so each process computes its share of
them. Attention among tokens needs all: before it, processes exchange tokens for heads, and back
after it (DeepSpeed-Ulysses, https://arxiv.org/abs/2309.14509). Text and image tokens are held by
all; attention to them needs no exchange. Each process holds all weights, as without it.

A process that is gone ends the forward of the others: by an error at once (gloo), or when the time
limit of the group is over (NCCL). Nothing is computed with what has not come.
"""

# B batch, L tokens, l those of this process, N heads, n those of this process, K head dim,
# R processes, D width

import itertools
from typing import Protocol

import einops
import torch
from torch import Tensor, distributed

from models import attention, rope


class ExchangeError(RuntimeError):
    """Another process is gone, or the way to it."""


class Tokens(Protocol):
    """Which tokens of a video this process computes."""

    num_processes: int
    """Those that compute them all."""

    def check(self, num_heads: int) -> None:
        """Raises ValueError where so many heads cannot be shared."""

    def split(self, x_BLD: Tensor, rotation: rope.Rotation) -> tuple[Tensor, rope.Rotation]:
        """Its own of all tokens, and their rotation."""

    def attend(self, q_BlNK: Tensor, k_BlNK: Tensor, v_BlNK: Tensor) -> Tensor:
        """Its own tokens' attention to all tokens: [B, l, N, K]."""

    def join(self, x_BlD: Tensor) -> Tensor:
        """All tokens, from everybody's own."""


class AllTokens:
    """One process alone."""

    num_processes = 1

    def check(self, num_heads: int) -> None:
        """Any number will do."""

    def split(self, x_BLD: Tensor, rotation: rope.Rotation) -> tuple[Tensor, rope.Rotation]:
        return x_BLD, rotation

    def attend(self, q_BLNK: Tensor, k_BLNK: Tensor, v_BLNK: Tensor) -> Tensor:
        return attention.attend(q_BLNK, k_BLNK, v_BLNK)

    def join(self, x_BLD: Tensor) -> Tensor:
        return x_BLD


class SharedTokens:
    """As many shares, in order of rank, as torch.distributed has processes.

    All of them call the same networks with equal inputs, in the same order. Shares differ by one
    token where the number cannot be divided: nothing is padded. Not for training.
    """

    def __init__(self) -> None:
        self.num_processes = distributed.get_world_size()
        self.rank = distributed.get_rank()
        self._lengths: list[int] = []

    def check(self, num_heads: int) -> None:
        if num_heads % self.num_processes:
            fitting = [count for count in range(1, num_heads + 1) if num_heads % count == 0]
            raise ValueError(
                f"{num_heads} heads cannot be shared by {self.num_processes} processes; "
                f"{', '.join(map(str, fitting))} could"
            )

    def split(self, x_BLD: Tensor, rotation: rope.Rotation) -> tuple[Tensor, rope.Rotation]:
        self._lengths = lengths(x_BLD.shape[1], self.num_processes)
        start = sum(self._lengths[: self.rank])
        mine = slice(start, start + self._lengths[self.rank])
        cos_LK, sin_LK = rotation
        return x_BLD[:, mine].contiguous(), (cos_LK[mine], sin_LK[mine])

    def attend(self, q_BlNK: Tensor, k_BlNK: Tensor, v_BlNK: Tensor) -> Tensor:
        q_BLnK, k_BLnK, v_BLnK = map(self._tokens_for_heads, (q_BlNK, k_BlNK, v_BlNK))
        return self._heads_for_tokens(attention.attend(q_BLnK, k_BLnK, v_BLnK))

    def join(self, x_BlD: Tensor) -> Tensor:
        x_lBD = x_BlD.transpose(0, 1)
        return self._received(x_lBD.repeat(self.num_processes, 1, 1)).transpose(0, 1)

    def _tokens_for_heads(self, x_BlNK: Tensor) -> Tensor:
        for_each = einops.rearrange(x_BlNK, "b l (r n) k -> (r l) b n k", r=self.num_processes)
        return self._received(for_each).transpose(0, 1)

    def _heads_for_tokens(self, x_BLnK: Tensor) -> Tensor:
        x_LBnK = x_BLnK.transpose(0, 1).contiguous()
        sizes = [self._lengths[self.rank]] * self.num_processes
        received = x_LBnK.new_empty(sum(sizes), *x_LBnK.shape[1:])
        self._exchange(received, x_LBnK, sizes, self._lengths)
        return einops.rearrange(received, "(r l) b n k -> b l (r n) k", r=self.num_processes)

    def _received(self, for_each: Tensor) -> Tensor:
        """Everybody's rows for this process, of all tokens, for its own for everybody."""
        sent = [self._lengths[self.rank]] * self.num_processes
        received = for_each.new_empty(sum(self._lengths), *for_each.shape[1:])
        self._exchange(received, for_each.contiguous(), self._lengths, sent)
        return received

    def _exchange(
        self, received: Tensor, sent: Tensor, to_come: list[int], to_go: list[int]
    ) -> None:
        assert not (torch.is_grad_enabled() and sent.requires_grad), "gradients would be lost"
        try:
            distributed.all_to_all_single(received, sent, to_come, to_go)
        except RuntimeError as error:
            raise ExchangeError(f"processes that share a video lost each other: {error}") from error


def lengths(num_tokens: int, num_processes: int) -> list[int]:
    """Of each share; those that are longer by one come first."""
    if num_tokens < num_processes:
        raise ValueError(f"{num_tokens} tokens are too few for {num_processes} processes")
    ends = [-(-num_tokens * number // num_processes) for number in range(num_processes + 1)]
    return [end - start for start, end in itertools.pairwise(ends)]
