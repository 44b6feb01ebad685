"""Prompts and first frames, encoded once before a training, one file each.

Text encoder, image encoder and autoencoder are needed here only; afterwards their memory is the
training's.
"""

# C channels, T H W latent frames, rows, columns, P tokens of a prompt, S text tokens,
# I image tokens, G width of text or image tokens

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from models import checkpoint, conditioning
from models.distillation import examples, processes, tensor_files


@dataclass(frozen=True, kw_only=True)
class Raw:
    """An example as a person gives it."""

    prompt: str
    image_key: str | None = None
    """Names the image by its content."""
    image: Callable[[], Tensor] | None = None
    """Reads it: [H, W, 3], uint8."""


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Turns examples into files, each named by what it was made of."""

    folder: Path
    model: str
    """Names the weights: other ones encode otherwise."""
    target: conditioning.Target
    load: Callable[[], checkpoint.Surroundings]

    def encode(self, raw: Sequence[Raw], on_done: Callable[[int, int], None]) -> list[Path]:
        """The file of each example; only those that are not there yet are made.

        `on_done(k, n)` is told after each of the n that this process makes.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        paths = [self._path(each) for each in raw]
        missing = {path: each for path, each in zip(paths, raw, strict=True) if not path.exists()}
        processes.wait()  # else one might see what another has just made
        mine = list(missing.items())[processes.rank() :: processes.count()]
        nets = self.load() if mine else None
        for number, (path, each) in enumerate(mine, 1):
            assert nets is not None
            tensor_files.save(self._tensors(each, nets), path)
            on_done(number, len(mine))
        processes.wait()
        return paths

    def _path(self, each: Raw) -> Path:
        target = self.target
        size = [target.width, target.height, target.num_frames] if each.image_key else None
        made_of = json.dumps([self.model, each.prompt, each.image_key, size])
        return self.folder / f"{hashlib.sha256(made_of.encode()).hexdigest()[:32]}.safetensors"

    @torch.inference_mode()
    def _tensors(self, each: Raw, nets: checkpoint.Surroundings) -> dict[str, Tensor]:
        context_1SG = nets.text_encoder.encode(each.prompt)
        length = nets.text_encoder.tokenize(each.prompt).shape[1]
        found = {"context": context_1SG[0, :length]}  # the rows after it are zero
        if each.image is not None:
            condition = conditioning.encode(
                each.image(), self.target, clip=nets.image_encoder, autoencoder=nets.vae
            )
            found["y"] = condition.y_BCTHW[0]
            if condition.image_tokens_BIG is not None:
                found["image_tokens"] = condition.image_tokens_BIG[0]
        return found


class StoredExamples:
    """Examples in files; a batch is read when it is needed."""

    def __init__(
        self,
        paths: Sequence[Path],
        negative: Path,
        *,
        text_len: int,
        latent_shape: tuple[int, int, int, int],
    ) -> None:
        self.files = (*paths, negative)
        self._paths = list(paths)
        self._text_len = text_len
        self._negative_SG = self._context(tensor_files.load(negative))
        self.latent_shape = latent_shape

    def __len__(self) -> int:
        return len(self._paths)

    def batch(self, places: Sequence[int], device: torch.device) -> examples.Batch:
        """Raises OSError for files that are gone or damaged."""
        read = [tensor_files.load(self._paths[place]) for place in places]
        context_BSG = torch.stack([self._context(tensors) for tensors in read]).to(device)
        condition = None
        if "y" in read[0]:
            tokens = None
            if "image_tokens" in read[0]:
                tokens = torch.stack([tensors["image_tokens"] for tensors in read]).to(device)
            y_BCTHW = torch.stack([tensors["y"] for tensors in read]).to(device)
            condition = conditioning.Condition(y_BCTHW, tokens)
        negative = self._negative_SG.to(device).expand_as(context_BSG)
        return examples.Batch(context_BSG, negative, condition)

    def _context(self, tensors: dict[str, Tensor]) -> Tensor:
        context_PG = tensors["context"]
        return functional.pad(context_PG, (0, 0, 0, self._text_len - len(context_PG)))
