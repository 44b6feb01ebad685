"""Model folders into networks: built on `meta`, loaded strictly, nothing guessed.

The networks have no load hooks; other people's names and shapes are dealt with here.
"""

import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import safetensors
import safetensors.torch
import torch
import transformers
from torch import Tensor, nn

from models import (
    config,
    config_files,
    errors,
    foreign_files,
    image_encoder,
    layout,
    quantization,
    quantized_names,
    text_encoder,
    torch_files,
    transformer,
    vae,
    weight_names,
)

WEIGHT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
READERS = 4  # more gain little (docs/performance.md, Loading), and each may convert a tensor
LAST_FRAME_TENSOR = "img_emb.emb_pos"  # only models between two frames have it
LOADER_ERRORS = (
    # What torch and safetensors raise for damaged files; there is no common class.
    OSError,
    RuntimeError,
    ValueError,
    EOFError,
    AssertionError,
    AttributeError,
    TypeError,
    LookupError,
    ArithmeticError,
    MemoryError,
    struct.error,
    zipfile.BadZipFile,
    safetensors.SafetensorError,
)
TIED_EMBEDDING = "encoder.embed_tokens.weight"  # transformers' second name for shared.weight


@dataclass(frozen=True)
class Networks:
    """What renders a prompt, on one device, frozen and in eval mode."""

    text_encoder: text_encoder.TextEncoder
    transformer: transformer.WanTransformer
    vae: vae.WanVAE


@dataclass(frozen=True)
class ImageToVideoNetworks(Networks):
    """What renders a prompt and a first frame."""

    image_encoder: image_encoder.ImageEncoder


@dataclass(frozen=True)
class TwoExpertNetworks(Networks):
    """Wan2.2's: `transformer` takes the first steps, from noise, the other one the last.

    For image-to-video there is no image encoder: the first frame is in the latents only.
    """

    low_noise_transformer: transformer.WanTransformer


def load(
    files: layout.ModelFiles,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    vae_dtype: torch.dtype | None = None,
) -> Networks:
    """Load a model that `layout.find` has found; the class tells of which kind it is.

    Text encoder and transformers compute in `dtype`, the latter with their small parameters in
    fp32; the image encoder in fp16 where `dtype` is bf16, as in official Wan. The autoencoder
    decodes in `vae_dtype`, by default in `dtype` (fp16: in fp32, it needs the range), and encodes
    at least in fp32. Raises CheckpointError for whatever is unreadable or not as the configs say.
    """
    sizes = _read_sizes(files)
    _check_transformers(files, sizes.transformer)
    common = Networks(
        text_encoder=_load_text(files, sizes, device, dtype),
        transformer=_load_transformer(files, sizes.transformer, device, dtype),
        vae=_load_vae(files, sizes.vae, device, vae_dtype or _dtype_of_frames(dtype)),
    )
    if files.low_noise_transformer:
        low_noise = _load_transformer(files, sizes.transformer, device, dtype, low_noise=True)
        return TwoExpertNetworks(**vars(common), low_noise_transformer=low_noise)
    if sizes.image_encoder is not None:
        clip = _load_image_encoder(files, sizes.image_encoder, device, dtype)
        return ImageToVideoNetworks(**vars(common), image_encoder=clip)
    return common


def _check_transformers(files: layout.ModelFiles, sizes: config.TransformerConfig) -> None:
    """Two must be alike; one for images must take what the image encoder makes."""
    if files.low_noise_config is not None:
        if layout.transformer_sizes(files, files.low_noise_config) != sizes:
            problem = f"describes other dimensions than {files.transformer_config}"
            raise errors.ConfigError(files.low_noise_config, problem)
    elif files.task is layout.Task.IMAGE_TO_VIDEO and not files.image_encoder:
        problem = "takes no image tokens, as Wan2.1's image-to-video does"
        raise errors.ConfigError(files.transformer_config, problem)


@dataclass(frozen=True)
class Surroundings:
    """Everything of a model but its transformer, frozen and in eval mode."""

    text_encoder: text_encoder.TextEncoder
    vae: vae.WanVAE
    image_encoder: image_encoder.ImageEncoder | None


def load_surroundings(
    files: layout.ModelFiles, *, device: torch.device | str, dtype: torch.dtype
) -> Surroundings:
    """Load encoders and autoencoder, the latter at least in fp32; otherwise as `load`."""
    sizes = _read_sizes(files)
    clip = None
    if sizes.image_encoder is not None:
        clip = _load_image_encoder(files, sizes.image_encoder, device, dtype)
    return Surroundings(
        text_encoder=_load_text(files, sizes, device, dtype),
        vae=_load_vae(files, sizes.vae, device, transformer.widened(dtype)),
        image_encoder=clip,
    )


