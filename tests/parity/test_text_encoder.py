"""The text encoder: transformers' UMT5 under native names, fed as official Wan feeds it."""

import math

import pytest
import torch
from torch.nn import functional
from transformers import UMT5Config, UMT5EncoderModel
from transformers.models.umt5 import modeling_umt5

from models import config, text_encoder, weight_names
from models.tiny import make

SIZES = config.TextEncoderConfig(
    vocab_size=300, dim=48, head_dim=16, num_heads=4, ffn_dim=80, num_layers=3
)
TEXT_LEN = 96
PROMPT = "  A cat &amp;amp; a dog,\n in   the schÃ¶n rain "


@pytest.fixture
def tokenizer(tmp_path):
    make.write_tokenizer(tmp_path / "tokenizer")
    return text_encoder.load_tokenizer(tmp_path / "tokenizer")


@pytest.fixture
def native_weights():
    """A native T5 file's tensors, drawn here by hand."""
    generator = torch.Generator().manual_seed(3)
    inner = SIZES.num_heads * SIZES.head_dim
    layer = {
        "norm1.weight": (SIZES.dim,),
        "norm2.weight": (SIZES.dim,),
        "attn.q.weight": (inner, SIZES.dim),
        "attn.k.weight": (inner, SIZES.dim),
        "attn.v.weight": (inner, SIZES.dim),
        "attn.o.weight": (SIZES.dim, inner),
        "pos_embedding.embedding.weight": (SIZES.num_buckets, SIZES.num_heads),
        "ffn.gate.0.weight": (SIZES.ffn_dim, SIZES.dim),
        "ffn.fc1.weight": (SIZES.ffn_dim, SIZES.dim),
        "ffn.fc2.weight": (SIZES.dim, SIZES.ffn_dim),
    }
    shapes = {f"blocks.{i}.{name}": shape for i in range(3) for name, shape in layer.items()}
    shapes |= {"token_embedding.weight": (SIZES.vocab_size, SIZES.dim), "norm.weight": (SIZES.dim,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        / (math.sqrt(shape[-1]) if len(shape) > 1 and "embedding" not in name else 1)
        for name, shape in shapes.items()
    }


def encoder_of(native, tokenizer):
    network = text_encoder.build_network(SIZES).to(torch.float64).eval()
    names = weight_names.text_encoder_to_transformers(SIZES.num_layers)
    tensors = {names[name]: tensor for name, tensor in native.items()}
    tensors["encoder.embed_tokens.weight"] = tensors["shared.weight"]
    network.load_state_dict(tensors)
    return text_encoder.TextEncoder(network, tokenizer, text_len=TEXT_LEN)


def bucket(distance, num_buckets=32, max_distance=128):
    """T5's bidirectional buckets, key position minus query position."""
    half = num_buckets // 2
    side, distance = (half if distance > 0 else 0), abs(distance)
    exact = half // 2
    if distance < exact:
        return side + distance
    logarithmic = exact + int(
        math.log(distance / exact) / math.log(max_distance / exact) * (half - exact)
    )
    return side + min(half - 1, logarithmic)


def by_formula(native, ids, mask):
    """The UMT5 encoder written from its formulas over the whole padded row, in fp64."""

    def rms(x, weight):
        return x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight

    def heads(x, weight):
        return (x @ weight.T).view(len(ids), SIZES.num_heads, SIZES.head_dim)

    positions = range(len(ids))
    buckets = torch.tensor([[bucket(key - query) for key in positions] for query in positions])
    x = native["token_embedding.weight"][ids]
    for i in range(SIZES.num_layers):
        w = {
            name.removeprefix(f"blocks.{i}."): tensor
            for name, tensor in native.items()
            if name.startswith(f"blocks.{i}.")
        }
        h = rms(x, w["norm1.weight"])
        q, k, v = (heads(h, w[f"attn.{part}.weight"]) for part in "qkv")
        scores = torch.einsum("qhd,khd->hqk", q, k)
        scores = scores + w["pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        scores = scores.masked_fill(~mask[None, None, :], -torch.inf)
        mixed = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
        x = x + mixed @ w["attn.o.weight"].T
        h = rms(x, w["norm2.weight"])
        gate = functional.gelu(h @ w["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (h @ w["ffn.fc1.weight"].T)) @ w["ffn.fc2.weight"].T
    return rms(x, native["norm.weight"]) * mask[:, None]


@pytest.fixture
def norms_in_fp64(monkeypatch):
    """transformers takes the variance inside its norms in fp32, which alone costs 1e-6."""

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)

    monkeypatch.setattr(modeling_umt5.UMT5LayerNorm, "forward", forward)


def padded(tokenizer, cleaned):
    row = tokenizer(cleaned, padding="max_length", truncation=True, max_length=TEXT_LEN)
    return torch.tensor(row["input_ids"]), torch.tensor(row["attention_mask"]).bool()


@pytest.mark.parametrize("prompt", [PROMPT, "", "x" * 200], ids=["words", "empty", "too-long"])
def test_context_is_that_of_the_formulas(
    prompt, native_weights, tokenizer, relative_error, norms_in_fp64
):
    context = encoder_of(native_weights, tokenizer).encode(prompt)
    assert context.shape == (1, TEXT_LEN, SIZES.dim)
    ids, mask = padded(tokenizer, text_encoder.clean(prompt))
    assert relative_error(context, by_formula(native_weights, ids, mask)[None]) < 1e-9


def test_context_is_that_of_transformers_with_padding_and_mask(
    native_weights, tokenizer, relative_error
):
    """Running only the prompt's own tokens equals 512 padded rows under a mask, to rounding."""
    ours = encoder_of(native_weights, tokenizer)
    reference = UMT5EncoderModel(
        UMT5Config(
            vocab_size=SIZES.vocab_size,
            d_model=SIZES.dim,
            d_kv=SIZES.head_dim,
            d_ff=SIZES.ffn_dim,
            num_layers=SIZES.num_layers,
            num_heads=SIZES.num_heads,
        )
    )
    reference.to(torch.float64).eval().load_state_dict(ours.network.state_dict())
    ids, mask = padded(tokenizer, "A cat & a dog, in the schön rain")
    states = reference(ids[None], attention_mask=mask[None]).last_hidden_state
    expected = states * mask[None, :, None]
    context = ours.encode(PROMPT)
    assert (context - expected).abs().max() < 1e-9
    assert relative_error(context, expected) < 1e-9
    assert torch.count_nonzero(context[:, int(mask.sum()) :]) == 0


def test_full_size_has_the_parameters_of_umt5_xxl():
    with torch.device("meta"):
        network = text_encoder.build_network(config.UMT5_XXL)
    assert sum(parameter.numel() for parameter in network.parameters()) == 5_680_910_336
    names = weight_names.text_encoder_to_transformers(config.UMT5_XXL.num_layers)
    tied = {"encoder.embed_tokens.weight"}
    assert set(names.values()) == network.state_dict().keys() - tied
    shapes = network.state_dict()
    assert shapes[names["blocks.23.pos_embedding.embedding.weight"]].shape == (32, 64)
    assert shapes[names["blocks.0.ffn.fc2.weight"]].shape == (4096, 10240)
