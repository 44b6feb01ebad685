"""What the host does for one job while the device goes on with it, or with the next one."""

import time
from collections import deque
from collections.abc import Callable
from concurrent import futures
from types import TracebackType
from typing import Self


class Behind:
    """Pieces of work in a thread that begins with the first of them, one after the other.

    Or in several `threads`. To be used by one thread.
    """

    def __init__(self, name: str, *, threads: int = 1) -> None:
        self._threads = futures.ThreadPoolExecutor(threads, thread_name_prefix=name)
        self._open: deque[futures.Future[None]] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """What has not begun never does; waits for what has."""
        self._threads.shutdown(cancel_futures=True)

    def do(self, work: Callable[[], None]) -> None:
        """Returns at once."""
        self._open.append(self._threads.submit(work))

    def check(self) -> None:
        """Raises what a piece has raised by now, once."""
        while self._open and self._open[0].done():
            self._open.popleft().result()

    def wait(self, *, leave: int = 0, seconds: float | None = None) -> bool:
        """Until no more than `leave` pieces are left; False: not within these seconds.

        Raises what one of the others raised.
        """
        until = None if seconds is None else time.monotonic() + seconds
        while len(self._open) > leave:
            left = None if until is None else max(0.0, until - time.monotonic())
            done, _ = futures.wait(self._open, left, return_when=futures.FIRST_COMPLETED)
            if not done:
                return False
            ended = next(piece for piece in self._open if piece in done)
            self._open.remove(ended)
            ended.result()
        return True
