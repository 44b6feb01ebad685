"""Weights are read by several at a time: a single reader waits for each page of a file."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

READERS = 4  # more gain little (docs/performance.md, Loading), and each may convert a tensor


def in_order(read: Callable[[str], Tensor], names: Iterable[str]) -> Iterator[Tensor]:
    """What `read` gives for each name, in the order of the names.

    Memory is bounded: no more than READERS tensors are being read, or are read and not yet taken.
    """
    waiting: deque[Future[Tensor]] = deque()
    with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as readers:
        for name in names:
            waiting.append(readers.submit(read, name))
            if len(waiting) == READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
