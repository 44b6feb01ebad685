"""What a student is trained on: prompts, and for image-to-video their first frames. No videos."""

# N examples, B batch, C channels, T H W latent frames, rows, columns, S text tokens, I image
# tokens, G width of text or image tokens

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from models import conditioning


@dataclass(frozen=True)
class Batch:
    """Some examples on one device."""

    context_BSG: Tensor  # noqa: N815  # named by its axes, as everywhere
    negative_BSG: Tensor  # noqa: N815
    """What guidance leads away from, for each of them."""
    condition: conditioning.Condition | None

    def __getitem__(self, rows: Tensor) -> "Batch":
        """Some of them. `rows`: int64 [B]."""
        condition = None if self.condition is None else self.condition[rows]
        return Batch(self.context_BSG[rows], self.negative_BSG[rows], condition)


class Examples(Protocol):
    """Where batches come from."""

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """C, T, H, W of every example."""

    def __len__(self) -> int: ...

    def batch(self, places: Sequence[int], device: torch.device) -> Batch: ...


class MemoryExamples:
    """Examples that fit into memory, encoded already."""

    def __init__(
        self,
        contexts_NSG: Tensor,
        negative_1SG: Tensor,
        *,
        latent_shape: tuple[int, int, int, int],
        y_NCTHW: Tensor | None = None,
        image_tokens_NIG: Tensor | None = None,
    ) -> None:
        assert image_tokens_NIG is None or y_NCTHW is not None
        self._contexts = contexts_NSG
        self._negative = negative_1SG
        self._y = y_NCTHW
        self._image_tokens = image_tokens_NIG
        self.latent_shape = latent_shape

    def __len__(self) -> int:
        return len(self._contexts)

    def batch(self, places: Sequence[int], device: torch.device) -> Batch:
        chosen = torch.tensor(places)

        def of(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[chosen].to(device)

        y_BCTHW = of(self._y)
        context_BSG = of(self._contexts)
        assert context_BSG is not None
        condition = (
            None if y_BCTHW is None else conditioning.Condition(y_BCTHW, of(self._image_tokens))
        )
        negative = self._negative.to(device).expand_as(context_BSG)
        return Batch(context_BSG, negative, condition)
