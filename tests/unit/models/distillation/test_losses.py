"""The losses, against what the papers say of their gradients."""

import pytest
import torch

from models.distillation import losses

SHAPE = (3, 4, 2, 5, 5)


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*(shape or SHAPE), generator=generator)


def test_the_gradient_that_reaches_the_student_is_the_score_gap_per_element(x):
    x0, gradient = x().requires_grad_(), x()
    losses.dmd(x0, gradient).backward()
    torch.testing.assert_close(x0.grad, gradient / x0.numel(), rtol=1e-6, atol=0)


def test_equal_scores_leave_nothing_to_learn(x):
    x0, p = x(), x()
    assert not losses.dmd_gradient(x0, p, p).any()
    assert losses.dmd(x0, torch.zeros(SHAPE)) == 0


def test_the_normaliser_is_each_samples_own(x):
    """A sample's gradient is the same beside others that are far off."""
    x0, fake, real = x(), x(), x()
    alone = losses.dmd_gradient(x0[:1], fake[:1], real[:1])
    x0[1:] *= 1000
    assert torch.equal(losses.dmd_gradient(x0, fake, real)[:1], alone)
    by_hand = (fake[0] - real[0]) / (x0[0] - real[0]).abs().mean()
    torch.testing.assert_close(alone[0], by_hand)


def test_a_student_equal_to_the_teacher_divides_by_zero_and_nothing_happens(x):
    p = x()
    assert not losses.dmd_gradient(p, p, p).any()
    assert losses.sgmd(p, p, p, torch.tensor(0.5), 0.1) == 0


def test_guidance_is_the_standard_form_and_one_more_than_self_forcings(x):
    cond, uncond = x(), x()
    standard = losses.guided(cond, uncond, 6.0)
    self_forcing = cond + 5.0 * (cond - uncond)
    torch.testing.assert_close(standard, self_forcing, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(losses.guided(cond, uncond, 1.0), cond)


def test_guidance_is_the_same_of_velocities_and_of_clean_predictions(x):
    noisy, cond, uncond, sigma = x(), x(), x(), 0.7
    of_clean = losses.guided(noisy - sigma * cond, noisy - sigma * uncond, 6.0)
    torch.testing.assert_close(noisy - sigma * losses.guided(cond, uncond, 6.0), of_clean)


def test_the_critic_is_right_where_it_predicts_the_velocity(x):
    x0, noise = x(), x()
    assert losses.flow(noise - x0, x0, noise) == 0
    assert losses.flow(noise - x0 + 2, x0, noise) == pytest.approx(4, rel=1e-5)


def test_sgmd_reaches_the_student_through_the_critics_prediction_only(x):
    """d loss / d p_fake = (p_fake - p_real) / norm - weight (p_fake - x0) / sigma."""
    x0, fake, real = x().requires_grad_(), x().requires_grad_(), x()
    sigma = torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1, 1, 1)
    losses.sgmd(x0, fake, real, sigma, 0.1).backward()
    norm = losses.per_sample_mean((x0 - real).abs())
    expected = (fake - real) / norm - 0.1 * (fake - x0) / sigma
    torch.testing.assert_close(fake.grad, expected.detach() / fake.numel())
    assert x0.grad is None