def load_transformer(
    files: layout.ModelFiles, *, device: torch.device | str, dtype: torch.dtype
) -> transformer.WanTransformer:
    """Load the only transformer, alone. Raises CheckpointError, also where there are two."""
    if files.low_noise_transformer:
        found, wanted = "two transformers, as Wan2.2 has", "one transformer, as Wan2.1 has"
        raise errors.CheckpointError(f"{files.root}: holds a model of {found}, not of {wanted}")
    return _load_transformer(files, _read_sizes(files).transformer, device, dtype)


def load_vae(
    files: layout.ModelFiles, *, device: torch.device | str, dtype: torch.dtype
) -> vae.WanVAE:
    """Load the autoencoder alone. Raises CheckpointError."""
    return _load_vae(files, _read_sizes(files).vae, device, dtype)


def transformer_sizes(files: layout.ModelFiles) -> config.TransformerConfig:
    """The transformer's dimensions, read from the configs. Raises CheckpointError."""
    return _read_sizes(files).transformer


@dataclass(frozen=True)
class _Sizes:
    transformer: config.TransformerConfig
    vae: config.VAEConfig
    text_encoder: config.TextEncoderConfig
    image_encoder: config.ImageEncoderConfig | None


def _load_text(
    files: layout.ModelFiles, sizes: _Sizes, device: torch.device | str, dtype: torch.dtype
) -> text_encoder.TextEncoder:
    tokenizer = text_encoder.load_tokenizer(files.tokenizer)
    if len(tokenizer) > sizes.text_encoder.vocab_size:
        problem = f"has {len(tokenizer)} tokens, the encoder only {sizes.text_encoder.vocab_size}"
        raise errors.ConfigError(files.tokenizer / layout.TOKENIZER_FILE, problem)
    encoder = _load_text_encoder(files, sizes.text_encoder, device, dtype)
    return text_encoder.TextEncoder(encoder, tokenizer, text_len=sizes.transformer.text_len)


def _read_sizes(files: layout.ModelFiles) -> _Sizes:
    path = files.transformer_config
    found = _Sizes(
        transformer=layout.transformer_sizes(files, path),
        vae=layout.vae_sizes(files),
        text_encoder=layout.text_encoder_sizes(files),
        image_encoder=_read_image_encoder_sizes(files),
    )
    _check_channels(found.transformer, found.vae, files)
    _check_they_fit(found, path)
    return found


def _read_image_encoder_sizes(files: layout.ModelFiles) -> config.ImageEncoderConfig | None:
    if not files.image_encoder:
        return None
    path = files.image_encoder_config
    return config_files.image_encoder(path) if path else config.CLIP_VIT_H_14


def _check_they_fit(sizes: _Sizes, path: Path) -> None:
    dit, text_dim, clip = sizes.transformer, sizes.text_encoder.dim, sizes.image_encoder
    if clip is not None and dit.image_dim != clip.dim:
        raise errors.ConfigError(
            path, f"takes an image of width {dit.image_dim}, the encoder's: {clip.dim}"
        )
    if dit.text_dim != text_dim:
        raise errors.ConfigError(
            path, f"takes text of width {dit.text_dim}, the encoder's: {text_dim}"
        )


def _check_channels(
    dit: config.TransformerConfig, autoencoder: config.VAEConfig, files: layout.ModelFiles
) -> None:
    """Latents go in and come out; for image-to-video a mask and a condition go in with them."""
    z_dim = autoencoder.z_dim
    takes_image = files.task is layout.Task.IMAGE_TO_VIDEO
    expected_in = 2 * z_dim + autoencoder.temporal_stride if takes_image else z_dim
    if (dit.in_dim, dit.out_dim) != (expected_in, z_dim):
        problem = (
            f"has {dit.in_dim} in and {dit.out_dim} out, the autoencoder {z_dim} channels; "
            f"expected {expected_in} in and {z_dim} out"
        )
        raise errors.ConfigError(files.transformer_config, problem)


def _load_transformer(
    files: layout.ModelFiles,
    sizes: config.TransformerConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    *,
    low_noise: bool = False,
) -> transformer.WanTransformer:
    paths = files.experts[low_noise]
    with torch.device("meta"):
        network = transformer.WanTransformer(sizes)
    tensors = _read_transformer(paths, network)
    tensors, quantized = quantization.prepare(network, tensors, _named(paths))
    native = network.state_dict().keys()
    dtypes = {name: transformer.parameter_dtype(name, dtype) for name in native} | quantized
    load_strictly(network, tensors, path=_named(paths), device=device, dtypes=dtypes)
    return network


