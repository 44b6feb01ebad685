"""RMSNorm over the last axis, as fast as a processor's memory lets it be; and over channels.

torch's own is one kernel on a GPU, and on a processor takes at least twice as long as this.
"""

# D the last axis, C channels

import torch
from torch import Tensor, nn
from torch.nn import functional

TINY_SQUARE = 1e-24  # keeps an all-zero vector at zero; far below fp32 rounding of any other


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


class ChannelRMSNorm(nn.Module):
    """x / |x| * sqrt(C) * gamma over the channels, which come first; sums at least in fp32."""

    def __init__(self, dim: int, num_trailing_axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *[1] * num_trailing_axes))

    def forward(self, x: Tensor) -> Tensor:
        return over_channels(x, self.gamma)


def over_channels(x: Tensor, gamma: Tensor) -> Tensor:
    """The same with a weight per channel, of any shape."""
    return rms_norm(x.movedim(1, -1), gamma.flatten(), TINY_SQUARE).movedim(-1, 1)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; sums at least in fp32.

    On a processor fp32 rows that need no gradient go another way, as exact, to a contiguous result:
    after it come convolutions that want channels last.
    """
    is_plain = x.is_cpu and x.dtype == weight_D.dtype == torch.float32
    if not is_plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return functional.rms_norm(x, weight_D.shape, weight_D, eps)
    x = x.contiguous()
    mean_square = torch.linalg.vecdot(x, x).unsqueeze(-1).div_(x.shape[-1])
    return torch.mul(x, mean_square.add_(eps).rsqrt_()).mul_(weight_D)
