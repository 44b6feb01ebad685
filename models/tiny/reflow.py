"""Begin a student where the teacher's own answers lie on straight lines, before the distillation.

The teacher answers noise in many steps with guidance. The student learns the way from each noise
to its answer as a straight line, at its own four noise levels alone: rectified flow's second round
(arXiv 2209.03003). CausVid (2412.07772) and Self-Forcing start from the teacher's answers as well.
Distribution matching alone needs far more updates than a tiny training has.
"""

# B batch

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import sampling
from models.distillation import examples, losses, method, pairs, roles
from models.tiny import loop, recipes

EMA = 0.99


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
    weights = nn.ParameterList(student.trained.values())
    average = AveragedModel(weights, multi_avg_fn=get_ema_multi_avg_fn(EMA))  # type: ignore[no-untyped-call]  # torch's stub
    optimizer = torch.optim.AdamW(
        weights.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    levels = sampling.noise_levels(how.denoising_step_list, how.sample_shift)
    sigmas = torch.tensor(levels.sigmas)
    here = torch.device(device)
    all_batch, all_noise, all_clean = answered.take(range(answered.count), data, here)

    def step(number: int) -> Mapping[str, float]:
        generator = loop.generator(how.seed, number)
        rows = torch.randint(answered.count, (recipe.batch,), generator=generator).to(here)
        sigma_B = sigmas[torch.randint(len(sigmas), (recipe.batch,), generator=generator)].to(here)
        batch, noise, clean = all_batch[rows], all_noise[rows], all_clean[rows]
        noisy = sampling.mix(clean, noise, sigma_B.view(-1, 1, 1, 1, 1))
        told = student.velocity(noisy, sigma_B, batch.context_BSG, batch.condition)
        loss = losses.flow(told, clean, noise)
        loop.set_rate(optimizer, recipe.rate * loop.warm_cosine(number, recipe.steps, warmup=50))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch's stub
        nn.utils.clip_grad_norm_(weights.parameters(), 1.0)
        optimizer.step()
        average.update_parameters(weights)
        return {"loss": loss.item()}

    parts: dict[str, loop.Stateful] = {
        "weights": weights,
        "average": average,
        "optimizer": optimizer,
    }
    loop.run(path.stem, parts, step, steps=recipe.steps, path=path, say=say)
    with torch.no_grad():
        for weight, mean in zip(weights.parameters(), average.parameters(), strict=True):
            weight.copy_(mean)
