"""A training loop that can be stopped at any time and goes on with the same numbers.

A step draws its chance from its own number (`dice`, `generator`), so a checkpoint needs no state of
random generators.
"""

import math
import random
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

SAVE_SECONDS = 120.0  # what a stop may cost
SAY_SECONDS = 20.0

Say = Callable[[str], None]


class Stateful(Protocol):
    """A network, an optimizer, or an average of weights."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Any) -> Any: ...


def dice(seed: int, step: int) -> random.Random:
    return random.Random(f"{seed}/{step}")  # noqa: S311  # pictures, not secrets


def generator(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(dice(seed, step).getrandbits(63))


def run(
    name: str,
    parts: Mapping[str, Stateful],
    step: Callable[[int], Mapping[str, float]],
    *,
    steps: int,
    path: Path,
    say: Say,
) -> None:
    """Call `step(k)` for every k below `steps` not done yet; `parts` are kept in `path`."""
    done = restore(path, parts)
    began, first, saved, said = time.monotonic(), done, time.monotonic(), 0.0
    means: dict[str, float] = {}
    while done < steps:
        for key, value in step(done).items():
            means[key] = value if key not in means else 0.98 * means[key] + 0.02 * value
        done += 1
        now = time.monotonic()
        if now - said > SAY_SECONDS or done == steps:
            said, pace = now, (now - began) / (done - first)
            numbers = "  ".join(f"{key} {value:.4f}" for key, value in means.items())
            left = f"{(steps - done) * pace / 60:.1f} min left"
            say(f"{name}  {done}/{steps}  {numbers}  {pace:.3f} s/step  {left}")
        if now - saved > SAVE_SECONDS or done == steps:
            saved = now
            store(path, parts, done)


def restore(path: Path, parts: Mapping[str, Stateful]) -> int:
    """Bring every part to where the checkpoint left it; how many steps that were."""
    if not path.exists():
        return 0
    kept = torch.load(path, map_location="cpu", weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(kept[name])
    return int(kept["step"])


def store(path: Path, parts: Mapping[str, Stateful], step: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step}, partial)
    partial.replace(path)


def warm_cosine(step: int, steps: int, *, warmup: int = 0, last: float = 0.05) -> float:
    """Factor of the learning rate: up to 1 in `warmup` steps, then half a cosine to `last`."""
    if step < warmup:
        return (step + 1) / warmup
    place = (step - warmup) / max(1, steps - warmup)
    return last + (1 - last) * (1 + math.cos(math.pi * min(1.0, place))) / 2


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
