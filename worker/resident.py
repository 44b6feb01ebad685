"""A model whose weights are loaded: LoRAs, text, image condition, denoising, decoding."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, Self, TypeVar

import structlog
import torch
from torch import Tensor, nn

from jobs import looks
from models import (
    checkpoint,
    conditioning,
    layout,
    lora_switcher,
    memory,
    offload,
    pristine,
    sampling,
    sequence_parallel,
    stamps,
    transformer,
    vae_tiling,
)
from worker import errors

log = structlog.get_logger()

# On the host, of each model.
MAX_CONDITION_BYTES = 256 << 20  # of 81 frames 12 MB each at 480p, 26 MB at 720p
MAX_CONTEXT_BYTES = 256 << 20  # 4 MB each in bf16

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value", Tensor, conditioning.Condition)


class Recent(Generic[Key, Value]):
    """What was made for the keys that were asked for last, as far as it fits; the last always."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._num_bytes = 0
        self._kept: OrderedDict[Key, Value] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._kept

    def get(self, key: Key, make: Callable[[], Value]) -> Value:
        if key not in self._kept:
            self._kept[key] = made = make()
            self._num_bytes += made.nbytes
            while self._num_bytes > self._most_bytes and len(self._kept) > 1:
                _, oldest = self._kept.popitem(last=False)
                self._num_bytes -= oldest.nbytes
        self._kept.move_to_end(key)
        return self._kept[key]

    def forget(self) -> bool:
        """False: there was nothing."""
        had_some = bool(self._kept)
        self._kept.clear()
        self._num_bytes = 0
        return had_some


@dataclass(frozen=True, kw_only=True)
class WeightsKey:
    """Two looks with the same key need the same weights in the same places."""

    root: Path
    task: str
    transformer: Path | None
    low_noise_transformer: Path | None
    base: bool
    mode: memory.Mode
    vae_dtype: str | None = None
    """What frames are decoded in, where the look says it."""


class ResidentModel:
    """One set of networks, placed as its mode wants. Not for two threads at once."""

    def __init__(
        self,
        key: WeightsKey,
        *,
        files: layout.ModelFiles,
        networks: checkpoint.Networks,
        device: torch.device,
        hashes: "Future[dict[str, str]]",
        untouched: Mapping[str, pristine.PristineFiles] | None = None,
        as_loaded: tuple[stamps.Stamp, ...] = (),
    ) -> None:
        """`untouched` is from `untouched_weights`; without it LoRAs need copies on the host.

        `as_loaded` says what the files were.
        """
        self.key = key
        self.files = files
        self.networks = networks
        self.as_loaded = as_loaded
        self.hashes = hashes
        self.device = device
        self._placement = offload.Placement(networks, mode=key.mode, device=device)
        self._switchers = {
            name: lora_switcher.LoraSwitcher(
                network, device=device, pristine=(untouched or {}).get(name)
            )
            for name, network in self._transformers().items()
        }
        self._contexts: Recent[str, Tensor] = Recent(MAX_CONTEXT_BYTES)
        self._conditions: Recent[tuple[str, conditioning.Target], conditioning.Condition] = Recent(
            MAX_CONDITION_BYTES
        )

    def apply_loras(self, look: looks.Look, models_dir: Path) -> bool:
        """Make the weights those of this look; without LoRAs they are as loaded, bit for bit.

        Whether there was something to change.
        """
        changed = [
            switcher.apply(
                [
                    lora_switcher.Choice(path=models_dir / use.path, strength=use.strength)
                    for use in look.loras
                    if use.name in (None, name)
                ]
            )
            for name, switcher in self._switchers.items()
        ]
        return any(changed)

    def check_loras(self) -> None:
        """Raises CheckpointError where a LoRA's file is another one than when it was applied."""
        for switcher in self._switchers.values():
            switcher.check()

    def share(self, tokens: sequence_parallel.Tokens) -> None:
        """Denoise together with other processes from now on, or alone. SpecUnusable: it cannot."""
        try:
            for network in self._transformers().values():
                network.share(tokens)
        except ValueError as error:
            raise errors.SpecUnusable(str(error)) from error

    def encode_text(self, prompt: str) -> Tensor:
        """context_1SD on the device; kept for other seeds of the same prompt."""
        return self._contexts.get(prompt, lambda: self._encode_text(prompt)).to(self.device)

    def knows_image(self, image_key: str, look: looks.Look) -> bool:
        """Its condition is at hand: the image itself is not needed."""
        return (image_key, _target(look)) in self._conditions

    def condition(
        self, image_key: str, image_HWC: Tensor | None, look: looks.Look
    ) -> conditioning.Condition:
        """What the first frame adds; kept for other prompts and seeds of the same image."""
        target = _target(look)

        def encode() -> conditioning.Condition:
            assert image_HWC is not None, "knows_image said so"
            return self._encode_image(image_HWC, target)

        return self._conditions.get((image_key, target), encode)

    def forget(self) -> bool:
        """Let go of all texts and images that are kept. False: there were none."""
        return any([self._contexts.forget(), self._conditions.forget()])

    def decode_chunks(
        self, latents_BCTHW: Tensor, *, on_tile: vae_tiling.OnTile
    ) -> Iterator[Tensor]:
        """Frames in [-1, 1], one and then four at a time. In tiles: all come after the last one."""
        with self._placement.using(self.networks.vae) as device:
            latents_BCTHW = latents_BCTHW.to(device)
            if self.key.mode.vae_tiles:
                yield from vae_tiling.decode_chunks(
                    self.networks.vae, latents_BCTHW, on_tile=on_tile
                )
            else:
                yield from self.networks.vae.decode_chunks(latents_BCTHW)

    def denoiser(
        self, context_1SD: Tensor, condition: conditioning.Condition | None, look: looks.Look
    ) -> "Denoiser":
        return Denoiser(self, context_1SD, condition, boundary=look.boundary_step_index)

    def transformer_at(self, step: int, boundary: int | None) -> transformer.WanTransformer:
        """Wan2.2 has one for the first steps and one for the last."""
        if boundary is not None and step >= boundary:
            assert isinstance(self.networks, checkpoint.TwoExpertNetworks)
            return self.networks.low_noise_transformer
        return self.networks.transformer

    def using(self, network: nn.Module) -> AbstractContextManager[torch.device]:
        return self._placement.using(network)

    def _transformers(self) -> dict[str, transformer.WanTransformer]:
        found = {"high_noise_model": self.networks.transformer}
        if isinstance(self.networks, checkpoint.TwoExpertNetworks):
            found["low_noise_model"] = self.networks.low_noise_transformer
        return found

    def _encode_text(self, prompt: str) -> Tensor:
        with self._placement.using(self.networks.text_encoder):
            return self.networks.text_encoder.encode(prompt).cpu()

    def _encode_image(
        self, image_HWC: Tensor, target: conditioning.Target
    ) -> conditioning.Condition:
        autoencoder, clip = self.networks.vae, None
        with ExitStack() as in_use:
            in_use.enter_context(self._placement.using(autoencoder))
            if isinstance(self.networks, checkpoint.ImageToVideoNetworks):
                clip = self.networks.image_encoder
                in_use.enter_context(self._placement.using(clip))
            found = conditioning.encode(image_HWC, target, clip=clip, autoencoder=autoencoder)
        tokens_BIG = found.image_tokens_BIG
        # On the host: a night's images would fill the device.
        return conditioning.Condition(
            found.y_BCTHW.cpu(), None if tokens_BIG is None else tokens_BIG.cpu()
        )


