"""Weights as they were loaded, read from their files again: for a LoRA, in place of copies."""

from collections.abc import Sequence
from pathlib import Path

import safetensors
from torch import Tensor

from models import errors, safetensors_files, stamps, weight_names


class PristineFiles:
    """Gives a `LoraSwitcher` the stored parameters of one transformer, one at a time.

    Nothing is kept in memory: switching reads what a LoRA changes from the disk, or from the
    system's cache of it. Make it before loading: a file that changes later is refused.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        """Files in the safetensors format, with names of either layout."""
        self._stamps = {path: stamps.of(path) for path in paths}
        self._places: dict[str, tuple[Path, str]] = {}
        for path in paths:
            names = safetensors_files.read_header(path)
            prefix = weight_names.common_prefix(names, weight_names.TRANSFORMER_PREFIXES)
            self._places |= {name.removeprefix(prefix): (path, name) for name in names}

    def __call__(self, name: str) -> Tensor:
        """The parameter of this native name as it is stored.

        Raises WeightsChangedError, and UnreadableWeightsError where the file is gone.
        """
        if name not in self._places:
            name = weight_names.rename(name, weight_names.TRANSFORMER)
        path, stored = self._places[name]
        try:
            self._stamps[path].check()
            with safetensors.safe_open(path, framework="pt") as file:
                tensor: Tensor = file.get_tensor(stored)
        except (OSError, safetensors.SafetensorError) as error:
            raise errors.UnreadableWeightsError(path, str(error)) from error
        return tensor
