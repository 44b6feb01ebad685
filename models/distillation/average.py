"""The exponential moving average of a student's weights."""

from collections.abc import Mapping

import torch
from torch import nn


class Average:
    """From update `start` on: average <- decay * average + (1 - decay) * weights, in fp32."""

    def __init__(self, trained: Mapping[str, nn.Parameter], *, decay: float, start: int) -> None:
        self._trained = trained
        self._decay = decay
        self._start = start
        self.tensors = {name: weight.detach().clone() for name, weight in trained.items()}

    @torch.no_grad()
    def give(self) -> None:
        """Set the weights to their average."""
        for name, weight in self._trained.items():
            weight.copy_(self.tensors[name])

    @torch.no_grad()
    def restart(self) -> None:
        """Begin again from the weights."""
        for name, weight in self._trained.items():
            self.tensors[name].copy_(weight)

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """After student update number `updates`, counted from 1. Before `start` it is a copy."""
        decay = self._decay if updates > self._start else 0.0
        for name, weight in self._trained.items():
            self.tensors[name].lerp_(weight.detach(), 1 - decay)
