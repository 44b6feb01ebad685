"""LoRAs that are trained: several on one frozen network, one of them switched on at a time."""

# B batch, L tokens, I in features, O out features, R rank

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.distillation import draws, method

MARK = ".adapters."  # between the native name of a layer and the parts of its LoRAs


class Switch:
    """Which LoRA a network computes with."""

    def __init__(self) -> None:
        self.on: str | None = None

    @contextlib.contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        before, self.on = self.on, name
        try:
            yield
        finally:
            self.on = before


class Adapter(nn.Module):
    """scale * up @ down, in fp32; `up` is zero at first, so nothing changes."""

    def __init__(self, layer: nn.Linear, tuning: method.Tuning, generator: torch.Generator) -> None:
        super().__init__()
        device, shape = layer.weight.device, (tuning.rank, layer.in_features)
        if device.type == "meta":  # to be counted
            down_RI = torch.empty(shape, device=device)
        else:
            down_RI = torch.randn(shape, generator=generator) / tuning.rank
        self.down = nn.Parameter(down_RI.to(device))
        self.up = nn.Parameter(torch.zeros(layer.out_features, tuning.rank, device=device))
        self.scale = tuning.scale

    def forward(self, x: Tensor) -> Tensor:
        small = functional.linear(x, self.down.to(x.dtype))
        # The scale goes to the few numbers in the middle, not to all that come out.
        return functional.linear(self.scale * small, self.up.to(x.dtype))


class AdaptedLinear(nn.Linear):
    """A frozen Linear with the LoRA that is switched on beside it."""

    adapters: nn.ModuleDict
    switch: Switch

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        on = self.switch.on
        if on is None or on not in self.adapters:
            return y
        added: Tensor = self.adapters[on](x)
        return y + added


def add(network: nn.Module, name: str, tuning: method.Tuning, *, seed: int) -> Switch:
    """Give the blocks' layers that `tuning.targets` names a LoRA called `name`; freeze the rest.

    Raises ValueError for a target that no layer of the blocks has.
    """
    layers = _targeted(network, tuning.targets)
    switch = next((layer.switch for layer in layers if isinstance(layer, AdaptedLinear)), Switch())
    for number, layer in enumerate(layers):
        adapted = layer if isinstance(layer, AdaptedLinear) else _adapted(layer, switch)
        generator = draws.for_weights(seed, number)
        adapted.adapters[name] = Adapter(layer, tuning, generator)
    return switch


def _adapted(layer: nn.Linear, switch: Switch) -> AdaptedLinear:
    """The very layer, so that its weight and bias keep their native names."""
    layer.requires_grad_(False)
    layer.__class__ = AdaptedLinear
    assert isinstance(layer, AdaptedLinear)
    layer.adapters = nn.ModuleDict()
    layer.switch = switch
    return layer


def _targeted(network: nn.Module, targets: tuple[str, ...]) -> list[nn.Linear]:
    found: dict[str, nn.Linear] = {}
    for target in targets:
        of_target = {
            name: layer
            for name, layer in network.named_modules()
            if name.startswith("blocks.")
            and name.endswith(f".{target}")
            and isinstance(layer, nn.Linear)
        }
        if not of_target:
            raise ValueError(f"targets must name layers of the blocks, {target!r} is none")
        found |= of_target
    return [found[name] for name in sorted(found)]


def parameters_of(network: nn.Module, name: str) -> dict[str, nn.Parameter]:
    """The LoRA's parameters by native layer: `blocks.0.self_attn.q.down` and `.up`."""
    mark = f"{MARK}{name}."
    return {
        full.replace(mark, "."): parameter
        for full, parameter in network.named_parameters()
        if mark in full
    }
