"""Waiting for what other threads, processes and machines do."""

import time
from collections.abc import Callable
from typing import Any


def until(
    look: Callable[[], Any], is_good: Callable[[Any], object] = bool, *, seconds: float = 30.0
) -> Any:
    """What `look` finds, once it is good; fails with what it found last."""
    deadline = time.monotonic() + seconds
    while not is_good(found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s; last seen: {found}"
        time.sleep(0.02)
    return found
