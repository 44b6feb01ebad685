"""Gradient checkpointing: of each block only the input is kept, the rest is computed again."""

from typing import Any

import torch
from torch import nn
from torch.utils import checkpoint

from models.distillation import adapters


def checkpoint_blocks(network: nn.Module, switch: adapters.Switch | None) -> None:
    """Let the blocks of a transformer compute twice instead of remembering.

    The LoRA that was on in the forward is on again when it is repeated.
    """
    for block in network.blocks:  # type: ignore[union-attr]  # a ModuleList
        _checkpoint(block, switch)


def _checkpoint(block: nn.Module, switch: adapters.Switch | None) -> None:
    plain = block.forward

    def forward(*arguments: Any) -> Any:
        if not torch.is_grad_enabled():
            return plain(*arguments)
        name = None if switch is None else switch.on

        def again(*same: Any) -> Any:
            if switch is None:
                return plain(*same)
            with switch.using(name):
                return plain(*same)

        # Nothing in a block is random.
        return checkpoint.checkpoint(
            again, *arguments, use_reentrant=False, preserve_rng_state=False
        )

    block.forward = forward