def read_transformer(files: layout.ModelFiles, *, low_noise: bool = False) -> dict[str, Tensor]:
    """A transformer's tensors under native names as they are stored, mapped, not yet read."""
    with torch.device("meta"):
        network = transformer.WanTransformer(_read_sizes(files).transformer)
    return _read_transformer(files.experts[low_noise], network)


def _read_transformer(
    paths: tuple[Path, ...], network: transformer.WanTransformer
) -> dict[str, Tensor]:
    native = network.state_dict().keys()
    scales = quantized_names.scale_names(native)
    # No native name is another's there.
    names = weight_names.transformer_from_diffusers(native | scales)
    dtypes = WEIGHT_DTYPES + quantization.CODE_DTYPES
    for path in paths:
        if path.suffix == ".safetensors":
            quantized_names.check_settings(path)
    tensors = read_tensors(
        paths,
        names,
        unused=quantized_names.SETTINGS_NAMES,
        dtypes=dtypes,
        prefixes=weight_names.TRANSFORMER_PREFIXES,
    )
    if LAST_FRAME_TENSOR in tensors:
        problem = f"holds {LAST_FRAME_TENSOR}: {config_files.FIRST_AND_LAST_FRAME}"
        raise errors.ConfigError(_named(paths), problem)
    return tensors


