"""Begin a student where the teacher's own answers lie on straight lines, before the distillation.

The teacher answers noise in many steps with guidance. The student learns the way from each noise
to its answer as a straight line, at its own four noise levels alone: rectified flow's second round
(arXiv 2209.03003). CausVid (2412.07772) and Self-Forcing start from the teacher's answers as well.
Distribution matching alone needs far more updates than a tiny training has.
"""

# B batch, N pairs, C channels, T frames, H W rows columns

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from models import sampling
from models.distillation import examples, losses, method, roles
from models.tiny import loop, recipes

BATCH = 40  # answers at a time
EMA = 0.99


@torch.no_grad()
def answers(
    teacher: roles.Role,
    how: method.Method,
    recipe: recipes.Reflow,
    *,
    data: examples.Examples,
    path: Path,
    say: loop.Say,
) -> Tensor:
    """What the teacher makes of noise for the first examples, [N, C, T, H, W]; kept in `path`."""
    if path.exists():
        kept: Tensor = torch.load(path, weights_only=True)
        return kept
    stride = sampling.TABLE_LENGTH // recipe.teacher_steps
    steps = range(sampling.TABLE_LENGTH, 0, -stride)
    levels = sampling.noise_levels(steps, how.sample_shift)
    parts = []
    for first in range(0, recipe.pairs, BATCH):
        places = range(first, min(first + BATCH, recipe.pairs))
        batch = data.batch(places, torch.device("cpu"))
        told = teacher.at(batch.context_BSG, batch.condition)
        untold = teacher.at(batch.negative_BSG, batch.condition)

        def velocity(
            latents: Tensor,
            timestep_B: Tensor,
            told: sampling.VelocityFn = told,
            untold: sampling.VelocityFn = untold,
        ) -> Tensor:
            pair = told(latents, timestep_B), untold(latents, timestep_B)
            return losses.guided(*pair, how.guidance)

        noise = noise_for(how.seed, places, data.latent_shape)
        parts.append(sampling.denoise(velocity, noise, levels, step_rule="euler"))
        if first % (10 * BATCH) == 0:
            say(f"{path.stem}  {first}/{recipe.pairs}")
    made = torch.cat(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(made, partial)
    partial.replace(path)
    return made


def noise_for(seed: int, places: range, shape: tuple[int, int, int, int]) -> Tensor:
    """[B, C, T, H, W]: each place has its own, whatever the batch."""
    return torch.stack(
        [torch.randn(shape, generator=loop.generator(seed, -1000 - place)) for place in places]
    )


def train(
    student: roles.Role,
    how: method.Method,
    recipe: recipes.Reflow,
    *,
    data: examples.Examples,
    answers_NCTHW: Tensor,
    path: Path,
    say: loop.Say,
) -> None:
    """Train the role's weights, or go on training; they end as their running average."""
    weights = nn.ParameterList(student.trained.values())
    average = AveragedModel(weights, multi_avg_fn=get_ema_multi_avg_fn(EMA))  # type: ignore[no-untyped-call]  # torch's stub
    optimizer = torch.optim.AdamW(
        weights.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.0
    )
    levels = sampling.noise_levels(how.denoising_step_list, how.sample_shift)
    sigmas = torch.tensor(levels.sigmas)
    noise_NCTHW = noise_for(how.seed, range(len(answers_NCTHW)), data.latent_shape)

    def step(number: int) -> Mapping[str, float]:
        generator = loop.generator(how.seed, number)
        rows = torch.randint(len(answers_NCTHW), (recipe.batch,), generator=generator)
        sigma_B = sigmas[torch.randint(len(sigmas), (recipe.batch,), generator=generator)]
        clean, noise = answers_NCTHW[rows], noise_NCTHW[rows]
        batch = data.batch(rows.tolist(), torch.device("cpu"))
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
