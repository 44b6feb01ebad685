"""Which tensors of a transformer are 8-bit and which are their scales, by names and types alone.

Loads no torch: what a header tells is judged as what was read.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models import errors, safetensors_files

DTYPES = ("F8_E4M3", "I8")
CHANNEL_SCALE = ".weight_scale"
TENSOR_SCALE = ".scale_weight"
INPUT_SCALES = (".input_scale", ".scale_input")
"""ComfyUI's, of activations, measured once; ours are scaled token by token."""
MARKER = "scaled_fp8"
LAYER_SETTINGS = ".comfy_quant"
"""ComfyUI's settings of one layer in JSON, as a tensor of bytes."""
ALL_SETTINGS = "_quantization_metadata"
"""The same of all layers, in the header of a file."""
SETTINGS_NAMES = re.compile(rf".*{re.escape(LAYER_SETTINGS)}$")
FORMATS = ("float8_e4m3fn", "int8_tensorwise")
"""In ComfyUI's words, those that are codes times scale."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a transformer's quantized tensors are."""

    dtype: str
    scale_ending: str
    weights: tuple[str, ...]


def scale_names(names: Iterable[str]) -> set[str]:
    """Of the scales that may lie beside weights of these names."""
    endings = (CHANNEL_SCALE, TENSOR_SCALE, *INPUT_SCALES)
    return {module + ending for module in _modules(names, ".weight") for ending in endings}


def inspect(dtypes: Mapping[str, str], path: Path) -> Found | None:
    """By the types of all tensors, in safetensors' words. None: nothing is quantized.

    Raises QuantizedWeightsError for mixed schemes and for codes without scales.
    """
    coded = {name: dtype for name, dtype in dtypes.items() if dtype in DTYPES and name != MARKER}
    endings = {ending: _modules(dtypes, ending) for ending in (CHANNEL_SCALE, TENSOR_SCALE)}
    scaled = {ending: modules for ending, modules in endings.items() if modules}
    if not coded and not scaled:
        return None
    if len(set(coded.values())) > 1 or len(scaled) > 1:
        kinds = sorted(set(coded.values()) | set(scaled))
        problem = f"mixes quantization schemes: {', '.join(kinds)}"
        raise errors.QuantizedWeightsError(path, problem, names=_one_each(coded))
    modules = next(iter(scaled.values()), frozenset())
    bare = sorted(name for name in coded if name.removesuffix(".weight") not in modules)
    if bare:
        problem = "holds 8-bit tensors without their scales; weights that were only cast to 8 bits"
        raise errors.QuantizedWeightsError(path, f"{problem} are not supported", names=bare)
    stray = sorted(module for module in modules if f"{module}.weight" not in coded)
    if stray:
        raise errors.QuantizedWeightsError(path, "holds scales without 8-bit weights", names=stray)
    return Found(
        dtype=next(iter(coded.values())),
        scale_ending=next(iter(scaled)),
        weights=tuple(sorted(coded)),
    )


def check_settings(path: Path) -> None:
    """What ComfyUI says of a safetensors file's layers: codes times scale, or it is refused.

    Rotated ones ("convrot") have the names and types of others, and would compute nonsense.
    Raises QuantizedWeightsError, and UnreadableWeightsError for a file that cannot be read.
    """
    unknown = {layer: form for layer, form in _forms(path) if form not in FORMATS}
    if unknown:
        forms = ", ".join(sorted(set(unknown.values())))[:200]
        problem = f"holds layers in a form that is not supported: {forms}"
        raise errors.QuantizedWeightsError(path, problem, names=sorted(unknown))


def _forms(path: Path) -> Iterator[tuple[str, str]]:
    told = safetensors_files.read_metadata(path).get(ALL_SETTINGS)
    names = [name for name in safetensors_files.read_header(path) if name.endswith(LAYER_SETTINGS)]
    contents = safetensors_files.read_small(path, names)
    try:
        if told is not None:
            for layer, settings in json.loads(told)["layers"].items():
                yield layer, _form(settings)
        for name, content in contents.items():
            yield name.removesuffix(LAYER_SETTINGS), _form(json.loads(content))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        problem = f"says of its layers what is not understood: {error!r}"
        raise errors.QuantizedWeightsError(path, problem[:200]) from error


def _form(settings: Mapping[str, Any]) -> str:
    return f"{settings['format']}{', rotated' if settings.get('convrot') else ''}"


def _modules(names: Iterable[str], ending: str) -> frozenset[str]:
    return frozenset(name.removesuffix(ending) for name in names if name.endswith(ending))


def _one_each(coded: Mapping[str, str]) -> list[str]:
    return sorted({dtype: name for name, dtype in coded.items()}.values())
