"""Prompts of the tiny world to context: a tokenizer of whole words and a small UMT5.

The encoder keeps the weights it was made with. It only has to tell words and their places apart,
and the transformer learns what they mean.
"""

# N prompts, S text tokens, D width

import random
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
from torch import Tensor, nn

from models import config, text_encoder
from models.tiny import folders, world

TEXT_LEN = 24  # rows of context; the longest prompt has 17 words and an end
UNKNOWN = "<unk>"
CONTEXT_SHARE = 0.2  # of what random layers would add to a word from the words around it


def write_tokenizer(folder: Path) -> None:
    """One token per word, whatever its case and punctuation; `<unk>` for any other word."""
    ids = {word: id_ for id_, word in enumerate((*folders.SPECIAL_TOKENS, *world.vocabulary()))}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab=ids, unk_token=UNKNOWN))
    made.normalizer = tokenizers.normalizers.Lowercase()
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.WhitespaceSplit(),
            tokenizers.pre_tokenizers.Punctuation(behavior="removed"),
        ]
    )
    folders.write_tokenizer(folder, made, text_len=TEXT_LEN)


def sizes() -> config.TextEncoderConfig:
    words = len(folders.SPECIAL_TOKENS) + len(world.vocabulary())
    return config.TextEncoderConfig(
        vocab_size=words, dim=64, head_dim=16, num_heads=4, ffn_dim=128, num_layers=2
    )


def encoder(seed: int, folder: Path) -> text_encoder.TextEncoder:
    """The encoder with the weights of this seed; its tokenizer is written to `folder`."""
    write_tokenizer(folder)
    torch.manual_seed(seed)
    network = text_encoder.build_network(sizes())
    keep_words_apart(network)
    network.eval()  # type: ignore[no-untyped-call]  # transformers has no types for it
    network.requires_grad_(requires_grad=False)
    loaded = text_encoder.load_tokenizer(folder)
    return text_encoder.TextEncoder(network, loaded, text_len=TEXT_LEN)


@torch.no_grad()
def keep_words_apart(network: nn.Module) -> None:
    """Let each row be little more than its word, so that a word means the same in any prompt."""
    for name, weight in network.named_parameters():
        if name.endswith((".o.weight", ".wo.weight")):
            weight.mul_(CONTEXT_SHARE)


class Contexts:
    """The context of every prompt of some scenes, encoded once; and of no prompt at all."""

    def __init__(self, encoder: text_encoder.TextEncoder, some: Sequence[world.Scene]) -> None:
        dice = random.Random(0)  # noqa: S311  # words, not secrets
        rows: list[Tensor] = []
        places: dict[world.Scene, list[int]] = {}
        with torch.no_grad():
            for scene in some:
                texts = list(world.prompts(scene))
                texts.append(world.with_unknown_words(dice.choice(texts), dice, UNKNOWN))
                places[scene] = list(range(len(rows), len(rows) + len(texts)))
                rows += [encoder.encode(text)[0] for text in texts]
            self.empty_SD = encoder.encode("")[0]
        self._rows_NSD = torch.stack(rows)
        self._places = places

    def choose(
        self, some: Sequence[world.Scene], dice: random.Random, *, empty_share: float
    ) -> Tensor:
        """One way to say each scene, [B, S, D]; some of them say nothing."""
        chosen = self._rows_NSD[[dice.choice(self._places[scene]) for scene in some]]
        for row in range(len(chosen)):
            if dice.random() < empty_share:
                chosen[row] = self.empty_SD
        return chosen
