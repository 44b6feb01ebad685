"""Prompt to context: the UMT5 encoder of Wan2.1, with its cleaning and its tokenizer."""

# S text tokens (always text_len rows), P tokens of the prompt, D width

import html
import re
from pathlib import Path

import ftfy
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from models import config, errors, layout


def clean(prompt: str) -> str:
    """What the network was trained on: mojibake mended, HTML unescaped twice, spaces collapsed."""
    unescaped = html.unescape(html.unescape(ftfy.fix_text(prompt)))
    return re.sub(r"\s+", " ", unescaped).strip()


def load_tokenizer(folder: Path) -> transformers.PreTrainedTokenizerBase:
    """Load a tokenizer from files on disk. Raises CheckpointError when they do not make one."""
    # The file as it is: for a `T5Tokenizer`, which Wan's folder says it is, transformers 5 makes
    # another one of its vocabulary, with the id of `<unk>` that T5 has (2; Wan's is 3).
    layout.check_tokenizer(folder)
    try:
        loaded: transformers.PreTrainedTokenizerBase = (
            transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)
        )
    except MemoryError:
        raise
    except Exception as error:  # tokenizers has no class of its own for a file that is none
        problem = f"is no usable tokenizer: {error}"
        raise errors.ConfigError(folder, problem) from error
    return loaded


def build_network(sizes: config.TextEncoderConfig) -> transformers.UMT5EncoderModel:
    """An encoder of these sizes with the weights transformers gives it."""
    return transformers.UMT5EncoderModel(
        transformers.UMT5Config(
            vocab_size=sizes.vocab_size,
            d_model=sizes.dim,
            d_kv=sizes.head_dim,
            d_ff=sizes.ffn_dim,
            num_layers=sizes.num_layers,
            num_heads=sizes.num_heads,
            relative_attention_num_buckets=sizes.num_buckets,
            relative_attention_max_distance=sizes.max_distance,
            layer_norm_epsilon=sizes.eps,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
        )
    )


class TextEncoder(nn.Module):
    """Turns one prompt into the rows that the transformer attends to."""

    def __init__(
        self,
        network: transformers.UMT5EncoderModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        *,
        text_len: int,
    ) -> None:
        super().__init__()
        self.network = network
        self.tokenizer = tokenizer
        self.text_len = text_len

    def tokenize(self, prompt: str) -> Tensor:
        """Token ids [1, P], P <= text_len: the end token included, what is too long cut off."""
        ids = self.tokenizer(clean(prompt), truncation=True, max_length=self.text_len)["input_ids"]
        return torch.tensor([ids], dtype=torch.long)

    def encode(self, prompt: str) -> Tensor:
        """Context [1, text_len, D] in the dtype of the weights; rows after the prompt are zero.

        Only the prompt's own tokens go through the network. That is what padding to text_len under
        an attention mask computes for these rows, at a fraction of the cost.
        """
        ids_1P = self.tokenize(prompt).to(self.network.device)
        states_1PD = self.network(input_ids=ids_1P).last_hidden_state
        return functional.pad(states_1PD, (0, 0, 0, self.text_len - ids_1P.shape[1]))
