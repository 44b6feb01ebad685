"""RMSNorm over the last axis, as fast as a processor's memory lets it be.

torch's own takes a GPU one kernel and a processor three to four times as long as this.
"""

# D the last axis

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight; sums at least in fp32.

    On a processor fp32 rows that need no gradient take the other way, which rounds once more: its
    error against fp64 is at most a quarter larger.
    """
    is_plain = x.is_cpu and x.dtype == weight_D.dtype == torch.float32
    if not is_plain or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return functional.rms_norm(x, weight_D.shape, weight_D, eps)
    x = (
        x.contiguous()
    )  # channels that come first would stay first, where convolutions want them last
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return torch.mul(x, scale).mul_(weight_D)
