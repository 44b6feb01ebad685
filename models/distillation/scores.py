"""The noise levels at which teacher and critic are compared."""

from torch import Tensor

from models import sampling
from models.distillation import draws, method


def draw_levels(drawn: draws.Draws, how: method.Method) -> Tensor:
    """sigma_B in fp32: one of 1000 even levels per sample, shifted towards noise, then clamped."""
    even_B = drawn.integers(sampling.TABLE_LENGTH).float() / sampling.TABLE_LENGTH
    shift = how.score_shift
    return (shift * even_B / (1 + (shift - 1) * even_B)).clamp(*how.score_range)
