"""A model folder with Wan2.1's sizes and random weights, for a worker that is to be measured."""

import dataclasses
from pathlib import Path

import torch
from torch import nn

from models import config, layout, text_encoder, transformer, vae
from models.tiny import folders, make

BF16 = torch.bfloat16


def write(
    folder: Path,
    *,
    text_layers: int,
    sizes: config.TransformerConfig = config.WAN_T2V_1_3B,
    autoencoder: config.VAEConfig = config.WAN_VAE,
    text: config.TextEncoderConfig = config.UMT5_XXL,
) -> None:
    """In bf16, as released; made on the GPU where there is one. 14 GB with 24 text layers."""
    text = dataclasses.replace(text, num_layers=text_layers)
    make.write_tokenizer(folder / layout.TOKENIZER_FOLDER)
    folders.write_transformer_config(folder, sizes)
    with torch.device("meta"):
        networks = (
            transformer.WanTransformer(sizes),
            vae.WanVAE(autoencoder),
            text_encoder.build_network(text),
        )
    dit, frames, encoder = (_filled(network) for network in networks)
    folders.save(folders.tensors(dit, BF16), folder / f"{layout.TRANSFORMER_STEM}.safetensors")
    folders.write_vae(folder, frames, dtype=BF16)  # type: ignore[arg-type]  # the WanVAE again
    folders.write_text_encoder(folder, encoder, text, dtype=BF16)
    torch.cuda.empty_cache()  # else as much of the GPU stays with this process as they took on it


@torch.no_grad()
def _filled(network: nn.Module) -> nn.Module:
    """Weights that keep signals at about their size."""
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
    return network.cpu()
