"""Products in fp8: each token has a scale of its own, and so has each output channel's weights."""

# B batch, L tokens, M = B * L, I in features, O out features

import enum
import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from models import fusion

LARGEST = 448.0  # of float8_e4m3fn
CAPABILITY = (8, 9)  # Ada and Hopper are the first with fp8 tensor cores
MULTIPLE = 16  # of both features, which torch's kernel asks for


class Coded(NamedTuple):
    """Tokens as they go into a product in fp8: about codes * scale."""

    codes: Tensor
    """[B, L, I], float8_e4m3fn."""
    scale: Tensor
    """[B, L, 1], fp32."""
    whole: Tensor | None
    """The tokens themselves, where some layer has a LoRA beside its product."""


Tokens = Tensor | Coded


class Form(enum.Enum):
    """In which form layers want their tokens."""

    WHOLE = "whole"
    CODES = "codes"
    BOTH = "both"


class Linear(nn.Module):
    """A linear layer that may compute in fp8: `forward` then takes `Coded` as well."""

    def computes_in_fp8(self, x_BLI: Tensor) -> bool:
        raise NotImplementedError

    @property
    def has_lora(self) -> bool:
        raise NotImplementedError


def wanted(like_BLI: Tensor, *layers: nn.Module) -> Form:
    """By layers that are to be given the same tokens, in dtype and place those of `like`."""
    in_fp8 = [
        layer for layer in layers if isinstance(layer, Linear) and layer.computes_in_fp8(like_BLI)
    ]
    if len(in_fp8) < len(layers):
        return Form.WHOLE
    return Form.BOTH if any(layer.has_lora for layer in in_fp8) else Form.CODES


def in_form(x_BLI: Tensor, form: Form) -> Tokens:
    """The last link of a chain."""
    if form is Form.WHOLE:
        return x_BLI
    scale_BL1 = row_scale(x_BLI, LARGEST)
    whole_BLI = x_BLI if form is Form.BOTH else None
    return Coded(encode(x_BLI, scale_BL1), scale_BL1, whole_BLI)


@fusion.chain
def coded(x_BLI: Tensor, form: Form) -> Tokens:
    """Where no chain comes before a product."""
    return in_form(x_BLI, form)


@fusion.chain
def gelu_coded(x_BLI: Tensor, form: Form) -> Tokens:
    return in_form(functional.gelu(x_BLI, approximate="tanh"), form)


def row_scale(rows: Tensor, largest_code: float) -> Tensor:
    """fp32 [..., 1]: under it a row's largest value takes the largest code."""
    largest = rows.abs().amax(dim=-1, keepdim=True).float()
    # A row of zeros has codes of zero under any scale.
    return torch.where(largest > 0, largest / largest_code, 1.0)


def encode(values: Tensor, scale: Tensor) -> Tensor:
    return (values.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def product(x: Coded, codes_OI: Tensor, scale_O1: Tensor, bias_O: Tensor | None) -> Tensor:
    """x W^T + b in bf16.

    Sums are kept in the tensor cores' registers, of 22 bits: a row-wise product that adds them up
    in fp32 every 128 elements is slower than bf16 on Hopper (pytorch/pytorch#147971), and what it
    saves in error is small beside that of the codes.
    """
    row_wise = functional.ScalingType.RowWise
    y_MO: Tensor = functional.scaled_mm(
        x.codes.flatten(0, -2),
        codes_OI.t(),
        x.scale.flatten(0, -2),
        row_wise,
        scale_O1.expand(codes_OI.shape[0], 1).t().contiguous(),
        row_wise,
        bias=None if bias_O is None else bias_O.to(torch.bfloat16),
        output_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return y_MO.view(*x.codes.shape[:-1], -1)


@functools.cache
def has_product(device: torch.device) -> bool:
    """Whether the device multiplies fp8 matrices; elsewhere weights are dequantized first."""
    if device.type != "cuda":
        return False
    return torch.cuda.get_device_capability(device) >= CAPABILITY
