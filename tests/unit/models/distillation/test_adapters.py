"""LoRAs that are trained beside their layers."""

import pytest
import torch
from torch import nn

from models.distillation import adapters, method


def test_a_lora_begins_small_and_changes_nothing() -> None:
    """Its first half as PEFT's "gaussian" draws it, the second zero."""
    layer = nn.Linear(256, 64)
    made = adapters.Adapter(layer, method.student_tuning("lora", rank=16), torch.Generator())
    assert made.down.std().item() == pytest.approx(1 / 16, rel=0.05)
    x = torch.randn(3, 256)
    assert torch.equal(made(x), torch.zeros(3, 64))
