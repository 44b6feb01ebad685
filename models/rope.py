"""Rotary position embedding over (frame, row, column), on interleaved pairs."""

# B batch, L tokens (frames * rows * columns), N heads, K head dim, P = K / 2 pairs

import functools

import torch
from torch import Tensor

THETA = 10000.0
CACHED_GRIDS = 4  # a table is 34 MB at 480p, 77 at 720p; a worker sees a handful of sizes

Rotation = tuple[Tensor, Tensor]
"""cos_LK and sin_LK of every token's angles: those of a pair twice, its first sine negative."""


def split(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's dims turn with the frame, the row and the column: 128 -> 44, 42, 42."""
    per_axis = 2 * (head_dim // 6)
    return head_dim - 2 * per_axis, per_axis, per_axis


@functools.lru_cache(maxsize=CACHED_GRIDS)
def table(
    grid: tuple[int, int, int], head_dim: int, device: torch.device, dtype: torch.dtype
) -> Rotation:
    """Rotation of the tokens of a (frames, rows, columns) grid, in frame-row-column order.

    Axis angles are position * THETA^(-2i / dims of the axis), computed in fp64, then cast.
    """
    # A table first made under inference_mode would be refused by autograd later on.
    with torch.inference_mode(mode=False):
        angles = [
            _axis_angles(length, dims) for length, dims in zip(grid, split(head_dim), strict=True)
        ]
        frames, rows, columns = grid
        angles_LP = torch.cat(
            [
                angles[0][:, None, None].expand(-1, rows, columns, -1),
                angles[1][None, :, None].expand(frames, -1, columns, -1),
                angles[2][None, None, :].expand(frames, rows, -1, -1),
            ],
            dim=-1,
        ).flatten(0, 2)
        cos_LK = torch.stack([angles_LP.cos(), angles_LP.cos()], dim=-1).flatten(-2)
        sin_LK = torch.stack([-angles_LP.sin(), angles_LP.sin()], dim=-1).flatten(-2)
        return cos_LK.to(device, dtype), sin_LK.to(device, dtype)


def _axis_angles(length: int, dims: int) -> Tensor:
    exponents = torch.arange(0, dims, 2, dtype=torch.float64, device="cpu") / dims
    positions = torch.arange(length, dtype=torch.float64, device="cpu")
    return torch.outer(positions, THETA**-exponents)


def rotate(x_BLNK: Tensor, rotation: Rotation) -> Tensor:
    """Turn each pair (x[2i], x[2i+1]) by its token's angle; computed in the table's dtype."""
    cos_L1K, sin_L1K = (part.unsqueeze(1) for part in rotation)
    if x_BLNK.is_cpu and not torch.compiler.is_compiling():
        # On a processor the strided passes below take eight times as long.
        turn_L1P = torch.complex(cos_L1K[..., ::2], sin_L1K[..., 1::2])
        pairs_BLNP2 = x_BLNK.to(cos_L1K.dtype).reshape(*x_BLNK.shape[:-1], -1, 2)
        turned_BLNP = torch.view_as_complex(pairs_BLNP2.contiguous()) * turn_L1P
        return torch.view_as_real(turned_BLNP).flatten(-2).to(x_BLNK.dtype)
    swapped_BLNK = x_BLNK.reshape(*x_BLNK.shape[:-1], -1, 2).flip(-1).flatten(-2)
    return torch.addcmul(x_BLNK * cos_L1K, swapped_BLNK, sin_L1K).to(x_BLNK.dtype)
