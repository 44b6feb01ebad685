"""How much memory a render needs, estimated before any weight is read. No torch.

Weights are counted from the headers of the files, tensor by tensor, in the dtype they are loaded
in. Activations are the tensors that are alive together at the worst moment, counted on full-size
networks; the workspace of a kernel and the allocator's gaps come on top and are not known here.
"""

import enum
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from models import (
    config,
    layout,
    quantized_names,
    safetensors_files,
    torch_files,
    weight_names,
)
from models.safetensors_files import Entry

DEVICE_CONTEXT_BYTES = 700 * 2**20  # CUDA's own, cuBLAS and cuDNN with their kernels loaded
COMPUTE_BYTES = 2  # bf16
WIDE_BYTES = 4  # fp32
WIDE_IN_TRANSFORMER = re.compile(
    r"time_embedding\.|time_projection\.|modulation|norm3\.|head\."
    r"|time_embedder\.|time_proj\.|scale_shift_table|blocks\.\d+\.norm2\.|proj_out\."
)
"""Stored in fp32, by native and by diffusers' names; see `transformer.FP32_PARAMETERS`."""

WIDE_IN_VAE = re.compile(r"encoder\.|conv1\.|quant_conv\.")
"""Of encoding, which is in fp32; by native and by diffusers' names, see `vae.parameter_dtype`."""

# Bytes per token and width amid a block in bf16, counted: around self-attention, with the rotation
# of k in fp32; around the feed-forward net, without its two tensors of its own width.
ATTENTION_BYTES_PER_WIDTH = 20
FEED_FORWARD_BYTES_PER_WIDTH = 6
# Elements per pixel and base width (96) amid a frame in the decoder's and the encoder's stage of
# full size, with the frames that all convolutions remember; counted.
DECODE_ELEMENTS_PER_PIXEL = 28
ENCODE_ELEMENTS_PER_PIXEL = 20
TILE_PIXELS = 256
STRETCH_BYTES = (2**29, 2**30, 2**31)  # of one allocation of pinned memory


class Offload(enum.Enum):
    """Where weights are while they are not used."""

    NONE = "none"
    """On the device. The fastest, if everything fits."""
    MODEL = "model"
    """On the host; each network comes for its part of a render and leaves whole."""
    BLOCK = "block"
    """As MODEL, but of a transformer only two blocks are on the device at a time."""


