"""Weights as they were loaded, read from their files again: for a LoRA, in place of copies."""

from pathlib import Path

import safetensors
import torch
from torch import Tensor

from models import errors, layout, safetensors_files, transformer, weight_names


class PristineFiles:
    """Gives a `LoraSwitcher` the untouched parameters of one transformer, one at a time.

    Nothing is kept in memory; switching then reads what a LoRA changes from the disk, or from the
    system's cache of it. Make it beside the loading: a file that changes later is refused.
    """

    def __init__(
        self, files: layout.ModelFiles, *, dtype: torch.dtype, low_noise: bool = False
    ) -> None:
        paths = files.low_noise_transformer if low_noise else files.transformer
        for path in paths:
            if path.suffix != ".safetensors":
                problem = "single tensors are read again from .safetensors only"
                raise errors.UnreadableWeightsError(path, problem)
        self._dtype = dtype
        self._stamps = {path: _stamp(path) for path in paths}
        self._stored = {
            name: path for path in paths for name in safetensors_files.read_header(path)
        }
        self._is_native = files.transformer_is_native

    def __call__(self, name: str) -> Tensor:
        stored = name if self._is_native else weight_names.rename(name, weight_names.TRANSFORMER)
        path = self._stored[stored]
        try:
            if _stamp(path) != self._stamps[path]:
                raise errors.UnreadableWeightsError(path, "it has changed since it was loaded")
            with safetensors.safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(stored)
        except (OSError, safetensors.SafetensorError) as error:
            raise errors.UnreadableWeightsError(path, str(error)) from error
        return tensor.to(transformer.parameter_dtype(name, self._dtype), copy=True)


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