def _dtype_of_frames(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype == torch.float16 else dtype


def _load_vae(
    files: layout.ModelFiles,
    sizes: config.VAEConfig,
    device: torch.device | str,
    dtype: torch.dtype,
) -> vae.WanVAE:
    with torch.device("meta"):
        network = vae.WanVAE(sizes)
    native, names = network.state_dict().keys(), {}
    if files.layout is layout.Layout.DIFFUSERS:
        blocks = sizes.num_res_blocks
        names = weight_names.vae_from_diffusers(native, num_res_blocks=blocks)
    tensors = read_tensors(files.vae, names)
    dtypes = {name: vae.parameter_dtype(name, dtype) for name in native}
    load_strictly(network, tensors, path=_named(files.vae), device=device, dtypes=dtypes)
    vae.to_channels_last(network)
    return network


def _load_text_encoder(
    files: layout.ModelFiles,
    sizes: config.TextEncoderConfig,
    device: torch.device | str,
    dtype: torch.dtype,
) -> transformers.UMT5EncoderModel:
    with torch.device("meta"):
        network = text_encoder.build_network(sizes)
    is_native = files.layout is layout.Layout.NATIVE
    names = weight_names.text_encoder_to_transformers(sizes.num_layers) if is_native else {}
    tensors = read_tensors(files.text_encoder, names)
    if "shared.weight" in tensors:
        tensors[TIED_EMBEDDING] = tensors["shared.weight"]
    dtypes = dict.fromkeys(network.state_dict(), dtype)
    load_strictly(network, tensors, path=_named(files.text_encoder), device=device, dtypes=dtypes)
    network.tie_weights()
    return network


def _load_image_encoder(
    files: layout.ModelFiles,
    sizes: config.ImageEncoderConfig,
    device: torch.device | str,
    dtype: torch.dtype,
) -> image_encoder.ImageEncoder:
    with torch.device("meta"):
        network = image_encoder.ImageEncoder(sizes)
    expected, names = network.state_dict(), {}
    if files.layout is layout.Layout.DIFFUSERS:
        names = weight_names.image_encoder_from_transformers(expected)
    tensors = read_tensors(files.image_encoder, names, unused=weight_names.UNUSED_OF_CLIP)
    load_strictly(
        network,
        joined_qkv(tensors, expected) if names else tensors,
        path=_named(files.image_encoder),
        device=device,
        # As in official Wan, where all else is in bf16.
        dtypes=dict.fromkeys(expected, torch.float16 if dtype == torch.bfloat16 else dtype),
    )
    return network


def joined_qkv(tensors: Mapping[str, Tensor], expected: Iterable[str]) -> dict[str, Tensor]:
    """transformers' q, k and v as one tensor; its embeddings with the native axes of length 1."""
    native = dict(tensors)
    for name in expected:
        parts = weight_names.split_qkv(name)
        if len(parts) > 1 and native.keys() >= set(parts):
            native[name] = torch.cat([native.pop(part) for part in parts])
        elif name.endswith(("cls_embedding", "pos_embedding")) and name in native:
            native[name] = native[name].reshape(1, -1, native[name].shape[-1])
    return native


def read_tensors(
    paths: Iterable[Path],
    names: Mapping[str, str] | None = None,
    *,
    unused: re.Pattern[str] | None = None,
    dtypes: tuple[torch.dtype, ...] = WEIGHT_DTYPES,
    prefixes: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """The tensors of files, renamed by `names` where it knows them; data is mapped, not yet read.

    Names that `unused` matches are passed over. One of `prefixes` is taken away where all names of
    a file have it.
    Raises UnreadableWeightsError for a broken file, for anything in it but float tensors, and for
    a name that two files share.
    """
    tensors: dict[str, Tensor] = {}
    for path in paths:
        content = _read_file(path)
        prefix = weight_names.common_prefix(content, prefixes)
        for name, tensor in content.items():
            if not isinstance(name, str):
                raise errors.UnreadableWeightsError(path, f"{name!r} is no name of a tensor")
            if unused is not None and unused.match(name):
                continue
            bare = name.removeprefix(prefix)
            native = (names or {}).get(bare, bare)
            if native in tensors:
                raise errors.UnreadableWeightsError(path, f"{name} is also in another shard")
            if not isinstance(tensor, Tensor):
                kind = type(tensor).__name__
                raise errors.UnreadableWeightsError(path, f"{name} is a {kind}, not a tensor")
            if tensor.layout is not torch.strided or tensor.is_meta:
                raise errors.UnreadableWeightsError(path, f"{name} is no plain tensor")
            if tensor.dtype not in dtypes:
                raise errors.UnreadableWeightsError(path, errors.unknown_dtype(name, tensor.dtype))
            tensors[native] = tensor
    return tensors


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu")
        # Files from before torch 1.6 are no zip archives and cannot be mapped.
        can_map = torch_files.is_archive(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except UnpicklingError as error:
        reason = "it is damaged, or holds Python objects, which are never executed"
        raise errors.UnreadableWeightsError(path, foreign_files.told(path) or reason) from error
    except LOADER_ERRORS as error:
        reason = foreign_files.told(path) or (str(error) or repr(error)).splitlines()[0]
        raise errors.UnreadableWeightsError(path, reason) from error
    if not isinstance(loaded, dict):
        raise errors.UnreadableWeightsError(path, f"it holds a {type(loaded).__name__}, no names")
    if not torch_files.OF_TRAINING.isdisjoint(loaded):
        raise errors.UnreadableWeightsError(path, torch_files.TRAINING)
    return loaded


def load_strictly(
    network: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    path: Path,
    device: torch.device | str,
    dtypes: Mapping[str, torch.dtype],
) -> None:
    """Give a network built on `meta` its weights; freeze it and set it to eval.

    Raises WeightsMismatchError unless names and shapes are exactly the network's, and
    UnreadableWeightsError for NaN or infinity: the renders would look like those of a bad machine.
    """
    expected = network.state_dict()
    wrong_shapes = {
        name: (tuple(tensors[name].shape), tuple(expected[name].shape))
        for name in expected.keys() & tensors.keys()
        if tensors[name].shape != expected[name].shape
    }
    missing, unused = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected)
    if missing or unused or wrong_shapes:
        wrong_shapes = dict(sorted(wrong_shapes.items()))
        raise errors.WeightsMismatchError(
            path, missing=missing, unused=unused, wrong_shapes=wrong_shapes
        )
    on_device = owned({name: tensors[name] for name in expected}, device, dtypes)
    for name, tensor in on_device.items():
        if not _is_finite(tensor):
            problem = f"{name} holds NaN or infinity in {tensor.dtype}"
            raise errors.UnreadableWeightsError(path, problem)
    network.load_state_dict(on_device, assign=True)
    network.requires_grad_(False).eval()


def _is_finite(tensor: Tensor) -> bool:
    """By its extremes, which takes a tenth of the time of looking at each number."""
    if tensor.dtype not in WEIGHT_DTYPES or not tensor.numel():
        return True
    return all(bool(extreme.isfinite()) for extreme in tensor.aminmax())


def owned(
    mapped: Mapping[str, Tensor], device: torch.device | str, dtypes: Mapping[str, torch.dtype]
) -> dict[str, Tensor]:
    """Copies on the device, read by several at a time: one reader waits for each page of a file.

    Copies also where nothing is converted: the file may be replaced while it is mapped. What has
    two names is copied once.
    """
    here = torch.empty(0, device=device).device  # which one "cuda" is, each thread has for itself

    def read(name: str) -> Tensor:
        return mapped[name].to(here, dtypes[name], copy=True)

    places = {name: (id(mapped[name]), dtypes[name]) for name in mapped}
    distinct = {place: name for name, place in places.items()}
    with ThreadPoolExecutor(READERS, thread_name_prefix="weights") as readers:
        copies = dict(zip(distinct, readers.map(read, distinct.values()), strict=True))
    return {name: copies[place] for name, place in places.items()}


def _named(files: tuple[Path, ...]) -> Path:
    """What to call the weights in a message: the file, or the folder of its shards."""
    return files[0] if len(files) == 1 else files[0].parent
