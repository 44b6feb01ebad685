"""Write a tiny model: `python -m models.tiny.make FOLDER [--task t2v|i2v] [--seed 0]`.

Its weights are random, so its pictures are noise that changes with prompt, seed and frame; it is
for tests that need a whole model's shapes. The same seed gives the same bytes. The models that draw
pictures are in `shipped`.
"""

import argparse
import math
import shutil
import sys
import tempfile
from pathlib import Path

import tokenizers
import torch
from torch import Tensor, nn

from models import (
    config,
    errors,
    image_encoder,
    layout,
    lora,
    lora_switcher,
    text_encoder,
    transformer,
    transformer_files,
    vae,
)
from models.tiny import folders

VELOCITY_SCALE = 0.7  # keeps the clean latents near unit spread, where the decoder varies most
TEXT_SCALE = 5.0  # most of the 512 context rows are zero and would drown a short prompt
IMAGE_SCALE = 5.0  # latents of a still picture and of zeros are small beside noise
FRAME_SCALE = 0.3  # how much a frame made by upsampling in time differs from its neighbours
TUNED_SCALE = 0.3  # how far the distilled weights are from the base, of the weights' own size
LORA_RANK = 4
SMALLEST_PAIR = 1_000  # elements; LightX2V keeps what is smaller than a million whole
PICTURE_SCALE = 0.8  # spreads pixels over [-1, 1] without many of them at the ends


def make(folder: Path, *, seed: int = 0, task: layout.Task = layout.Task.TEXT_TO_VIDEO) -> Path:
    """Write a complete tiny model to `folder`, all or nothing, and return it.

    A folder that is complete already is left as it is. Raises FileExistsError for one that holds
    anything else, a model for another task included.
    """
    if _is_complete(folder, task):
        return folder
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(
            f"{folder} exists and is not a model folder for {task.value}; remove it or use another"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        _write(scratch / folder.name, torch.Generator().manual_seed(seed), task)
        (scratch / folder.name).replace(folder)
    except OSError:
        # Another process may have been quicker; its model is as good.
        if not _is_complete(folder, task):
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


def _is_complete(folder: Path, task: layout.Task) -> bool:
    try:
        files = layout.find(folder, task=task)
    except errors.CheckpointError:
        return False
    return files.transformer == (folder / transformer_files.DISTILLED_FILES[0],)


def _write(folder: Path, generator: torch.Generator, task: layout.Task) -> None:
    has_image = task is layout.Task.IMAGE_TO_VIDEO
    sizes = config.TINY_I2V if has_image else config.TINY
    write_tokenizer(folder / layout.TOKENIZER_FOLDER)
    folders.write_transformer_config(folder, sizes)
    _write_transformers(folder, random_transformer(sizes, generator), generator)
    folders.write_vae(folder, random_vae(config.TINY_VAE, generator))
    encoder = random_text_encoder(config.TINY_TEXT_ENCODER, generator)
    folders.write_text_encoder(folder, encoder, config.TINY_TEXT_ENCODER)
    if has_image:
        clip = random_image_encoder(config.TINY_IMAGE_ENCODER, generator)
        folders.write_image_encoder(folder, clip)


def _write_transformers(
    folder: Path, base: transformer.WanTransformer, generator: torch.Generator
) -> None:
    """Base, a step-distillation LoRA for it, and the complete model that both make together."""
    native = folders.tensors(base)
    folders.save(native, folder / f"{layout.TRANSFORMER_STEM}.safetensors")
    tuned = {
        name: tensor + TUNED_SCALE * tensor.abs().mean() * _noise_like(tensor, generator)
        for name, tensor in native.items()
    }
    path = folder / folders.LORA_FILE
    pairs = lora.extract(native, tuned, LORA_RANK, smallest_pair=SMALLEST_PAIR)
    folders.save(pairs, path)
    lora_switcher.LoraSwitcher(base).apply([lora_switcher.Choice(path=path)])
    folders.save(folders.tensors(base), folder / transformer_files.DISTILLED_FILES[0])


def _noise_like(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)


def random_transformer(
    sizes: config.TransformerConfig, generator: torch.Generator
) -> transformer.WanTransformer:
    """A transformer whose velocity depends on latents, time, text and image about equally."""
    network = transformer.WanTransformer(sizes)
    _randomise(network, generator)
    with torch.no_grad():
        network.head.head.weight.mul_(VELOCITY_SCALE)
        if sizes.image_dim is not None:
            network.patch_embedding.weight[:, -sizes.out_dim :].mul_(IMAGE_SCALE)
        for name, parameter in network.named_parameters():
            if name.endswith("cross_attn.o.weight"):
                parameter.mul_(TEXT_SCALE)
    return network


def random_vae(sizes: config.VAEConfig, generator: torch.Generator) -> vae.WanVAE:
    """An autoencoder whose decoded latents fill the range of the pixels."""
    network = vae.WanVAE(sizes)
    _randomise(network, generator)
    with torch.no_grad():
        for name, layer in network.named_modules():
            if name.endswith("time_conv"):
                _lean_on_newest_frame(layer.get_parameter("weight"))
        network.get_parameter("decoder.head.2.weight").mul_(PICTURE_SCALE)
    return network


def random_text_encoder(sizes: config.TextEncoderConfig, generator: torch.Generator) -> nn.Module:
    network = text_encoder.build_network(sizes)
    _randomise(network, generator)
    return network


def random_image_encoder(
    sizes: config.ImageEncoderConfig, generator: torch.Generator
) -> image_encoder.ImageEncoder:
    network = image_encoder.ImageEncoder(sizes)
    _randomise(network, generator)
    return network


def _randomise(network: nn.Module, generator: torch.Generator) -> None:
    """Weights of spread 1 / sqrt(inputs), norms near one, biases small: signals keep their size."""
    for name, parameter in sorted(network.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name or name.endswith("gamma")
        if name.endswith(("modulation", "bias")):
            values = 0.2 * noise
        elif is_norm or parameter.ndim == 1:
            values = 1 + 0.1 * noise
        else:
            values = noise / math.sqrt(parameter[0].numel())
        parameter.data = values


def _lean_on_newest_frame(weight: Tensor) -> None:
    """Nearly the identity on the newest frame, so that neighbouring frames look related."""
    weight.mul_(FRAME_SCALE)
    for half in weight.split(weight.shape[1]):  # type: ignore[no-untyped-call]  # torch's stub
        half[:, :, -1, 0, 0].diagonal().add_(1.0)


def write_tokenizer(folder: Path) -> None:
    """Write a byte-level tokenizer: one token per byte, `</s>` at the end, any text encodable."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: id_ for id_, token in enumerate((*folders.SPECIAL_TOKENS, *alphabet))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    folders.write_tokenizer(folder, tokenizer, text_len=config.WAN_TEXT_LEN)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m models.tiny.make", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--task", choices=layout.TASKS, default="t2v")
    options = parser.parse_args(arguments)
    made = make(options.folder, seed=options.seed, task=layout.TASKS[options.task])
    sys.stdout.write(f"{made}\n")


if __name__ == "__main__":
    main()
