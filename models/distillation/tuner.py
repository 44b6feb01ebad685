"""One trained network with its optimizer: gradients are clipped, checked, and applied."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from models.distillation import method, roles

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


class DivergedError(Exception):
    """A gradient is no longer a finite number."""

    def __init__(self, who: str, update: int) -> None:
        super().__init__(
            f"the gradient of the {who} is not finite in update {update}; nothing of it was kept. "
            "Go on from the last checkpoint with a smaller learning rate"
        )
        self.who = who
        self.update = update


class Tuner:
    """AdamW on the trained weights of one role."""

    def __init__(self, role: roles.Role, tuning: method.Tuning) -> None:
        assert role.trained, "a role without trained weights is not tuned"
        self.trained = dict(role.trained)
        self._clip = tuning.clip
        self._optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=tuning.learning_rate,
            betas=tuning.betas,
            weight_decay=tuning.weight_decay,
        )
        for weight in self.trained.values():
            # As AdamW does at its first step; made now, so that a checkpoint has where to go.
            self._optimizer.state[weight] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(weight),
                "exp_avg_sq": torch.zeros_like(weight),
            }

    def step(self) -> float:
        """Apply the gradients and forget them; their norm before clipping, maybe not finite.

        Nothing is applied where it is not finite.
        """
        norm = _norm_of(nn.utils.clip_grad_norm_(self.trained.values(), self._clip))
        if math.isfinite(norm):
            self._optimizer.step()
        self.forget()
        return norm

    def forget(self) -> None:
        """Drop gradients."""
        self._optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Weights and moments by name, to be saved, or to be loaded into."""
        for name, weight in self.trained.items():
            yield f"weight.{name}", weight.detach()
            for moment in MOMENTS:
                yield f"{moment}.{name}", self._optimizer.state[weight][moment]


def _norm_of(norm: Tensor) -> float:
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
