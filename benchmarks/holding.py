"""The most bytes that tensors held together, counted on `meta`: nothing is allocated.

Attention and `rms_norm` make their result and nothing else, as CUDA's kernels do. The workspace of
a kernel and an allocator's gaps come on top and are not known here.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak(run: Callable[[], object], *, given: Iterable[Tensor]) -> int:
    """Of what `run` makes; `given` are the tensors that were there before."""
    with torch.inference_mode(), _LiveBytes(given) as live, _Kernels():
        run()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    def __init__(self, given: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak = 0
        storages = (tensor.untyped_storage() for tensor in given)
        self._live = {storage._cdata: (StorageWeakRef(storage), 0) for storage in storages}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self._live = {key: kept for key, kept in self._live.items() if not kept[0].expired()}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                self._live.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        self.peak = max(self.peak, sum(count for _, count in self._live.values()))
        return out


class _Kernels(TorchFunctionMode):
    """On `meta` scores would be made whole and norms taken apart."""

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        if func is functional.rms_norm and have_one_dtype((args, kwargs)):
            return torch.empty_like(args[0])
        return func(*args, **kwargs)


def have_one_dtype(values: Any) -> bool:
    """All tensors in a nest of tuples and dicts; else CUDA has no kernel for `rms_norm` either."""
    return len({leaf.dtype for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}) == 1
