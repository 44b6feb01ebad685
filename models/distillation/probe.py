"""Videos of a student in training, always of the same prompts and noise."""

# C channels, T H W latent frames, rows, columns

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from models import sampling
from models.distillation import trainer

FIRST_SEED = 1_000_000  # of the first probe's noise


@torch.no_grad()
def latents(train: trainer.Trainer, place: int) -> Tensor:
    """What the renderer would make of an example: [1, C, T, H, W], fp32, by the moving average.

    Called by every process; the student is as before afterwards.
    """
    how = train.how
    batch = train.data.batch([place], train.device)
    seed = FIRST_SEED + place
    noise, generator = sampling.initial_noise(seed, train.data.latent_shape, train.device)
    with _averaged(train):
        return sampling.denoise(
            train.nets.student.at(batch.context_BSG, batch.condition),
            noise,
            sampling.noise_levels(how.denoising_step_list, how.sample_shift),
            step_rule=how.rollout,
            generator=generator,
        )


@contextlib.contextmanager
def _averaged(train: trainer.Trainer) -> Iterator[None]:
    """The student with the weights of its average."""
    _exchange(train)
    try:
        yield
    finally:
        _exchange(train)


def _exchange(train: trainer.Trainer) -> None:
    if train.average is None:
        return
    for name, weight in train.student.trained.items():
        kept = weight.detach().clone()
        weight.copy_(train.average.tensors[name])
        train.average.tensors[name].copy_(kept)
