"""Counts what a network moves and how many operations it starts, on `meta`: nothing is computed.

Bytes are those of every operation's tensor inputs and outputs, each as large as its elements are,
whatever a cache would keep. Views move nothing. Products (matrix products, convolutions,
attention) are counted apart: what is left, `pointwise`, is what fusing can save. Attention and
`rms_norm` count as the one kernel that CUDA has for each; on `meta` torch takes them apart.
The chains of `models.fusion` count operation by operation, or, with `compiled=True`, as the kernels
that the compiler makes of them (`lowering`).
"""

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from benchmarks import holding, lowering
from models import fusion

PRODUCTS = ("mm", "bmm", "addmm", "_addmm_activation", "baddbmm", "convolution", "_scaled_mm_v2")
NO_MOVES = ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "detach")
OVERWRITING = ("copy_", "zero_", "fill_")  # do not read what they write to


class Traffic:
    """What was counted."""

    def __init__(self) -> None:
        self.operations = 0
        self.pointwise_bytes = 0
        self.product_bytes = 0
        self.by_operation: Counter[str] = Counter()
        """Bytes by name, products included."""

    @property
    def total_bytes(self) -> int:
        return self.pointwise_bytes + self.product_bytes

    def add(self, name: str, num_bytes: int, *, is_product: bool = False) -> None:
        self.operations += 1
        self.by_operation[name] += num_bytes
        if is_product:
            self.product_bytes += num_bytes
        else:
            self.pointwise_bytes += num_bytes


def count(run: Callable[[], object], *, compiled: bool = False) -> Traffic:
    """Call a function of tensors on `meta` and count what it does."""
    traffic = Traffic()
    with ExitStack() as modes:
        if compiled:
            modes.enter_context(fusion.running_with(_CompiledChains(traffic)))
        modes.enter_context(torch.no_grad())
        modes.enter_context(_Operations(traffic))
        modes.enter_context(_Kernels(traffic))
        run()
    return traffic


class _Operations(TorchDispatchMode):
    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in NO_MOVES:
            read = args[1:] if name in OVERWRITING else args
            inputs = {key: value for key, value in (kwargs or {}).items() if key != "out"}
            moved = size((read, inputs)) + size(result)
            self._traffic.add(name, moved, is_product=name in PRODUCTS)
        return result


class _CompiledChains:
    """Counts the kernels of each chain; equal arguments are lowered once per process."""

    _known: ClassVar[dict[tuple[Any, ...], list[lowering.Kernel]]] = {}

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        key = (function, *map(_signature, args))
        if key not in self._known:
            self._known[key] = lowering.kernels(function, args)
        for kernel in self._known[key]:
            assert not kernel.is_library_call, f"{function.__name__} is more than a chain"
            self._traffic.add(function.__name__, kernel.num_bytes)
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            return function(*args)


def _signature(value: Any) -> Any:
    return (value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


class _Kernels(TorchFunctionMode):
    """Stands in for what is one kernel on CUDA and several operations on `meta`."""

    def __init__(self, traffic: Traffic) -> None:
        super().__init__()
        self._traffic = traffic

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            result = _attended(*args, **kwargs)
            self._traffic.add("attention", size((args, kwargs, result)), is_product=True)
            return result
        if func is functional.rms_norm and holding.have_one_dtype((args, kwargs)):
            result = torch.empty_like(args[0].contiguous())
            self._traffic.add("rms_norm", size((args, kwargs, result)))
            return result
        return holding.as_cudnn_lays_it_out(func, args, func(*args, **kwargs))


def _attended(query: Tensor, *_: Any, **__: Any) -> Tensor:
    """Laid out as the query is, which is what CUDA's kernels return."""
    return torch.empty_like(query)


def size(values: Any) -> int:
    """Bytes of all tensors in a nest of tuples and dicts."""
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    return sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
