"""Cleaning and tokenising (the network's numbers are in tests/parity)."""

import json

import pytest
import tokenizers
import torch

from models import checkpoint, errors, layout, text_encoder


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
    files = layout.find(native_root)
    return checkpoint.load(files, device="cpu", dtype=torch.float32).text_encoder


def test_a_tokenizer_is_the_one_of_its_file_whatever_its_class_is_called(tmp_path):
    """Wan's folder says T5Tokenizer, whose own idea of `<unk>` is the id of Wan's `<s>`."""
    pieces = ["<pad>", "</s>", "<s>", "<unk>", *(f"<extra_{n}>" for n in range(5))]
    vocabulary = [(piece, 0.0) for piece in pieces]
    vocabulary += [("\N{LOWER ONE EIGHTH BLOCK}" + word, -1.0) for word in ("a", "cat")]
    made = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=3))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    made.add_special_tokens(pieces[:4])
    made.save(str(tmp_path / "tokenizer.json"))
    told = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": []}
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "bos_token": "<s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(told | special))
    loaded = text_encoder.load_tokenizer(tmp_path)
    assert loaded("a cat")["input_ids"] == [9, 10, 1]
    assert loaded("a \N{CAT} cat")["input_ids"] == made.encode("a \N{CAT} cat").ids
    assert 3 in loaded("a \N{CAT} cat")["input_ids"]


def test_no_tokenizer_is_made_of_a_vocabulary_alone(tmp_path):
    (tmp_path / "spiece.model").touch()
    with pytest.raises(errors.MissingFileError, match=r"tokenizer\.json"):
        text_encoder.load_tokenizer(tmp_path)


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
