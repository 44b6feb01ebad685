"""LoRA files: read to the last key, and made from two networks.

A file changes a parameter by a pair of factors (up @ down), by a whole difference, or by both; see
`lora_keys` for the spellings. LightX2V's distillation LoRAs hold differences of norms, biases and
modulation beside their pairs, and are only right with all of them.
"""

# R rank, I in features, O out features

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from models import errors, foreign_files, lora_keys, safetensors_files
from models.lora_keys import Role

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
SMALLEST_PAIR = 1_000_000  # elements; LightX2V stores smaller differences whole
UNCHANGED = 1e-8  # largest difference of a tensor that is left out of an extracted LoRA
PATCHES, HEAD = "patch_embedding.weight", "head.head.weight"
DIFFUSERS_METADATA = "lora_adapter_metadata"  # where diffusers keeps PEFT's settings
FINETRAINERS_METADATA = "lora_config"  # where finetrainers does
PEFT_CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Pair:
    """A difference of low rank: scale * up @ down."""

    down: Tensor
    """[R, I]"""
    up: Tensor
    """[O, R]"""
    scale: float


@dataclass(frozen=True, kw_only=True)
class Lora:
    """What one file changes, by native parameter."""

    path: Path
    pairs: Mapping[str, Pair]
    deltas: Mapping[str, tuple[Tensor, ...]]

    @property
    def parameters(self) -> frozenset[str]:
        return frozenset(self.pairs) | frozenset(self.deltas)

    def delta(self, name: str, like: Tensor) -> Tensor:
        """The whole difference of a parameter at strength 1, in `like`'s shape, dtype, device."""
        total = torch.zeros_like(like)
        if name in self.pairs:
            pair = self.pairs[name]
            down, up = (_like(half, like).flatten(1) for half in (pair.down, pair.up))
            total += (up @ down).mul_(pair.scale).view_as(like)
        for delta in self.deltas.get(name, ()):
            total += _like(delta, like)
        return total


def _like(tensor: Tensor, like: Tensor) -> Tensor:
    """First sent, then converted: in one step torch converts on the host."""
    return tensor.to(like.device).to(like.dtype)


