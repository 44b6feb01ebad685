"""Write the networks of a model folder in the native layout, as `layout` finds them."""

import json
from pathlib import Path
from typing import Any

import safetensors.torch
import tokenizers
import torch
from torch import Tensor, nn

from models import config, image_encoder, layout, vae, weight_names

LORA_FILE = Path("loras") / "distill_lora.safetensors"
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")  # ids 0, 1, 2, as UMT5 numbers them


def write_transformer_config(folder: Path, sizes: config.TransformerConfig) -> None:
    write_json(folder / "config.json", _transformer_json(sizes))


def write_vae(folder: Path, network: vae.WanVAE, *, dtype: torch.dtype = torch.float32) -> None:
    write_json(folder / "vae_config.json", _vae_json(network.config))
    torch.save(tensors(network, dtype), folder / layout.VAE_FILE)


def write_text_encoder(
    folder: Path,
    network: nn.Module,
    sizes: config.TextEncoderConfig,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    write_json(folder / "t5_config.json", _text_encoder_json(sizes))
    theirs = tensors(network, dtype)
    names = weight_names.text_encoder_to_transformers(sizes.num_layers)
    native = {name: theirs[name_there] for name, name_there in names.items()}
    torch.save(native, folder / layout.TEXT_ENCODER_FILE)


def write_image_encoder(
    folder: Path, network: image_encoder.ImageEncoder, *, dtype: torch.dtype = torch.float32
) -> None:
    write_json(folder / "clip_config.json", _image_encoder_json(network.config))
    torch.save(tensors(network, dtype), folder / layout.IMAGE_ENCODER_FILE)


def write_tokenizer(folder: Path, made: tokenizers.Tokenizer, *, text_len: int) -> None:
    """As transformers reads it, with `</s>` at the end of each text."""
    folder.mkdir(parents=True, exist_ok=True)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", made.token_to_id("</s>"))]
    )
    made.add_special_tokens(list(SPECIAL_TOKENS))
    made.save(str(folder / layout.TOKENIZER_FILE))
    special = dict(zip(("pad_token", "eos_token", "unk_token"), SPECIAL_TOKENS, strict=True))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": text_len}
    write_json(folder / "tokenizer_config.json", {**settings, **special})


def save(some: dict[str, Tensor], path: Path) -> None:
    """As safetensors, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(some, path)
    path.chmod(0o644)  # as any other file; the library makes it its owner's alone


def tensors(network: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    state = network.state_dict()
    return {name: tensor.to("cpu", dtype).contiguous() for name, tensor in state.items()}


def write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _transformer_json(sizes: config.TransformerConfig) -> dict[str, Any]:
    names = "dim eps ffn_dim freq_dim in_dim num_heads num_layers out_dim text_dim text_len"
    task: dict[str, Any] = {"model_type": "t2v"}
    if sizes.image_dim is not None:
        task = {"model_type": "i2v", "image_dim": sizes.image_dim}
    return task | {name: getattr(sizes, name) for name in names.split()}


def _vae_json(sizes: config.VAEConfig) -> dict[str, Any]:
    return {
        "base_dim": sizes.base_dim,
        "z_dim": sizes.z_dim,
        "dim_mult": sizes.dim_mult,
        "num_res_blocks": sizes.num_res_blocks,
        "temperal_downsample": sizes.temporal_downsample,
        "latents_mean": sizes.latent_mean,
        "latents_std": sizes.latent_std,
    }


def _text_encoder_json(sizes: config.TextEncoderConfig) -> dict[str, Any]:
    return {
        "model_type": "umt5",
        "vocab_size": sizes.vocab_size,
        "d_model": sizes.dim,
        "d_kv": sizes.head_dim,
        "d_ff": sizes.ffn_dim,
        "num_layers": sizes.num_layers,
        "num_heads": sizes.num_heads,
        "relative_attention_num_buckets": sizes.num_buckets,
        "relative_attention_max_distance": sizes.max_distance,
        "layer_norm_epsilon": sizes.eps,
        "feed_forward_proj": "gated-gelu",
    }


def _image_encoder_json(sizes: config.ImageEncoderConfig) -> dict[str, Any]:
    return {
        "model_type": "clip_vision_model",
        "image_size": sizes.image_size,
        "patch_size": sizes.patch_size,
        "hidden_size": sizes.dim,
        "intermediate_size": sizes.ffn_dim,
        "num_attention_heads": sizes.num_heads,
        "num_hidden_layers": sizes.num_layers,
        "layer_norm_eps": sizes.eps,
        "hidden_act": "gelu",
    }
