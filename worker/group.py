"""The processes that torchrun has started for one piece of work, one per GPU."""

import datetime
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import distributed

GRACE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
SETTLE_SECONDS = 0.5


def is_first() -> bool:
    """Also where there is no other one."""
    return not are_many() or int(os.environ.get("RANK", "0")) == 0


def are_many() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def has_little_grace() -> bool:
    """Whether torchrun kills its processes 30 s after a signal, as far as they can tell."""
    is_of_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return is_of_torchrun and are_many() and GRACE_VARIABLE not in os.environ


@contextmanager
def joined(*, patience: datetime.timedelta | None = None) -> Iterator[None]:
    """torch.distributed is ready inside, if torchrun has started several; its own GPU is current.

    Who waits for another one in vain gives up after `patience`; None: as torch likes.
    """
    if not are_many():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        distributed.init_process_group("nccl", timeout=patience)
    else:
        distributed.init_process_group("gloo", timeout=patience)
    yield
    # Not after a failure: it might wait for the others, who wait for what this one did not send.
    leave()


def leave() -> None:
    """When all are here.

    gloo's threads free the tensors of the last exchanges a moment after them, for which they need
    the interpreter: one that is ending by then aborts the process. While this one waits, they have
    it; also one that was not at work on the barrier, and that busy cores keep waiting.
    """
    distributed.barrier()
    time.sleep(SETTLE_SECONDS)
    distributed.destroy_process_group()
