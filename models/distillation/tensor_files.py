"""What is computed before a training, a file each: written whole or not at all."""

from pathlib import Path

import safetensors
import safetensors.torch
from torch import Tensor

from models.distillation import processes


def save(tensors: dict[str, Tensor], path: Path) -> None:
    """Raises OSError, as for a full disk."""
    part = path.with_name(f".{path.name}.{processes.rank()}.part")
    try:
        safetensors.torch.save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part
        )
        part.replace(path)
    except safetensors.SafetensorError as error:  # the library's word for a full disk, too
        raise OSError(f"{path} could not be written: {error}") from error
    finally:
        part.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Tensor]:
    """Raises OSError for a file that is gone or damaged."""
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        problem = f"{path} cannot be read: {error}. Remove it; the next start makes it again"
        raise OSError(problem) from error
    return tensors
