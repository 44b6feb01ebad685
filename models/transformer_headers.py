"""Whether a model's files can be loaded, as far as their headers tell it. Loads no torch.

The loader refuses the same, after minutes of reading.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from models import (
    config,
    errors,
    layout,
    lora_keys,
    memory,
    quantized_names,
    safetensors_files,
    weight_names,
)
from models.safetensors_files import Entry

FLOATS = ("F64", "F32", "BF16", "F16")
"""Those of `checkpoint.WEIGHT_DTYPES`."""
CODES = quantized_names.DTYPES
PATCHES = "patch_embedding.weight"
BLOCK = re.compile(r"blocks\.(\d+)\.")


def check(files: layout.ModelFiles) -> None:
    """Raise a CheckpointError where the loader would. LoRAs are not looked at."""
    sizes = layout.transformer_sizes(files, files.transformer_config)
    for paths in filter(None, files.experts):
        named = paths[0] if len(paths) == 1 else paths[0].parent
        for path in paths:
            _check_dtypes(path, FLOATS + CODES, unused=quantized_names.SETTINGS_NAMES)
            if path.suffix == ".safetensors":
                quantized_names.check_settings(path)
        entries = memory.headers(paths, prefixes=weight_names.TRANSFORMER_PREFIXES)
        quantized_names.inspect({name: entry.dtype for name, entry in entries.items()}, named)
        _check_sizes(entries, sizes, named, files.transformer_config)
    for path in files.vae + files.text_encoder:
        _check_dtypes(path, FLOATS)
    for path in files.image_encoder:
        _check_dtypes(path, FLOATS, unused=weight_names.UNUSED_OF_CLIP)


def check_lora(path: Path, files: layout.ModelFiles) -> None:
    """Raise UnfitLoraError for one that is not in safetensors, for an image-to-video one on a
    text-to-video model, or where all of it would be passed over. Whether its other keys fit is
    seen when it is merged.

    Raises UnreadableWeightsError where there is no header.
    """
    if path.suffix != ".safetensors":
        raise errors.UnfitLoraError(path, lora_keys.ONLY_SAFETENSORS)
    header = safetensors_files.read_header(path)
    keys = _for_missing_encoder(header, files)
    takes_image = files.task is layout.Task.IMAGE_TO_VIDEO
    if keys and (not takes_image or len(keys) == len(header)):
        hint = lora_keys.not_for_images(takes_image=takes_image)
        raise errors.UnfitLoraError(path, f"{len(keys)} keys are for images ({keys[0]}). {hint}")


def keys_passed_over(path: Path, files: layout.ModelFiles) -> int:
    """How many keys of a LoRA that `check_lora` takes are for an image encoder that the model does
    not have.

    Raises UnreadableWeightsError where there is no header.
    """
    return len(_for_missing_encoder(safetensors_files.read_header(path), files))


def _for_missing_encoder(keys: Iterable[str], files: layout.ModelFiles) -> list[str]:
    found = lora_keys.for_images(keys)
    if found and lora_keys.for_images(memory.headers(files.transformer)):
        return []
    return found


def _check_dtypes(
    path: Path, dtypes: tuple[str, ...], *, unused: re.Pattern[str] | None = None
) -> None:
    for name, entry in memory.headers([path]).items():
        if entry.dtype not in dtypes and not (unused and unused.match(name)):
            raise errors.UnreadableWeightsError(path, errors.unknown_dtype(name, entry.dtype))


def _check_sizes(
    entries: Mapping[str, Entry], sizes: config.TransformerConfig, path: Path, said_by: Path
) -> None:
    blocks = {match[1] for match in map(BLOCK.match, entries) if match}
    if PATCHES not in entries:
        unused = () if blocks else sorted(entries)
        raise errors.WeightsMismatchError(path, missing=[PATCHES], unused=unused)
    expected = (sizes.dim, sizes.in_dim, *sizes.patch_size)
    if entries[PATCHES].shape != expected:
        problem = f"describes a {PATCHES} of {list(expected)}, {path} has one of"
        problem += f" {list(entries[PATCHES].shape)}"
        raise errors.ConfigError(said_by, problem, against=path)
    if len(blocks) != sizes.num_layers:
        problem = f"describes {sizes.num_layers} blocks (num_layers), {path} has {len(blocks)}"
        raise errors.ConfigError(said_by, problem, against=path)
