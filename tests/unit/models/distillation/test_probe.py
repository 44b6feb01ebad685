"""A probe shows the moving average and leaves the training as it was."""

import pytest
import torch

from models import sampling
from models.distillation import probe


@pytest.mark.parametrize("rollout", sampling.STEP_RULES)
def test_a_probe_is_what_the_renderer_makes_of_the_average(train, teacher, rollout):
    beginning = train(ema=0.5, ema_start=0, rollout=rollout)
    beginning.step()
    beginning.step()
    student = {name: w.detach().clone() for name, w in beginning.student.trained.items()}
    average = {name: tensor.clone() for name, tensor in beginning.average.tensors.items()}
    made = probe.latents(beginning, 3)

    network = teacher()
    network.load_state_dict(average)
    context = beginning.data.batch([3], torch.device("cpu")).context_BSG
    noise, generator = sampling.initial_noise(probe.FIRST_SEED + 3, (16, 2, 4, 4), "cpu")
    with torch.no_grad():
        expected = sampling.denoise(
            lambda x, t: network(x, t, context),
            noise,
            sampling.noise_levels((1000, 750, 500, 250), 5.0),
            step_rule=rollout,
            generator=generator,
        )
    assert torch.equal(made, expected)
    assert all(torch.equal(w, student[name]) for name, w in beginning.student.trained.items())
    assert all(torch.equal(t, average[name]) for name, t in beginning.average.tensors.items())
