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
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
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
        return as_cudnn_lays_it_out(func, args, func(*args, **kwargs))


def as_cudnn_lays_it_out(func: Any, args: tuple[Any, ...], result: Any) -> Any:
    """Of convolutions: channels last where input or weights are. `meta` says otherwise."""
    if func not in (functional.conv2d, functional.conv3d):
        return result
    layout = torch.channels_last_3d if args[0].ndim == 5 else torch.channels_last
    if not any(each.is_contiguous(memory_format=layout) for each in args[:2]):
        return result
    with _disable_current_modes():
        strides = torch.empty_like(result, memory_format=layout).stride()
        return result.as_strided(result.shape, strides)


def have_one_dtype(values: Any) -> bool:
    """All tensors in a nest of tuples and dicts; else CUDA has no kernel for `rms_norm` either."""
    return len({leaf.dtype for leaf in tree_leaves(values) if isinstance(leaf, Tensor)}) == 1
