"""Teach a student where it goes by itself, not only where the teacher would have gone.

Four steps lead off the straight line from a noise to the teacher's answer, and what a student has
learnt on the line does not hold beside it. So the student goes part of the way; from there the
teacher goes on to the end, in many steps with guidance; and the student learns to point to that
end. Rounds of this, as in DAgger (arXiv 1011.0686), of which "on-policy" distillation is one kind.
"""

# B batch, N states, C latent channels, T H W latent frames, rows, columns

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import sampling
from models.distillation import examples, method, pairs, roles, rollout, tensor_files
from models.tiny import learning, loop, recipes

SHARES = (0.15, 0.3, 0.55)
"""Of the states: after one, two and three steps. The last step draws the picture."""


@dataclass(frozen=True)
class States:
    """Where a student was, and where the teacher came to from there."""

    latents_NCTHW: Tensor  # noqa: N815  # named by its axes, as everywhere
    answers_NCTHW: Tensor  # noqa: N815
    steps_N: Tensor  # noqa: N815
    """How many steps the student had gone."""
    numbers_N: Tensor  # noqa: N815
    """Of the examples."""


def train(
    nets: roles.Roles,
    how: method.Method,
    recipe: recipes.OnPolicy,
    *,
    data: examples.Examples,
    answered: pairs.Pairs,
    path: Path,
    say: loop.Say,
    device: torch.device | str = "cpu",
) -> None:
    """Train the student's weights, or go on training; they end as their running average.

    `path`: the checkpoint; the states of each round lie beside it until the end. A quarter of each
    batch are noise and the teacher's answers to it: the first step.
    """
    assert len(how.denoising_step_list) == len(SHARES) + 1
    path.parent.mkdir(parents=True, exist_ok=True)
    student, here = nets.student, torch.device(device)
    levels = sampling.noise_levels(how.denoising_step_list, how.sample_shift)
    sigmas = torch.tensor(levels.sigmas)
    _, all_noise, all_answers = answered.take(range(answered.count), data, torch.device("cpu"))
    current: dict[int, States] = {}

    def states(turn: int) -> States:
        if turn not in current:
            current.clear()
            # The one before stays: a stop may still lead back into its round.
            _states_path(path, turn - 2).unlink(missing_ok=True)
            current[turn] = collect(
                nets,
                how,
                recipe,
                turn=turn,
                data=data,
                path=_states_path(path, turn),
                say=say,
                device=here,
            )
        return current[turn]

    def error(number: int) -> Tensor:
        there = states(number // recipe.steps)
        generator = loop.generator(how.seed, number)
        rows = torch.randint(len(there.steps_N), (3 * recipe.batch // 4,), generator=generator)
        pairs_there = torch.randint(
            answered.count, (recipe.batch - len(rows),), generator=generator
        )
        latents = torch.cat([there.latents_NCTHW[rows], all_noise[pairs_there]]).to(here)
        answers = torch.cat([there.answers_NCTHW[rows], all_answers[pairs_there]]).to(here)
        gone = torch.cat([there.steps_N[rows], torch.zeros_like(pairs_there)])
        numbers = torch.cat([there.numbers_N[rows], pairs_there % len(data)])
        batch = data.batch(numbers.tolist(), here)
        sigma_B = sigmas[gone].to(here)
        end = (latents - answers) / sigma_B.view(-1, 1, 1, 1, 1)
        told = student.velocity(latents, sigma_B, batch.context_BSG, batch.condition)
        distance: Tensor = (told - end).square().mean()
        return distance

    steps = recipe.rounds * recipe.steps
    learning.learn(student, error, rate=recipe.rate, steps=steps, path=path, say=say)
    for turn in range(recipe.rounds):
        _states_path(path, turn).unlink(missing_ok=True)


def _states_path(path: Path, turn: int) -> Path:
    return path.with_name(f"{path.stem}_states_{turn}.safetensors")


@torch.no_grad()
def collect(
    nets: roles.Roles,
    how: method.Method,
    recipe: recipes.OnPolicy,
    *,
    turn: int,
    data: examples.Examples,
    path: Path,
    say: loop.Say,
    device: torch.device,
) -> States:
    """`recipe.states` of them by SHARES; made once, a round that was stopped finds them."""
    if path.exists():
        return States(**tensor_files.load(path))
    levels = sampling.noise_levels(how.denoising_step_list, how.sample_shift)
    stride = sampling.TABLE_LENGTH // recipe.teacher_steps
    fine = sampling.noise_levels(range(sampling.TABLE_LENGTH, 0, -stride), how.sample_shift)
    generator = loop.generator(how.seed, -1 - turn)
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    ends = [round(share * recipe.states) for share in itertools.accumulate(SHARES)]
    for gone, (first, end) in enumerate(itertools.pairwise([0, *ends]), start=1):
        for count in _batches(end - first, recipe.collect_batch):
            say(f"states  {sum(len(each[3]) for each in found)}/{recipe.states}")
            numbers = torch.randint(len(data), (count,), generator=generator)
            batch = data.batch(numbers.tolist(), device)
            shape = (count, *data.latent_shape)

            def draw(shape: tuple[int, ...] = shape) -> Tensor:
                return torch.randn(shape, generator=generator).to(device)

            velocity = nets.student.at(batch.context_BSG, batch.condition)
            latents = rollout.walk(
                gone, velocity, draw(), levels, rule=how.rollout, draw_noise=draw
            )
            left = _onward(levels.sigmas[gone], fine.sigmas)
            guided = pairs.guided(nets.teacher, batch, how.guidance)
            answers = sampling.denoise(guided, latents, left, step_rule="euler")
            found.append((latents.cpu(), answers.cpu(), torch.full((count,), gone), numbers))
    states = States(*(torch.cat(parts) for parts in zip(*found, strict=True)))
    tensor_files.save(dataclasses.asdict(states), path)
    return states


def _onward(sigma: float, fine: tuple[float, ...]) -> sampling.NoiseLevels:
    """From where the student stands through the teacher's levels below."""
    sigmas = (sigma, *(level for level in fine if level < sigma))
    return sampling.NoiseLevels(sigmas=sigmas, timesteps=1000 * torch.tensor(sigmas))


def _batches(count: int, most: int) -> list[int]:
    return [min(most, count - first) for first in range(0, count, most)]
