"""Forwards and backwards as CUDA graphs: a tiny network takes longer to launch than to run."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from models.distillation import adapters, roles


def make_all(nets: roles.Roles) -> None:
    """Let every network of these replay, where it is on a CUDA device."""
    for role in (nets.student, nets.teacher, nets.critic):
        make(role.network, role.switch)


def make(network: nn.Module, switch: adapters.Switch | None = None) -> None:
    """Let the network replay its forwards on a CUDA device; anywhere else nothing changes."""
    on_cuda = next(network.parameters()).is_cuda
    if on_cuda and not isinstance(network.forward, Replay):
        network.forward = Replay(network, network.forward, switch)


class Replay:
    """A forward that captures itself once for each kind of call, and is checked before it is used.

    Weights may change in place, not be replaced. What asks for a gradient of its inputs is computed
    as usual.
    """

    def __init__(
        self,
        network: nn.Module,
        plain: Callable[..., Tensor],
        switch: adapters.Switch | None,
    ) -> None:
        self._network = network
        self._plain = plain
        self._switch = switch
        self._captured: dict[Any, Callable[..., Tensor]] = {}
        self._turns: dict[Any, int] = {}

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        given = tuple(tensor for tensor in inputs if tensor is not None)
        if any(tensor.requires_grad for tensor in given):
            return self._plain(*given)
        call = self._captured_for(given)
        return self._plain(*given) if call is self._plain else call(*given).clone()

    def _captured_for(self, given: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        lora = None if self._switch is None else self._switch.on
        kind: Any = (lora, torch.is_grad_enabled(), tuple(tensor.shape for tensor in given))
        if torch.is_grad_enabled():
            # A second forward must not overwrite what the first one's backward needs.
            turn = self._turns[kind] = 1 - self._turns.get(kind, 0)
            kind = (*kind, turn)
        if kind not in self._captured:
            self._captured[kind] = self._capture(given)
        return self._captured[kind]

    def _capture(self, given: tuple[Tensor, ...]) -> Callable[..., Tensor]:
        sample = tuple(tensor.detach().clone() for tensor in given)
        self._network.forward = self._plain
        try:
            torch.cuda.make_graphed_callables(self._network, sample, allow_unused_input=True)
            captured: Callable[..., Tensor] = self._network.forward
            self._network.forward = self._plain
            return captured if self._is_equal(captured, sample) else self._plain
        except RuntimeError:  # of an operation that no graph may hold
            return self._plain
        finally:
            self._network.forward = self

    def _is_equal(self, captured: Callable[..., Tensor], sample: tuple[Tensor, ...]) -> bool:
        """To the bit: the kernels are the same ones."""
        ours, theirs = captured(*sample), self._plain(*sample)
        if not torch.equal(ours, theirs):
            return False
        if not theirs.requires_grad:
            return True
        trained = [weight for weight in self._network.parameters() if weight.requires_grad]
        weights = torch.randn_like(theirs)
        found, wanted = (
            torch.autograd.grad((made * weights).sum(), trained, allow_unused=True)
            for made in (ours, theirs)
        )
        pairs = zip(found, wanted, strict=True)
        return all(b is None or (a is not None and torch.equal(a, b)) for a, b in pairs)
