"""Attention over tokens: the one place where a kernel is chosen.

torch has several kernels; which of them computes depends on the device, the versions and the shape.
On Hopper and later cuDNN's is the fastest by far, and wrong below 9.15.1 where the number of tokens
is no multiple of 128, as with ours: it is not used then. FlashAttention-3 and -4 and SageAttention
are used where they are installed and asked for; Sage's pictures are others, it computes in 8 bits.
"""

# B batch, L query tokens, S key tokens, N heads, K head dim

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

CUDNN_IS_RIGHT = 91501  # 9.15.1: https://github.com/pytorch/pytorch/issues/169849
HOPPER = (9, 0)
OTHER_KERNELS = {
    "flash3": ("flash_attn_interface", "flash_attn_func", {}),
    "flash4": ("flash_attn.cute", "flash_attn_func", {}),
    "sage": ("sageattention", "sageattn", {"tensor_layout": "NHD"}),
}
"""Module, function and its arguments beside q, k and v, all three [B, L, N, K]."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What decides which of torch's kernels may compute."""

    capability: tuple[int, int] | None
    """None: no CUDA device."""
    cudnn: int | None


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Kernels in the order in which torch is to try them; none: as torch likes."""

    backends: tuple[SDPBackend, ...] = ()
    warning: str | None = None
    """Why it is not the fastest."""


def this_machine() -> Machine:
    if not torch.cuda.is_available():
        return Machine(capability=None, cudnn=None)
    version = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]  # torch's own
    return Machine(capability=torch.cuda.get_device_capability(), cudnn=version)


def choose(machine: Machine) -> Choice:
    if machine.capability is None:
        return Choice()
    others = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    if machine.capability < HOPPER:
        return Choice(backends=others)
    if machine.cudnn is not None and machine.cudnn >= CUDNN_IS_RIGHT:
        return Choice(backends=(SDPBackend.CUDNN_ATTENTION, *others))
    found = "no cuDNN" if machine.cudnn is None else f"cuDNN {machine.cudnn}"
    return Choice(
        backends=others,
        warning=f"{found} was found; below {CUDNN_IS_RIGHT} its attention is wrong for lengths "
        "that are no multiple of 128 and is not used: a step takes up to 40 % longer. Does "
        "LD_LIBRARY_PATH hide the cuDNN that came with torch?",
    )


class TorchKernels:
    """torch's own, in a given order; notes which one a shape was computed by."""

    def __init__(self, backends: Sequence[SDPBackend] = ()) -> None:
        self._backends = list(backends)
        self._names: dict[tuple[Any, ...], str] = {}

    @property
    def names(self) -> list[str]:
        """Of the kernels that ran."""
        return sorted(set(self._names.values()))

    def __call__(self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
        q_BNLK, k_BNSK, v_BNSK = (x.transpose(1, 2) for x in (q_BLNK, k_BSNK, v_BSNK))
        if not self._backends:
            return self._attend(q_BNLK, k_BNSK, v_BNSK).transpose(1, 2)
        with sdpa_kernel(self._backends, set_priority=True):
            return self._attend(q_BNLK, k_BNSK, v_BNSK).transpose(1, 2)

    def _attend(self, q_BNLK: Tensor, k_BNSK: Tensor, v_BNSK: Tensor) -> Tensor:
        key = (q_BNLK.shape, k_BNSK.shape, q_BNLK.dtype, q_BNLK.device, q_BNLK.requires_grad)
        if key not in self._names and not q_BNLK.is_meta:
            chosen = SDPBackend(torch._fused_sdp_choice(q_BNLK, k_BNSK, v_BNSK))
            self._names[key] = f"torch {chosen.name.lower().removesuffix('_attention')}"
        return functional.scaled_dot_product_attention(q_BNLK, k_BNSK, v_BNSK)


class OtherKernel:
    """A kernel from a package that rushes does not bring along."""

    def __init__(self, name: str) -> None:
        """Raises ImportError where its package is not installed."""
        module, function, options = OTHER_KERNELS[name]
        self._function = getattr(importlib.import_module(module), function)
        self._options = options
        self.names = [f"{module}.{function}"]

    def __call__(self, q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
        result = self._function(q_BLNK, k_BSNK, v_BSNK, **self._options)
        out_BLNK: Tensor = result[0] if isinstance(result, tuple) else result
        return out_BLNK


_kernel: TorchKernels | OtherKernel = TorchKernels()


def use(kernel: TorchKernels | OtherKernel) -> None:
    """What computes attention in this process from now on."""
    global _kernel
    _kernel = kernel


def names() -> list[str]:
    """Of the kernels that have computed so far."""
    return _kernel.names


def attend(q_BLNK: Tensor, k_BSNK: Tensor, v_BSNK: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(K)) v without a mask: [B, L, N, K] in the inputs' dtype."""
    return _kernel(q_BLNK, k_BSNK, v_BSNK)