def read(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> Lora:
    """Read a file for a network with these native parameters, to its last key.

    What is for Wan2.1's image encoder is passed over where an image-to-video network has none, as
    in Wan2.2: LightX2V's LoRA for its low noise holds such keys.
    An alpha of 0 counts as none, as in kohya's trainer and in LightX2V: the scale is then 1. Raises
    UnreadableWeightsError for a broken file, LoraMismatchError for a key that is not understood, a
    shape that does not fit, half a pair or a number that is none, and UnfitLoraError for what no
    network here can use.
    """
    tensors = _tensors(path)
    names = lora_keys.Names(shapes)
    found = {key: names.find(key) for key in tensors}
    matched = {key: where for key, where in found.items() if where is not None}
    _check_keys(path, tensors, matched, shapes)
    component = _component(path, tensors)
    parts: dict[str, dict[Role, list[Tensor]]] = {}
    for key, (name, role) in matched.items():
        part = tensors[key]
        if name == PATCHES and role in (Role.DOWN, Role.DELTA):
            part = _for_more_channels(part, shapes)
        parts.setdefault(name, {}).setdefault(role, []).append(part)
    _check_parts(path, parts, len(matched))
    scale_for = _scale_rule(path, component)
    pairs = {name: _pair(part, scale_for) for name, part in parts.items() if Role.UP in part}
    deltas = {name: _deltas(name, part, pairs) for name, part in parts.items()}
    whole = {name: found for name, found in deltas.items() if found}
    lora = Lora(path=path, pairs=pairs, deltas=whole)
    _check_shapes(lora, shapes, len(matched))
    return lora


def _tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        raise errors.UnfitLoraError(path, lora_keys.ONLY_SAFETENSORS)
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path, device="cpu")
    except (OSError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        reason = foreign_files.told(path) or (str(error) or repr(error)).splitlines()[0]
        raise errors.UnreadableWeightsError(path, reason) from error
    for key, tensor in tensors.items():
        is_alpha = key.endswith(".alpha")
        if is_alpha and tensor.numel() != 1:
            raise errors.UnfitLoraError(path, f"{key} must be one number, not {tensor.numel()}")
        if tensor.dtype not in (*FLOATS, *(INTEGERS if is_alpha else ())):
            problem = f"{key} is {tensor.dtype}, expected float16, bfloat16, float32 or float64"
            raise errors.UnfitLoraError(path, problem)
    return tensors


def _for_more_channels(part: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Tensor:
    """Of text-to-video on image-to-video: first come the latents, then mask and condition."""
    _, channels, *patch = shapes[PATCHES]
    latents = _latent_channels(shapes)
    if part.ndim != 2 + len(patch) or part.shape[1] != latents:
        return part
    return torch.cat((part, part.new_zeros(len(part), channels - latents, *part.shape[2:])), dim=1)


def _latent_channels(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return shapes[HEAD][0] // math.prod(shapes[PATCHES][2:])


def _component(path: Path, keys: Iterable[str]) -> str:
    """Which of diffusers' two transformers the file is for; both of them in one are refused."""
    found = {key.partition(".")[0] for key in keys}
    if found >= {"transformer", "transformer_2"}:
        problem = "holds LoRAs of two transformers (transformer., transformer_2.): split it in two"
        raise errors.UnfitLoraError(path, problem)
    return "transformer_2" if "transformer_2" in found else "transformer"


def _check_keys(
    path: Path,
    tensors: Mapping[str, Tensor],
    matched: Mapping[str, tuple[str, Role]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    unused = sorted(tensors.keys() - matched.keys())
    for_images = [] if lora_keys.for_images(shapes) else lora_keys.for_images(unused)
    takes_image = bool(for_images) and shapes[PATCHES][1] > _latent_channels(shapes)
    refused = sorted(set(unused) - set(for_images)) if takes_image else unused
    if refused or not matched:
        hint = ""
        if for_images and for_images == unused:
            hint = lora_keys.not_for_images(takes_image=takes_image)
        raise errors.LoraMismatchError(path, matched=len(matched), unused=refused, hint=hint)
    not_finite = sorted(key for key, tensor in tensors.items() if not tensor.isfinite().all())
    if not_finite:
        raise errors.LoraMismatchError(path, matched=len(matched), not_finite=not_finite)


def _check_parts(
    path: Path, parts: Mapping[str, Mapping[Role, list[Tensor]]], matched: int
) -> None:
    """Both halves, each of them once; an alpha only where there is a pair."""
    incomplete, twice = [], []
    for name, part in parts.items():
        counts = {role: len(part.get(role, [])) for role in (Role.DOWN, Role.UP, Role.ALPHA)}
        if max(counts.values()) > 1:
            twice.append(name)
        elif counts[Role.DOWN] != counts[Role.UP] or counts[Role.ALPHA] > counts[Role.UP]:
            incomplete.append(name)
    if twice:
        raise errors.LoraMismatchError(
            path, matched=matched, unused=twice, hint="These layers are there in two spellings"
        )
    if incomplete:
        raise errors.LoraMismatchError(path, matched=matched, incomplete=incomplete)


def _pair(part: Mapping[Role, list[Tensor]], scale_for: Callable[[int], float]) -> Pair:
    (down,), (up,) = part[Role.DOWN], part[Role.UP]
    rank = down.shape[0] if down.ndim else 0
    alpha = part[Role.ALPHA][0].item() if Role.ALPHA in part else 0.0
    return Pair(down, up, alpha / rank if alpha and rank else scale_for(rank))


def _deltas(
    name: str, part: Mapping[Role, list[Tensor]], pairs: Mapping[str, Pair]
) -> tuple[Tensor, ...]:
    """PEFT's bias of the second half is scaled with it (`lora_bias`); others are added as is."""
    pair = pairs.get(f"{name.rpartition('.')[0]}.weight")
    scale = 1.0 if pair is None else pair.scale
    scaled = [bias if scale == 1 else bias.double() * scale for bias in part.get(Role.UP_BIAS, [])]
    return (*part.get(Role.DELTA, []), *scaled)


def _scale_rule(path: Path, component: str) -> Callable[[int], float]:
    """Rank -> scale of pairs without an alpha: 1, or what PEFT's settings beside them say."""
    settings = _peft_settings(path, component)
    alpha = settings.get("lora_alpha")
    if not alpha:
        return lambda _rank: 1.0
    try:
        number = float(alpha)  # type: ignore[arg-type]  # whatever it is
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise errors.UnfitLoraError(path, f"its lora_alpha must be a number, got {alpha!r}"[:200])
    if settings.get("alpha_pattern"):
        problem = "gives single layers an alpha of their own (alpha_pattern), which is not read"
        raise errors.UnfitLoraError(path, problem)
    root = bool(settings.get("use_rslora"))
    return lambda rank: number / (math.sqrt(rank) if root else rank)


def _peft_settings(path: Path, component: str) -> dict[str, object]:
    """From the header, as diffusers and finetrainers write them, or from PEFT's file beside it."""
    metadata = safetensors_files.read_metadata(path)
    beside = path.with_name(PEFT_CONFIG)
    try:
        if DIFFUSERS_METADATA in metadata:
            flat = json.loads(metadata[DIFFUSERS_METADATA])
            return {key.removeprefix(f"{component}."): value for key, value in flat.items()}
        if FINETRAINERS_METADATA in metadata:
            return dict(json.loads(metadata[FINETRAINERS_METADATA]))
        if path.name == "adapter_model.safetensors" and beside.is_file():
            return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise errors.UnreadableWeightsError(path, f"its PEFT settings: {error}") from error
    return {}


def _check_shapes(lora: Lora, shapes: Mapping[str, tuple[int, ...]], matched: int) -> None:
    wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
    for name in sorted(lora.parameters):
        expected = tuple(shapes[name])
        changed = [tuple(delta.shape) for delta in lora.deltas.get(name, ())]
        if name in lora.pairs:
            changed.append(_shape_of_pair(lora.pairs[name], expected))
        for shape in changed:
            if shape != expected:
                wrong[name] = shape, expected
    if wrong:
        raise errors.LoraMismatchError(lora.path, matched=matched, wrong_shapes=wrong)


def _shape_of_pair(pair: Pair, expected: tuple[int, ...]) -> tuple[int, ...]:
    """Of up @ down; a convolution's `down` has its window, its `up` a window of one."""
    down, up = tuple(pair.down.shape), tuple(pair.up.shape)
    one_by_one = (1,) * (len(expected) - 2)
    fits = len(expected) >= 2 and len(down) == len(up) == len(expected) and up[2:] == one_by_one
    if fits and up[1] == down[0]:
        return (up[0], *down[1:])
    return (*up, *down)  # ranks or axes that do not fit: shown as they are


def extract(
    base: Mapping[str, Tensor],
    tuned: Mapping[str, Tensor],
    rank: int,
    *,
    smallest_pair: int = SMALLEST_PAIR,
    dtype: torch.dtype = torch.bfloat16,
) -> dict[str, Tensor]:
    """The difference of two networks as LightX2V's extractor writes it, under native names.

    Matrices of at least `smallest_pair` elements become a pair of this rank, by a singular value
    decomposition in fp32 split evenly over both halves; all else is kept whole.
    """
    assert base.keys() == tuned.keys()
    found: dict[str, Tensor] = {}
    for name, weight in base.items():
        wide = torch.promote_types(weight.dtype, torch.float32)
        delta = tuned[name].to(wide) - weight.to(wide)
        if delta.abs().max() <= UNCHANGED:
            continue
        module, _, leaf = f"diffusion_model.{name}".rpartition(".")
        if delta.ndim == 2 and delta.numel() >= smallest_pair:
            down, up = _factors(delta, rank)
            found |= {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up}
        else:
            found[module + {"weight": ".diff", "bias": ".diff_b"}.get(leaf, ".diff_m")] = delta
    return {key: tensor.to(dtype).contiguous() for key, tensor in found.items()}


def _factors(delta_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    left, values, right = torch.linalg.svd(delta_OI, full_matrices=False)
    roots = values[:rank].sqrt()
    return roots[:, None] * right[:rank], left[:, :rank] * roots
