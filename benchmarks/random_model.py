"""A model folder with Wan2.1's sizes and random weights, for a worker that is to be measured."""

import dataclasses
from pathlib import Path

import torch

from benchmarks import networks
from models import config, layout
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
    """In bf16, as released; made on the GPU where there is one, one network after the other.

    With 24 text layers 14 GB, and 40 GB with 14B's sizes.
    """
    text = dataclasses.replace(text, num_layers=text_layers)
    make.write_tokenizer(folder / layout.TOKENIZER_FOLDER)
    folders.write_transformer_config(folder, sizes)
    weights = folder / f"{layout.TRANSFORMER_STEM}.safetensors"
    folders.save(folders.tensors(networks.filled(networks.on_meta(sizes)), BF16), weights)
    folders.write_vae(folder, networks.filled(networks.autoencoder(autoencoder)), dtype=BF16)
    encoder = networks.filled(networks.text_encoder(text))
    folders.write_text_encoder(folder, encoder, text, dtype=BF16)
    del encoder
    torch.cuda.empty_cache()  # else as much of the GPU stays with this process as they took on it
