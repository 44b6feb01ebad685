"""Complete bf16 transformers into 8-bit files in LightX2V's form, one tensor at a time."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import (
    checkpoint,
    errors,
    layout,
    quantization,
    quantized_names,
    safetensors_files,
    transformer,
    transformer_files,
)
from models.safetensors_files import Entry

PT = {"format": "pt"}  # says whose tensors they are
EXPERT_FILE = f"{layout.TRANSFORMER_STEM}.safetensors"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What quantizing did to the weights: |quantized - original| / |original|."""

    path: Path
    """The file; of a model with two transformers the folder of both."""
    scheme: quantization.Scheme
    num_bytes: int
    relative_errors: Mapping[str, float]
    """By name, of the quantized weights only; of two transformers behind the expert's name."""
    relative_error: float
    """Of all of them together."""


def write(files: layout.ModelFiles, target: Path, scheme: quantization.Scheme) -> Report:
    """Quantize a model folder's transformer into one native safetensors file.

    Of a model with two, `target` is a folder: it gets one of each expert's name with a file in it.
    Only the matrices of the blocks become 8-bit; the rest is kept in bf16, or in fp32 where the
    network computes in fp32 and the source has it. Raises FileExistsError for a target that is
    there, ValueError for a name that nothing would read, and CheckpointError for a source that
    cannot be read or is quantized already.
    """
    targets = _targets(files, target)
    if there := [path for path in targets if path.exists()]:
        raise FileExistsError(f"{there[0]} exists already; nothing was written")
    squared: dict[str, tuple[float, float]] = {}
    with contextlib.ExitStack() as made:
        for number, path in enumerate(targets):
            tensors = checkpoint.read_transformer(files, low_noise=number == 1)
            made.enter_context(_folder(path.parent.parent))
            made.enter_context(_folder(path.parent))
            found = _write(tensors, path, scheme, source=files.experts[number][0])
            made.enter_context(_gone_after_failure(path))  # of a pair, one alone is no model
            prefix = f"{path.parent.name}." if len(targets) > 1 else ""
            squared |= {f"{prefix}{name}": value for name, value in found.items()}
    return Report(
        path=target,
        scheme=scheme,
        num_bytes=sum(path.stat().st_size for path in targets),
        relative_errors={name: _ratio(*value) for name, value in squared.items()},
        relative_error=_ratio(*map(sum, zip(*squared.values(), strict=True))),
    )


def target_for(files: layout.ModelFiles, scheme: quantization.Scheme) -> Path:
    """Where a preset with `dit_quantized` looks that names no file.

    What is not distilled lies apart: only presets that bring a distilling LoRA look there.
    """
    is_distilled = layout.is_distilled(files)
    folder = files.root / (f"distill_{scheme.value}" if is_distilled else scheme.value)
    if files.low_noise_transformer:
        return folder
    stem = "distill_model" if is_distilled else layout.TRANSFORMER_STEM
    return folder / f"{stem}.safetensors"


def _targets(files: layout.ModelFiles, target: Path) -> list[Path]:
    if not files.low_noise_transformer:
        if target.suffix != ".safetensors":
            raise ValueError(f"{target}: such weights are a .safetensors file: give it this end")
        return [target]
    return [target / name / EXPERT_FILE for name in transformer_files.EXPERTS]


def _write(
    tensors: Mapping[str, Tensor], target: Path, scheme: quantization.Scheme, *, source: Path
) -> dict[str, tuple[float, float]]:
    """One transformer; squared error and squared original of each quantized matrix."""
    if any(tensor.dtype in quantization.CODE_DTYPES for tensor in tensors.values()):
        raise errors.QuantizedWeightsError(source, "is quantized already")
    entries, squared = dict(_entries(tensors, scheme)), {}
    is_safe = source.suffix == ".safetensors"
    said = safetensors_files.read_metadata(source) if is_safe else {}  # such as its noise levels
    with safetensors_files.create(target, entries, said | PT) as writer:
        for name, tensor in tensors.items():
            if not quantization.is_block_matrix(name, tuple(tensor.shape)):
                writer.write(name, _bytes(tensor.to(_kept_dtype(name, tensor))))
                continue
            if not bool(torch.isfinite(tensor).all()):
                raise errors.UnreadableWeightsError(source, f"{name} is not finite")
            codes, scale = quantization.quantize(tensor, scheme)
            writer.write(name, _bytes(codes))
            writer.write(_scale_name(name), _bytes(scale))
            squared[name] = _squared(tensor, codes, scale)
    return squared


@contextlib.contextmanager
def _folder(folder: Path) -> Iterator[None]:
    """Made for the file; after a failure gone again: an empty one would look like a model."""
    was_there = folder.is_dir()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        if not was_there:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextlib.contextmanager
def _gone_after_failure(path: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        path.unlink()
        raise


def _entries(
    tensors: Mapping[str, Tensor], scheme: quantization.Scheme
) -> Iterator[tuple[str, Entry]]:
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if quantization.is_block_matrix(name, shape):
            yield name, Entry(quantization.DTYPE_NAMES[scheme.dtype], shape)
            yield _scale_name(name), Entry("F32", (shape[0], 1))
        else:
            yield name, Entry(quantization.DTYPE_NAMES[_kept_dtype(name, tensor)], shape)


def _scale_name(weight: str) -> str:
    return weight.removesuffix(".weight") + quantized_names.CHANNEL_SCALE


def _kept_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """fp32 only where the network wants it and the source has it."""
    if tensor.dtype.itemsize <= 2:
        return tensor.dtype
    return transformer.parameter_dtype(name, torch.bfloat16)


def _squared(original: Tensor, codes: Tensor, scale: Tensor) -> tuple[float, float]:
    wide = original.double()
    error = codes.double() * scale.double() - wide
    return float(error.square().sum()), float(wide.square().sum())


def _ratio(error: float, original: float) -> float:
    return float((error / original) ** 0.5) if original else 0.0


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
