"""What a render process cannot begin without: on Linux each is a file in /dev/shm."""

import multiprocessing

POOL = 5  # as many has Celery's pool of one process
ADVICE = "give /dev/shm room (docker: --shm-size): it is full or missing"


def refusal() -> str | None:
    """Why no pool of them can be made, in the system's words."""
    context = multiprocessing.get_context("fork")  # the one that leaves no names and no process
    try:
        _ = [context.Semaphore() for _ in range(POOL)]
    except (OSError, ImportError) as error:
        return f"no semaphore can be made: {error}"
    return None
