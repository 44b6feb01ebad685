"""Noise and what the teacher makes of it in many steps with guidance: what a student may copy.

DMD (arXiv 2311.18828) keeps its student near such pairs by a regression term; CausVid (2412.07772)
and Self-Forcing (2506.08009) start theirs from them.
"""

# N pairs, B batch, C latent channels, T H W latent frames, rows, columns

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models import sampling
from models.distillation import draws, examples, losses, method, roles

Report = Callable[[int, int], None]
"""(done, of how many)"""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Those of one process. Number k of the training goes with example k, modulo their number."""

    seed: int
    numbers: Sequence[int]
    answers_NCTHW: Tensor  # noqa: N815  # named by its axes, as everywhere
    """Clean latents, fp32, on the CPU."""

    def __len__(self) -> int:
        return len(self.numbers)

    def take(
        self, places: Sequence[int], data: examples.Examples, device: torch.device
    ) -> tuple[examples.Batch, Tensor, Tensor]:
        """Examples, noise and answers [B, C, T, H, W]; places are from 0 to len - 1."""
        numbers = [self.numbers[place] for place in places]
        noise = noise_for(self.seed, numbers, data.latent_shape).to(device)
        answers = self.answers_NCTHW[list(places)].to(device)
        return _examples(numbers, data, device), noise, answers


def noise_for(seed: int, numbers: Sequence[int], shape: Sequence[int]) -> Tensor:
    """[B, C, T, H, W]: each pair has its own, whatever the batch."""
    return torch.stack(
        [torch.randn(*shape, generator=draws.for_pair(seed, number)) for number in numbers]
    )


def _examples(
    numbers: Sequence[int], data: examples.Examples, device: torch.device
) -> examples.Batch:
    return data.batch([number % len(data) for number in numbers], device)


@torch.no_grad()
def make(
    teacher: roles.Role,
    how: method.Method,
    *,
    data: examples.Examples,
    numbers: Sequence[int],
    steps: int,
    batch: int,
    path: Path,
    report: Report,
    device: torch.device | str = "cpu",
) -> Pairs:
    """Ask the teacher in `steps` Euler steps, or read from `path` what it answered before.

    Processes that share a teacher ask for equally many. Raises ValueError where `path` holds
    answers to other questions.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    asked = {"seed": how.seed, "guidance": how.guidance, "steps": steps, "numbers": list(numbers)}
    if path.exists():
        kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if kept["asked"] != asked or kept["answers"].shape[1:] != data.latent_shape:
            raise ValueError(f"{path} holds answers to other questions; remove it")
        return Pairs(seed=how.seed, numbers=numbers, answers_NCTHW=kept["answers"])
    stride = sampling.TABLE_LENGTH // steps
    levels = sampling.noise_levels(range(sampling.TABLE_LENGTH, 0, -stride), how.sample_shift)
    parts = []
    for first in range(0, len(numbers), batch):
        report(first, len(numbers))
        some = numbers[first : first + batch]
        noise = noise_for(how.seed, some, data.latent_shape).to(device)
        velocity = _guided(teacher, _examples(some, data, torch.device(device)), how.guidance)
        parts.append(sampling.denoise(velocity, noise, levels, step_rule="euler").cpu())
    report(len(numbers), len(numbers))
    answers = torch.cat(parts)
    partial = path.with_suffix(".partial")
    torch.save({"asked": asked, "answers": answers}, partial)
    partial.replace(path)
    return Pairs(seed=how.seed, numbers=numbers, answers_NCTHW=answers)


def _guided(teacher: roles.Role, asked: examples.Batch, guidance: float) -> sampling.VelocityFn:
    told = teacher.at(asked.context_BSG, asked.condition)
    untold = teacher.at(asked.negative_BSG, asked.condition)

    def velocity(latents_BCTHW: Tensor, timestep_B: Tensor) -> Tensor:
        pair = told(latents_BCTHW, timestep_B), untold(latents_BCTHW, timestep_B)
        return losses.guided(*pair, guidance)

    return velocity
