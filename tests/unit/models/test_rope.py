"""Rotary embedding: what it must keep, and where each axis lives."""

import pytest
import torch

from models import rope

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("head_dim", "expected"), [(128, (44, 42, 42)), (12, (4, 4, 4)), (32, (12, 10, 10))]
)
def test_split_over_frame_row_column(head_dim, expected):
    assert rope.split(head_dim) == expected
    assert sum(expected) == head_dim


def test_a_rotation_keeps_the_length_of_every_pair():
    x = torch.randn(2, 24, 3, 128, dtype=torch.float64)
    turned = rope.rotate(x, rope.table((2, 3, 4), 128, CPU, torch.float64))
    assert torch.allclose(pair_lengths(turned), pair_lengths(x), atol=1e-12)
    assert not torch.allclose(turned, x)


def pair_lengths(x):
    return x.unflatten(-1, (-1, 2)).norm(dim=-1)


def test_scores_depend_on_the_distance_between_tokens_only():
    """<R_a q, R_b k> is the same for every pair of tokens one frame, row and column apart."""
    q, k = torch.randn(2, 128, dtype=torch.float64)
    grid = (3, 3, 3)
    cos_sin = rope.table(grid, 128, CPU, torch.float64)
    q_turned = rope.rotate(q.expand(1, 27, 1, 128), cos_sin).view(*grid, 128)
    k_turned = rope.rotate(k.expand(1, 27, 1, 128), cos_sin).view(*grid, 128)
    scores = (q_turned[:2, :2, :2] * k_turned[1:, 1:, 1:]).sum(-1)
    assert torch.allclose(scores, scores[0, 0, 0].expand_as(scores), atol=1e-11)


def test_each_axis_turns_its_own_dims():
    cos, sin = rope.table((2, 2, 2), 128, CPU, torch.float64)
    assert torch.equal(sin[:, ::2], -sin[:, 1::2])
    assert torch.equal(cos[:, ::2], cos[:, 1::2])
    angles = torch.atan2(sin, cos)[:, 1::2].view(2, 2, 2, 64)
    turned = {
        "frame": angles[1, 0, 0] != 0,
        "row": angles[0, 1, 0] != 0,
        "column": angles[0, 0, 1] != 0,
    }
    pairs = {axis: torch.nonzero(mask).flatten().tolist() for axis, mask in turned.items()}
    assert pairs == {
        "frame": list(range(22)),
        "row": list(range(22, 43)),
        "column": list(range(43, 64)),
    }
    assert angles[1, 0, 0, 1].item() == pytest.approx(10000 ** (-2 / 44))


def test_pairs_are_neighbours():
    """Interleaved: a vector along dim 0 turns within dims 0 and 1 by the frame number."""
    x = torch.zeros(1, 2, 1, 128, dtype=torch.float64)
    x[..., 0] = 1
    turned = rope.rotate(x, rope.table((2, 1, 1), 128, CPU, torch.float64))[0, 1, 0]
    expected = torch.cat([torch.tensor([1.0]).cos(), torch.tensor([1.0]).sin()])
    assert torch.allclose(turned[:2], expected.double(), atol=1e-7)
    assert torch.count_nonzero(turned[2:]) == 0


def test_bf16_tokens_are_turned_in_the_tables_precision():
    x = torch.randn(1, 8, 1, 12).bfloat16()
    fp32, fp64 = (rope.table((2, 2, 2), 12, CPU, dtype) for dtype in (torch.float32, torch.float64))
    turned = rope.rotate(x, fp32)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rope.rotate(x.double(), fp64).bfloat16())


def test_a_table_made_under_inference_mode_can_be_trained_with():
    rope.table.cache_clear()
    with torch.inference_mode():
        rope.table((1, 2, 3), 12, CPU, torch.float32)
    x = torch.randn(1, 6, 1, 12, requires_grad=True)
    rope.rotate(x, rope.table((1, 2, 3), 12, CPU, torch.float32)).sum().backward()
    assert x.grad is not None
