"""Weights in fp32 that compute in bf16: the optimizer's masters are the parameters themselves.

The renderer keeps projections in bf16 and small parameters in fp32 (`transformer.FP32_PARAMETERS`).
Here each projection rounds its fp32 weight when it is used, so a student is trained as it will be
rendered, and an update of 2e-6 is not lost on a weight of 0.02, whose bf16 neighbours are 1e-4
away.
"""

from torch import Tensor, nn
from torch.nn import functional

from models import norms


class RoundedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.bfloat16()
        return functional.linear(x.bfloat16(), self.weight.bfloat16(), bias)


class RoundedConv3d(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.bfloat16()
        y: Tensor = self._conv_forward(x.bfloat16(), self.weight.bfloat16(), bias)
        return y


class RoundedRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(
            x.bfloat16(), self.normalized_shape, self.weight.bfloat16(), self.eps
        )


# Only these very classes: what computes in fp32 has classes of its own (`transformer.WideLinear`).
_ROUNDED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: RoundedLinear,
    nn.Conv3d: RoundedConv3d,
    norms.RMSNorm: RoundedRMSNorm,
}


def compute_in_bf16(network: nn.Module) -> None:
    """Let a transformer of fp32 parameters compute as one whose projections are bf16."""
    for module in network.modules():
        rounded = _ROUNDED.get(type(module))
        if rounded is not None:
            module.__class__ = rounded  # names of parameters, and so of tensors in files, stay
