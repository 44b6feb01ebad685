"""Chains of operations on single elements and rows, of which a compiler makes one kernel each.

Eagerly each operation of a chain reads and writes whole activations; compiled, a chain does so
once. Whole blocks are not compiled: their matrix products and attention are library calls either
way, and chains own no weights, so a LoRA, quantized layers and blocks that are on the device for a
moment compile nothing anew.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

MAX_SHAPES = 64  # of one chain; each has kernels of its own, which take seconds to make

BACKEND = "inductor"


P = ParamSpec("P")
T = TypeVar("T")

Runner = Callable[..., Any]
"""Called with a chain's function and its arguments; computes its result."""


def eagerly(function: Callable[..., Any], *args: Any) -> Any:
    return function(*args)


_runner: Runner = eagerly

_CHAINS_OF_ROWS: set[Callable[..., Any]] = set()


def chain(function: Callable[P, T]) -> Callable[P, T]:
    """Mark a function that is worth compiling: tensors and constants in, tensors out.

    Or none out: it may write to an argument, as the last thing that it does, since one that cannot
    be compiled is run once more.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        assert not kwargs, "chains are called with positions only"
        result: T = _runner(function, *args)
        return result

    return run


def chain_of_rows(function: Callable[P, T]) -> Callable[P, T]:
    """A chain whose tensors of two axes are rows of which there may be any number.

    Each row is computed by itself, so that kernels for one number of them are kernels for all.
    """
    _CHAINS_OF_ROWS.add(function)
    return chain(function)


def run_with(runner: Runner) -> None:
    """How all chains of this process are run from now on."""
    global _runner
    _runner = runner


def chains_are_compiled() -> bool:
    """Whether an operation more in a chain costs next to nothing, and not a pass of its own."""
    if isinstance(_runner, Compiler):
        return _runner.is_working
    return _runner is not eagerly


@contextlib.contextmanager
def running_with(runner: Runner) -> Iterator[None]:
    """The same for a while."""
    before = _runner
    run_with(runner)
    try:
        yield
    finally:
        run_with(before)


class Compiler:
    """Runs chains compiled, each shape by kernels of its own: what is computed is always the same.

    Of chains of rows all numbers of rows have kernels together, which treat each row alike.
    When a chain cannot be compiled, `on_failure` is told once, and all chains run eagerly. Kernels
    are kept on disk where TORCHINDUCTOR_CACHE_DIR says.
    """

    def __init__(self, on_failure: Callable[[Exception], None]) -> None:
        self._on_failure = on_failure
        self._has_failed = False
        self._cannot_compile = _errors_of_compiling()
        self._compiled: dict[Callable[..., Any], Callable[..., Any]] = {}
        self._kinds: dict[Callable[..., Any], set[tuple[Any, ...]]] = {}

    @property
    def is_working(self) -> bool:
        return not self._has_failed

    @property
    def num_shapes(self) -> int:
        return sum(len(kinds) for kinds in self._kinds.values())

    def __call__(self, function: Callable[..., Any], *args: Any) -> Any:
        if self._has_failed:
            return function(*args)
        kind = _kind(function, args)
        if function in _CHAINS_OF_ROWS:
            for each in filter(_is_rows, args):
                torch._dynamo.mark_dynamic(each, 0)
        try:
            result = self._ready(function, kind)(*args)
        except self._cannot_compile as error:
            self._has_failed = True
            self._on_failure(error)
            return function(*args)
        self._kinds[function].add(kind)
        return result

    def _ready(self, function: Callable[..., Any], kind: tuple[Any, ...]) -> Callable[..., Any]:
        known = self._kinds.setdefault(function, set())
        if kind not in known and len(known) >= MAX_SHAPES:
            # torch would go on eagerly from here, with other roundings than the same video before.
            torch.compiler.reset()
            self._compiled.clear()
            self._kinds = {function: set()}
        if function not in self._compiled:
            self._compiled[function] = _compile(function)
        return self._compiled[function]


def _errors_of_compiling() -> tuple[type[Exception], ...]:
    # A second to import, for those who compile.
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError

    return TorchDynamoException, FailOnRecompileLimitHit, ConstraintViolationError


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = 4 * MAX_SHAPES
    torch._dynamo.config.accumulated_recompile_limit = 16 * MAX_SHAPES
    # Kernels that sum are not chosen by timing them: the same machine rounds alike on every day.
    options: dict[str, Any] | None = None
    if BACKEND == "inductor":
        options = {"deterministic": True, "compile_threads": 1}
        if function in _CHAINS_OF_ROWS and hasattr(torch._inductor.config, "batch_invariant"):
            # Else the number of rows that comes first would decide how sums are split.
            options["batch_invariant"] = True
    return torch.compile(function, fullgraph=True, dynamic=False, backend=BACKEND, options=options)


def _kind(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of a call; those of one kind have kernels together."""
    of_rows = function in _CHAINS_OF_ROWS
    return tuple(_shape(each, skipping=int(of_rows and _is_rows(each))) for each in args)


def _is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2


def _shape(value: Any, *, skipping: int) -> Any:
    """Of a tensor, without its first axes."""
    if isinstance(value, Tensor):
        return value.shape[skipping:], value.stride(), value.dtype, value.device
    return value