@dataclass(frozen=True, kw_only=True)
class Mode:
    """How a worker trades time for memory."""

    offload: Offload = Offload.NONE
    text_encoder_on_cpu: bool = False
    """Prompts are encoded on the processor; nothing of the encoder is ever on the device."""
    park_encoders: bool = False
    """Text and image encoder and autoencoder are on the host until their part of a render."""
    vae_tiles: bool = False
    """Decode in overlapping tiles of 256 pixels: less memory, almost the same picture."""


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes by stage of a render and by what takes them."""

    stages: Mapping[str, Mapping[str, int]]
    """On the device; of the stages only one runs at a time."""
    host: Mapping[str, int]
    """In the memory of the host, for as long as the model is loaded."""

    @property
    def worst_stage(self) -> str:
        return max(self.stages, key=lambda stage: sum(self.stages[stage].values()))

    @property
    def device_bytes(self) -> int:
        return sum(self.stages[self.worst_stage].values())

    @property
    def resident_bytes(self) -> int:
        """On the device through all stages, and between two renders."""
        everywhere = set.intersection(*(set(parts) for parts in self.stages.values()))
        kept = everywhere - {"activations", "device context"}
        return sum(next(iter(self.stages.values()))[part] for part in kept)

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


@dataclass(frozen=True, kw_only=True)
class _Weights:
    """Bytes of the networks as they are loaded."""

    text_encoder: int
    image_encoder: int
    vae: int
    transformers: tuple[int, ...]
    """Two with Wan2.2; of these a step computes with one."""
    blocks: tuple[tuple[int, ...], ...]
    """Of each transformer."""
    are_quantized: bool
    """Those of transformers."""
    pinned: Mapping[str, int]
    """Networks on the host, as `offload.park` lays them there."""

    @property
    def all_transformers(self) -> int:
        return sum(self.transformers)


def needed(
    files: layout.ModelFiles,
    *,
    num_frames: int,
    height: int,
    width: int,
    mode: Mode = Mode(),
    vae_bytes: int = COMPUTE_BYTES,
    switches_loras: bool = False,
    lora_bytes: int = 0,
) -> Need:
    """Estimate what rendering one video needs.

    `vae_bytes` is 2 for decoding in bf16 and 4 in fp32, as encoding always is. `switches_loras`
    adds the copies that a LoRA needs of weights that cannot be read again, at most the whole
    transformer. `lora_bytes` of LoRAs, in bf16, stay beside 8-bit weights, which nothing is merged
    into. Reads headers and configs only; raises CheckpointError for broken ones.
    """
    sizes = layout.transformer_sizes(files, files.transformer_config)
    vae_sizes = layout.vae_sizes(files)
    weights = _weights(files, vae_bytes)
    resident, on_visit = _resident(weights, mode), _visiting(weights, mode)
    if lora_bytes and weights.are_quantized:
        resident["LoRAs"] = lora_bytes
    activations = {
        "text": 0 if mode.text_encoder_on_cpu else _text_activations(files),
        "denoise": _denoise_activations(sizes, vae_sizes, num_frames, height, width),
        "decode": _vae_activations(
            DECODE_ELEMENTS_PER_PIXEL, vae_sizes, height, width, mode, vae_bytes
        ),
    }
    if files.task is layout.Task.IMAGE_TO_VIDEO:
        video = 3 * num_frames * height * width * WIDE_BYTES
        activations["image"] = video + _vae_activations(
            ENCODE_ELEMENTS_PER_PIXEL, vae_sizes, height, width, Mode(), WIDE_BYTES
        )
    stages = {
        stage: {
            "device context": DEVICE_CONTEXT_BYTES,
            **resident,
            **on_visit.get(stage, {}),
            "activations": activations[stage],
        }
        for stage in activations
    }
    keeps_copies = switches_loras and not files.transformers_can_be_read_again
    return Need(stages=stages, host=_host(weights, mode, keeps_copies=keeps_copies))


def _resident(weights: _Weights, mode: Mode) -> dict[str, int]:
    """What is on the device through all stages."""
    if mode.offload is Offload.BLOCK:
        outside = weights.all_transformers - sum(map(sum, weights.blocks))
        two_blocks = sum(2 * max(blocks, default=0) for blocks in weights.blocks)
        return {"transformer outside its blocks": outside, "two blocks": two_blocks}
    if mode.offload is Offload.MODEL:
        return {}
    found = {"transformer": weights.all_transformers}
    if not mode.park_encoders:
        found |= {"image encoder": weights.image_encoder, "autoencoder": weights.vae}
        if not mode.text_encoder_on_cpu:
            found["text encoder"] = weights.text_encoder
    return {name: count for name, count in found.items() if count}


def _visiting(weights: _Weights, mode: Mode) -> dict[str, dict[str, int]]:
    """What comes to the device for one stage."""
    if mode.offload is Offload.NONE and not mode.park_encoders:
        return {}
    found = {
        "decode": {"autoencoder": weights.vae},
        "image": {"image encoder": weights.image_encoder, "autoencoder": weights.vae},
    }
    if not mode.text_encoder_on_cpu:
        found["text"] = {"text encoder": weights.text_encoder}
    if mode.offload is Offload.MODEL:
        found["denoise"] = {"transformer": max(weights.transformers)}
    return found


def _host(weights: _Weights, mode: Mode, *, keeps_copies: bool) -> dict[str, int]:
    found: dict[str, int] = {}
    parks = mode.offload is not Offload.NONE or mode.park_encoders
    if parks:
        found |= weights.pinned
        if mode.offload is not Offload.MODEL:
            del found["transformer"]
    if mode.text_encoder_on_cpu:
        found["text encoder"] = weights.text_encoder
    if mode.offload is Offload.BLOCK:
        found["transformer blocks"] = _pinned(*weights.blocks)
    if keeps_copies:
        found["weights without LoRA"] = weights.pinned["transformer"]
    return {name: count for name, count in found.items() if count}


def stretches(sizes: Sequence[int]) -> list[list[int]]:
    """Places of tensors, of these sizes in bytes, that share an allocation of pinned memory.

    torch rounds each allocation up to a power of two: the largest come first, and each into the
    first that has room for it, so that little is lost. Of the sizes of stretches the one that
    loses least: three blocks of 14B fill 2 GiB, where one takes 1 GiB.
    """
    tried = [_first_fit(sizes, least) for least in STRETCH_BYTES]
    return min(tried, key=lambda shared: pinned_bytes(_sized(sizes, shared)))


def _first_fit(sizes: Sequence[int], least: int) -> list[list[int]]:
    shared: list[list[int]] = []
    room: list[int] = []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        size = sizes[place]
        number = next((n for n, left in enumerate(room) if size <= left), None)
        if number is None:
            shared.append([place])
            room.append(max(least, _power_of_two(size)) - size)
        else:
            shared[number].append(place)
            room[number] -= size
    return shared


def pinned_bytes(allocations: Iterable[Sequence[int]]) -> int:
    """What torch takes for allocations of pinned memory, each for tensors of these sizes."""
    return sum(_power_of_two(sum(sizes)) for sizes in allocations)


def _pinned(*networks: Sequence[int]) -> int:
    return sum(pinned_bytes(_sized(sizes, stretches(sizes))) for sizes in networks)


def _sized(sizes: Sequence[int], shared: Iterable[Sequence[int]]) -> Iterable[list[int]]:
    return ([sizes[place] for place in places] for places in shared)


def _power_of_two(count: int) -> int:
    return 1 << (count - 1).bit_length() if count else 0


def _weights(files: layout.ModelFiles, vae_bytes: int) -> _Weights:
    blocks: list[tuple[int, ...]] = []
    transformers: list[list[int]] = []
    are_quantized = False
    for paths in filter(None, (files.transformer, files.low_noise_transformer)):
        by_block: Counter[str] = Counter()
        transformers.append([])
        for name, entry in headers(paths, prefixes=weight_names.TRANSFORMER_PREFIXES).items():
            match = re.match(r"blocks\.(\d+)\.", name)
            transformers[-1].append(_transformer_bytes(name, entry))
            by_block[match[1] if match else ""] += transformers[-1][-1]
            are_quantized |= entry.dtype in quantized_names.DTYPES
        del by_block[""]
        blocks.append(tuple(by_block.values()))
    text = [entry.num_elements * COMPUTE_BYTES for entry in headers(files.text_encoder).values()]
    clip = [entry.num_elements * COMPUTE_BYTES for entry in _used_of_clip(files.image_encoder)]
    vae = [_vae_bytes(*named, vae_bytes) for named in headers(files.vae).items()]
    return _Weights(
        text_encoder=sum(text),
        image_encoder=sum(clip),
        vae=sum(vae),
        transformers=tuple(map(sum, transformers)),
        blocks=tuple(blocks),
        are_quantized=are_quantized,
        pinned={
            "text encoder": _pinned(text),
            "image encoder": _pinned(clip),
            "autoencoder": _pinned(vae),
            "transformer": _pinned(*transformers),
        },
    )


def headers(paths: Iterable[Path], *, prefixes: Sequence[str] = ()) -> dict[str, Entry]:
    """Names, types and shapes of the tensors in files of either format, without their data.

    One of `prefixes` is taken away where all names of a file have it.
    """
    entries: dict[str, Entry] = {}
    for path in paths:
        read = safetensors_files if path.suffix == ".safetensors" else torch_files
        found = read.read_header(path)
        prefix = weight_names.common_prefix(found, prefixes)
        entries |= {name.removeprefix(prefix): entry for name, entry in found.items()}
    return entries


def _used_of_clip(paths: Iterable[Path]) -> list[Entry]:
    unused = weight_names.UNUSED_OF_CLIP
    return [entry for name, entry in headers(paths).items() if not unused.match(name)]


def _vae_bytes(name: str, entry: Entry, decode_bytes: int) -> int:
    return entry.num_elements * (WIDE_BYTES if WIDE_IN_VAE.match(name) else decode_bytes)


def _transformer_bytes(name: str, entry: Entry) -> int:
    if entry.dtype in quantized_names.DTYPES:
        return entry.num_elements
    is_wide = WIDE_IN_TRANSFORMER.search(name) or name.endswith("scale")
    return entry.num_elements * (WIDE_BYTES if is_wide else COMPUTE_BYTES)


def _text_activations(files: layout.ModelFiles) -> int:
    """Attention scores of one layer in fp32, and its gated feed-forward net."""
    sizes = layout.text_encoder_sizes(files)
    scores = 3 * sizes.num_heads * config.WAN_TEXT_LEN**2 * WIDE_BYTES
    return scores + config.WAN_TEXT_LEN * COMPUTE_BYTES * (8 * sizes.dim + 4 * sizes.ffn_dim)


def _denoise_activations(
    sizes: config.TransformerConfig,
    vae_sizes: config.VAEConfig,
    num_frames: int,
    height: int,
    width: int,
) -> int:
    """The larger of self-attention and feed-forward net; one block's are gone before the next."""
    latent_frames = (num_frames - 1) // vae_sizes.temporal_stride + 1
    pixels_per_token = vae_sizes.spatial_stride * sizes.patch_size[1]
    tokens = latent_frames * (height // pixels_per_token) * (width // pixels_per_token)
    attention = ATTENTION_BYTES_PER_WIDTH * sizes.dim
    feed_forward = FEED_FORWARD_BYTES_PER_WIDTH * sizes.dim + 2 * COMPUTE_BYTES * sizes.ffn_dim
    rotation = 2 * sizes.head_dim * WIDE_BYTES
    text = config.WAN_TEXT_LEN * sizes.dim * COMPUTE_BYTES * 6
    return tokens * (max(attention, feed_forward) + rotation) + text


def _vae_activations(
    elements_per_pixel: int,
    sizes: config.VAEConfig,
    height: int,
    width: int,
    mode: Mode,
    vae_bytes: int,
) -> int:
    """A chunk of frames at full size; tiles make the picture small."""
    if mode.vae_tiles:
        height, width = min(height, TILE_PIXELS), min(width, TILE_PIXELS)
    return elements_per_pixel * sizes.base_dim * height * width * vae_bytes
