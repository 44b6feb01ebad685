"""What torch's compiler makes of a function at full size: nothing is allocated, nothing runs.

The function is traced on fake tensors and lowered by Inductor for the CPU up to its scheduler,
which has then decided what is one kernel. A kernel's bytes are Inductor's own count (the same as in
its `metrics.num_bytes_accessed`): each buffer that it reads and each that it writes, once, as large
as it is; what is used up inside a kernel counts nothing. That a chain is one kernel on a GPU too is
taken from here, not seen: Triton's scheduler joins reductions with what follows by the same rules.
One rule is a processor's alone, to keep what is costly to compute twice, and is switched off.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._inductor import config as inductor
from torch._inductor import ir
from torch._inductor.compile_fx import compile_fx
from torch._inductor.graph import GraphLowering
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Kernel:
    """One kernel of generated code, or one call into a library."""

    num_bytes: int
    is_library_call: bool


class _Scheduled(BaseException):
    """Ends the compilation where code would be built."""


def kernels(function: Callable[..., Any], args: Sequence[Any]) -> list[Kernel]:
    """Tensors among the arguments give shapes, strides and dtypes only."""
    found: list[Kernel] = []

    def stop(graph: Any) -> None:
        graph._update_scheduler()
        for node in graph.scheduler.nodes:
            if num_bytes := node.get_read_write_buffers_sizes():
                found.append(Kernel(num_bytes, node.is_extern()))
        raise _Scheduled

    with (
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
        torch.no_grad(),
        FakeTensorMode(),
        mock.patch.object(GraphLowering, "compile_to_module", stop),
        mock.patch.object(ir, "is_cpu", return_value=False),
        # As on a GPU, not as a processor computes eagerly.
        mock.patch.object(torch.compiler, "is_compiling", return_value=True),
        inductor.patch(force_disable_caches=True),
    ):
        tensors = [_fake(value) for value in args if isinstance(value, Tensor)]
        graph = make_fx(_of_tensors(function, args))(*tensors)
        try:
            compile_fx(graph, tensors)
        except _Scheduled:
            return found
    raise AssertionError("nothing was compiled")


def _fake(like: Tensor) -> Tensor:
    return torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device="cpu")


def _of_tensors(function: Callable[..., Any], args: Sequence[Any]) -> Callable[..., Any]:
    """With the other arguments filled in; results of any shape as one list."""

    def call(*tensors: Tensor) -> list[Any]:
        rest = iter(tensors)
        filled = (next(rest) if isinstance(value, Tensor) else value for value in args)
        return [leaf for leaf in tree_leaves(function(*filled)) if isinstance(leaf, Tensor)]

    return call
