"""The processes that train together: one, or as many as torch.distributed was started with."""

from collections.abc import Mapping

import torch
from torch import distributed


def count() -> int:
    return distributed.get_world_size() if _are_many() else 1


def rank() -> int:
    return distributed.get_rank() if _are_many() else 0


def is_first() -> bool:
    return rank() == 0


def wait() -> None:
    """Until all are here."""
    if _are_many():
        distributed.barrier()


def mean(values: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Of each value over all processes; called by all of them."""
    if not _are_many():
        return dict(values)
    total = torch.tensor(list(values.values()), dtype=torch.float32, device=device)
    distributed.all_reduce(total)
    return dict(zip(values, (total / count()).tolist(), strict=True))


def is_true_anywhere(flag: bool, device: torch.device) -> bool:
    """Whether any process says so; called by all of them."""
    return mean({"flag": float(flag)}, device)["flag"] > 0


def _are_many() -> bool:
    return distributed.is_available() and distributed.is_initialized()
