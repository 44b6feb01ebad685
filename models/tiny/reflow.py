"""Begin a student where the teacher's own answers lie on straight lines, before the distillation.

The teacher answers noise in many steps with guidance. The student learns the way from each noise
to its answer as a straight line, at its own four noise levels alone: rectified flow's second round
(arXiv 2209.03003). CausVid (2412.07772) and Self-Forcing start from the teacher's answers as well.
Distribution matching alone needs far more updates than a tiny training has.
"""

# B batch

from pathlib import Path

import torch
from torch import Tensor

from models import sampling
from models.distillation import examples, losses, method, pairs, roles
from models.tiny import learning, loop, recipes


def train(
    student: roles.Role,
    how: method.Method,
    recipe: recipes.Reflow,
    *,
    data: examples.Examples,
    answered: pairs.Pairs,
    path: Path,
    say: loop.Say,
    device: torch.device | str = "cpu",
) -> None:
    """Train the role's weights, or go on training; they end as their running average."""
    levels = sampling.noise_levels(how.denoising_step_list, how.sample_shift)
    sigmas = torch.tensor(levels.sigmas)
    here = torch.device(device)
    all_batch, all_noise, all_clean = answered.take(range(answered.count), data, here)

    def error(number: int) -> Tensor:
        generator = loop.generator(how.seed, number)
        rows = torch.randint(answered.count, (recipe.batch,), generator=generator).to(here)
        sigma_B = sigmas[torch.randint(len(sigmas), (recipe.batch,), generator=generator)].to(here)
        batch, noise, clean = all_batch[rows], all_noise[rows], all_clean[rows]
        noisy = sampling.mix(clean, noise, sigma_B.view(-1, 1, 1, 1, 1))
        told = student.velocity(noisy, sigma_B, batch.context_BSG, batch.condition)
        return losses.flow(told, clean, noise)

    learning.learn(student, error, rate=recipe.rate, steps=recipe.steps, path=path, say=say)
