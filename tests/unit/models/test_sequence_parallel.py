"""How tokens are shared, and what a process of several computes and sends, counted on `meta`."""

import pytest

from benchmarks import networks, sequence
from models import config, sequence_parallel


@pytest.mark.parametrize(
    ("tokens", "processes", "expected"),
    [(32_760, 8, [4095] * 8), (45, 2, [23, 22]), (7, 3, [3, 2, 2]), (3, 3, [1, 1, 1])],
)
def test_shares_differ_by_one_token_at_most(tokens, processes, expected):
    assert sequence_parallel.lengths(tokens, processes) == expected


def test_too_few_tokens_are_refused():
    with pytest.raises(ValueError, match="2 tokens are too few for 3 processes"):
        sequence_parallel.lengths(2, 3)


def test_a_process_of_four_computes_a_quarter_and_sends_four_activations_per_block():
    """q, k, v and the attention's result, three quarters of each; the rest is the text's and the
    head's, which all compute or get."""
    latents, tokens = networks.LATENTS["480p"], 32_760
    sizes = config.TransformerConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=2)
    alone, one_of_four = (sequence.share(sizes, latents, count) for count in (1, 4))
    assert alone["sent_bytes"] == 0
    assert one_of_four["flops"] / alone["flops"] == pytest.approx(1 / 4, rel=0.02)
    per_block = 4 * (tokens // 4) * 1536 * 2 * 3 // 4
    head = tokens * 64 * 4 * 3 // 4
    assert one_of_four["sent_bytes"] == pytest.approx(2 * per_block + head, rel=0.01)
