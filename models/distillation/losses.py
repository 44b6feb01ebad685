"""The losses of distribution matching, on clean latents; none of them knows a network.

x0 are the student's latents; p_fake and p_real what critic and teacher make of them after noise of
level sigma. Formulas: DMD (arXiv 2311.18828) eq. 7 and 8, DMD2 (2405.14867), SGMD (2605.30116).
"""

# B batch; the other axes are those of the latents

import torch
from torch import Tensor
from torch.nn import functional

TINY = 1e-8  # keeps SGMD's loss finite where the student equals the teacher


def per_sample_mean(x: Tensor) -> Tensor:
    """[B, 1, ...]: the mean over everything but the batch."""
    return x.mean(dim=tuple(range(1, x.ndim)), keepdim=True)


def guided(cond: Tensor, uncond: Tensor, guidance: float) -> Tensor:
    """Classifier-free guidance in the standard form: uncond + w (cond - uncond).

    Self-Forcing and CausVid write cond + g (cond - uncond) instead: w = g + 1.
    """
    return uncond + guidance * (cond - uncond)


def dmd_gradient(x0: Tensor, p_fake: Tensor, p_real: Tensor) -> Tensor:
    """(p_fake - p_real) / mean|x0 - p_real|, the mean over each sample."""
    normaliser = per_sample_mean((x0 - p_real).abs())
    return torch.nan_to_num((p_fake - p_real) / normaliser)


def dmd(x0: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient by x0 is gradient / number of elements, computed in fp64.

    Its value says how large the gradient is, not how good the student.
    """
    wide = x0.double()
    return 0.5 * functional.mse_loss(wide, (wide - gradient.double()).detach())


def flow(velocity: Tensor, x0: Tensor, noise: Tensor) -> Tensor:
    """The critic's: mean (v - (eps - x0))^2."""
    return functional.mse_loss(velocity, noise - x0)


def sgmd(x0: Tensor, p_fake: Tensor, p_real: Tensor, sigma: Tensor, correction: float) -> Tensor:
    """0.5 (p_fake - p_real)^2 / mean|x0 - p_real|, minus `correction` times the negative residual.

    Its gradient reaches the student through the critic's input. The residual's gradient by p_fake
    is (p_fake - x0) / sigma; where the critic follows the student well it vanishes.
    """
    normaliser = per_sample_mean((x0 - p_real).abs()).detach() + TINY
    fisher = (0.5 * (p_fake - p_real.detach()).square() / normaliser).mean()
    gradient = ((p_fake - x0) / sigma).detach()
    residual = 0.5 * functional.mse_loss(p_fake, (p_fake - gradient).detach())
    return fisher - correction * residual
