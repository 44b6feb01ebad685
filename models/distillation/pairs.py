"""Noise and what the teacher makes of it in many steps with guidance: what a student may copy.

DMD (arXiv 2311.18828) keeps its student near such pairs by a regression term; CausVid (2412.07772)
and Self-Forcing (2506.08009) start theirs from them.
"""

# B batch, C latent channels, T H W latent frames, rows, columns

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import sampling
from models.distillation import (
    draws,
    examples,
    losses,
    method,
    processes,
    roles,
    tensor_files,
)

Report = Callable[[int, int], None]
"""(done, of how many)"""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pairs 0 to count - 1, a file each; number k goes with example k, modulo their number."""

    folder: Path
    made_from: str
    """Names the teacher's weights, the examples and their shape, which the answers are to."""
    how: method.Method
    steps: int
    """Of Euler's rule, for one answer."""
    count: int

    def take(
        self, numbers: Sequence[int], data: examples.Examples, device: torch.device
    ) -> tuple[examples.Batch, Tensor, Tensor]:
        """Examples, noise and answers [B, C, T, H, W]. Raises OSError for files that are gone."""
        answers = [tensor_files.load(self.path(number))["latents"] for number in numbers]
        return (
            self.examples(numbers, data, device),
            self.noise(numbers, data.latent_shape, device),
            torch.stack(answers).to(device),
        )

    def path(self, number: int) -> Path:
        how = self.how
        asked = [self.made_from, how.seed, how.guidance, how.sample_shift, self.steps, number]
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:32]
        return self.folder / f"{name}.safetensors"

    def noise(self, numbers: Sequence[int], shape: Sequence[int], device: torch.device) -> Tensor:
        """[B, C, T, H, W]: each pair has its own, whatever the batch."""
        seed = self.how.seed
        drawn = [torch.randn(*shape, generator=draws.for_pair(seed, each)) for each in numbers]
        return torch.stack(drawn).to(device)

    def examples(
        self, numbers: Sequence[int], data: examples.Examples, device: torch.device
    ) -> examples.Batch:
        return data.batch([number % len(data) for number in numbers], device)


@torch.no_grad()
def ask(
    teacher: roles.Role,
    wanted: Pairs,
    *,
    data: examples.Examples,
    batch: int,
    report: Report,
    device: torch.device | str = "cpu",
) -> None:
    """Make the answers that are not there; called by every process, each makes its share."""
    here = torch.device(device)
    wanted.folder.mkdir(parents=True, exist_ok=True)
    missing = [number for number in range(wanted.count) if not wanted.path(number).exists()]
    processes.wait()  # before the first of them is written
    table = sampling.TABLE_LENGTH
    steps = [table - table * step // wanted.steps for step in range(wanted.steps)]
    levels = sampling.noise_levels(steps, wanted.how.sample_shift)
    done = wanted.count - len(missing)
    for some in _shares(missing, batch):
        report(done, wanted.count)
        velocity = guided(teacher, wanted.examples(some, data, here), wanted.how.guidance)
        noise = wanted.noise(some, data.latent_shape, here)
        answers = sampling.denoise(velocity, noise, levels, step_rule="euler")
        for number, latents in zip(some, answers, strict=True):
            tensor_files.save({"latents": latents}, wanted.path(number))
        done += len(some) * processes.count()
    report(wanted.count, wanted.count)
    processes.wait()


def _shares(numbers: Sequence[int], batch: int) -> list[list[int]]:
    """This process's batches: as many as every other has, since they may share the networks."""
    rank, count = processes.rank(), processes.count()
    own = [numbers[place % len(numbers)] for place in range(rank, len(numbers) + rank, count)]
    return [own[first : first + batch] for first in range(0, len(own), batch)]


def guided(teacher: roles.Role, asked: examples.Batch, guidance: float) -> sampling.VelocityFn:
    told = teacher.at(asked.context_BSG, asked.condition)
    if guidance == 1:
        return told
    untold = teacher.at(asked.negative_BSG, asked.condition)

    def velocity(latents_BCTHW: Tensor, timestep_B: Tensor) -> Tensor:
        pair = told(latents_BCTHW, timestep_B), untold(latents_BCTHW, timestep_B)
        return losses.guided(*pair, guidance)

    return velocity
