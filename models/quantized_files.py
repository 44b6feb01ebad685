"""Complete bf16 transformers into 8-bit files in LightX2V's form, one tensor at a time."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from models import checkpoint, errors, layout, quantization, safetensors_files, transformer
from models.safetensors_files import Entry

PT = {"format": "pt"}  # says whose tensors they are
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int8: "I8",
}


@dataclass(frozen=True, kw_only=True)
class Report:
    """What quantizing did to the weights: |quantized - original| / |original|."""

    path: Path
    scheme: quantization.Scheme
    num_bytes: int
    relative_errors: Mapping[str, float]
    """By name, of the quantized weights only."""
    relative_error: float
    """Of all of them together."""


def write(files: layout.ModelFiles, target: Path, scheme: quantization.Scheme) -> Report:
    """Quantize a model folder's transformer into one native safetensors file.

    Only the matrices of the blocks become 8-bit; the rest is kept in bf16, or in fp32 where the
    network computes in fp32 and the source has it. Raises FileExistsError for a target that is
    there, and CheckpointError for a source that cannot be read or is quantized already.
    """
    tensors = checkpoint.read_transformer(files)
    if any(tensor.dtype in quantization.CODE_DTYPES for tensor in tensors.values()):
        raise errors.QuantizedWeightsError(files.transformer[0], "is quantized already")
    entries = dict(_entries(tensors, scheme))
    squared, relative_errors = {}, {}
    with _folder(target.parent), safetensors_files.create(target, entries, PT) as writer:
        for name, tensor in tensors.items():
            if not quantization.is_block_matrix(name, tuple(tensor.shape)):
                writer.write(name, _bytes(tensor.to(_kept_dtype(name, tensor))))
                continue
            if not bool(torch.isfinite(tensor).all()):
                raise errors.UnreadableWeightsError(files.transformer[0], f"{name} is not finite")
            codes, scale = quantization.quantize(tensor, scheme)
            writer.write(name, _bytes(codes))
            writer.write(_scale_name(name), _bytes(scale))
            squared[name] = _squared(tensor, codes, scale)
    for name, (error, original) in squared.items():
        relative_errors[name] = _ratio(error, original)
    return Report(
        path=target,
        scheme=scheme,
        num_bytes=target.stat().st_size,
        relative_errors=relative_errors,
        relative_error=_ratio(*map(sum, zip(*squared.values(), strict=True))),
    )


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


def _entries(
    tensors: Mapping[str, Tensor], scheme: quantization.Scheme
) -> Iterator[tuple[str, Entry]]:
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        if quantization.is_block_matrix(name, shape):
            yield name, Entry(DTYPE_NAMES[scheme.dtype], shape)
            yield _scale_name(name), Entry("F32", (shape[0], 1))
        else:
            yield name, Entry(DTYPE_NAMES[_kept_dtype(name, tensor)], shape)


def _scale_name(weight: str) -> str:
    return weight.removesuffix(".weight") + quantization.CHANNEL_SCALE


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
