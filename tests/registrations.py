"""A worker as its launcher registers it."""

from typing import Any

from jobs import workers


def registration(name: str = "gpu0@host", **facts: Any) -> workers.Registration:
    """Of the tiny model's queue, with what the test wants changed."""
    values: dict[str, Any] = {
        "host": name.partition("@")[2],
        "device": "cpu",
        "memory_bytes": None,
        "queues": ("rushes.render.tiny",),
        "version": "1",
        "pid": 1,
        "restarts": 0,
        "launcher": "test",
    }
    return workers.Registration(name=name, **values | facts)