class Denoiser:
    """The velocity of each step, from the transformer whose turn it is."""

    def __init__(
        self,
        model: ResidentModel,
        context_1SD: Tensor,
        condition: conditioning.Condition | None,
        *,
        boundary: int | None,
    ) -> None:
        self._model = model
        self._context_1SD = context_1SD
        self._condition = condition
        self._boundary = boundary
        self._network: transformer.WanTransformer | None = None
        self._velocity: sampling.VelocityFn | None = None
        self._in_use = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._in_use.close()

    def select(self, step: int) -> None:
        """Before each step: bring its transformer to the device, if it is not there."""
        network = self._model.transformer_at(step, self._boundary)
        if network is self._network:
            return
        self._in_use.close()
        self._in_use.enter_context(self._model.using(network))
        self._network = network
        self._velocity = self._bound(network)

    def __call__(self, latents_BCTHW: Tensor, timestep_B: Tensor) -> Tensor:
        assert self._velocity is not None, "select(step) comes first"
        return self._velocity(latents_BCTHW, timestep_B)

    def _bound(self, network: transformer.WanTransformer) -> sampling.VelocityFn:
        if self._condition is not None:
            return conditioning.velocity(network, self._context_1SD, self._condition)
        return lambda x_BCTHW, timestep_B: network(x_BCTHW, timestep_B, self._context_1SD)


def untouched_weights(files: layout.ModelFiles) -> dict[str, pristine.PristineFiles]:
    """Where a LoRA finds what it changed, by transformer; to be asked for before loading.

    Empty where single tensors cannot be read again: copies are kept then.
    """
    if not files.transformers_can_be_read_again:
        return {}
    found = {"high_noise_model": files.transformer, "low_noise_model": files.low_noise_transformer}
    return {name: pristine.PristineFiles(paths) for name, paths in found.items() if paths}


def _target(look: looks.Look) -> conditioning.Target:
    return conditioning.Target(
        width=look.width,
        height=look.height,
        num_frames=look.num_frames,
        crops=look.crops_image,
    )
