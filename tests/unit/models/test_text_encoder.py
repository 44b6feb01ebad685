"""Cleaning and tokenising (the network's numbers are in tests/parity)."""

import pytest
import torch

from models import checkpoint, text_encoder


@pytest.mark.parametrize(
    ("prompt", "cleaned"),
    [
        ("  a \t cat\n\non   a mat ", "a cat on a mat"),
        ("salt &amp; pepper", "salt & pepper"),
        ("salt &amp;amp;amp; pepper", "salt & pepper"),  # ftfy undoes the third
        ("a < b &amp;amp; c", "a < b & c"),  # ftfy leaves text with a bracket alone
        ("schÃ¶n", "schön"),
        ("“quoted”", '"quoted"'),
        ("一只猫", "一只猫"),
        ("", ""),
    ],
)
def test_clean(prompt, cleaned):
    assert text_encoder.clean(prompt) == cleaned


@pytest.fixture
def encoder(native_root):
    networks = checkpoint.load_text_to_video(native_root, device="cpu", dtype=torch.float32)
    return networks.text_encoder


def test_any_text_becomes_tokens_that_end_with_the_end_token(encoder):
    for prompt in ("a cat", "一只猫 🐈", "", "x" * 2000):
        ids = encoder.tokenize(prompt)
        assert ids[0, -1] == 1
        assert ids.shape[1] == min(512, len(text_encoder.clean(prompt).encode()) + 1)
        assert (ids[0, :-1] > 2).all()


def test_rows_after_the_prompt_are_zero_and_those_of_it_are_not(encoder):
    context = encoder.encode("a cat")
    assert context.shape == (1, 512, 32)
    assert (context[0, :6].abs().sum(-1) > 0).all()
    assert torch.count_nonzero(context[0, 6:]) == 0


def test_prompts_that_clean_to_the_same_text_give_the_same_context(encoder):
    assert torch.equal(encoder.encode(" a  cat\n"), encoder.encode("a cat"))
