"""A model folder with Wan2.1's sizes and random weights, for a worker that is to be measured."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from models import config, layout, text_encoder, transformer, vae
from models.tiny import folders, make

BF16 = torch.bfloat16
Network = TypeVar("Network", bound=nn.Module)


def write(
    folder: Path,
    *,
    text_layers: int,
    sizes: config.TransformerConfig = config.WAN_T2V_1_3B,
    autoencoder: config.VAEConfig = config.WAN_VAE,
    text: config.TextEncoderConfig = config.UMT5_XXL,
) -> None:
    """In bf16, as released; made on the GPU where there is one, one network after the other.

    With 24 text layers 14 GB, and 40 GB with 14B's sizes.
    """
    text = dataclasses.replace(text, num_layers=text_layers)
    make.write_tokenizer(folder / layout.TOKENIZER_FOLDER)
    folders.write_transformer_config(folder, sizes)
    weights = folder / f"{layout.TRANSFORMER_STEM}.safetensors"
    folders.save(folders.tensors(_filled(lambda: transformer.WanTransformer(sizes)), BF16), weights)
    folders.write_vae(folder, _filled(lambda: vae.WanVAE(autoencoder)), dtype=BF16)
    encoder = _filled(lambda: text_encoder.build_network(text))
    folders.write_text_encoder(folder, encoder, text, dtype=BF16)
    del encoder
    torch.cuda.empty_cache()  # else as much of the GPU stays with this process as they took on it


@torch.no_grad()
def _filled(make_network: Callable[[], Network]) -> Network:
    """Weights that keep signals at about their size."""
    with torch.device("meta"):
        network = make_network()
    network = network.to(BF16).to_empty(device="cuda" if torch.cuda.is_available() else "cpu")
    for name, tensor in network.state_dict().items():
        if not tensor.is_floating_point():
            continue
        if tensor.ndim > 1 and not name.endswith(("modulation", "gamma")):
            tensor.normal_(std=tensor[0].numel() ** -0.5)
        elif name.endswith(("bias", "modulation")):
            tensor.normal_(std=0.02)
        else:
            tensor.fill_(1.0)
    return network
