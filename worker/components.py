"""Which networks are resident on the device: loads, keeps warm, evicts."""

import gc
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog
import torch

from jobs import presets
from models import checkpoint, layout, memory
from models import errors as model_errors
from worker import errors, hashes, wanted
from worker.device import Device
from worker.resident import ResidentModel, WeightsKey, untouched_weights

log = structlog.get_logger()


@dataclass
class Components:
    """As many models as fit stay warm; the least recently used one goes first."""

    models_dir: Path
    home: Path
    device: Device
    total_bytes: int | None = None
    """Memory for models; None: what the device has."""
    loads: int = 0
    lora_switches: int = 0
    _resident: "OrderedDict[WeightsKey, ResidentModel]" = field(default_factory=OrderedDict)
    _bytes: dict[WeightsKey, int] = field(default_factory=dict)
    _lower_modes: dict[str, memory.Mode] = field(default_factory=dict)
    _loras: dict[WeightsKey, tuple[presets.LoraUse, ...]] = field(default_factory=dict)
    _hasher: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="weight-hashes")
    )

    def model_for(self, look: presets.Look) -> ResidentModel:
        """The look's networks with its LoRAs; loads them, and lets others go, if need be."""
        key = self._key(look)
        try:
            if key not in self._resident:
                files = wanted.find(look, self.models_dir)  # before a warm one goes
                self._make_room(key, files, look)
                self._resident[key] = self._load(key, files)
            self._resident.move_to_end(key)
            model = self._resident[key]
            if self._loras.get(key, ()) != look.loras:
                # Forgotten first: after a failure it is unknown what is merged.
                self._loras.pop(key, None)
                model.apply_loras(look, self.models_dir)
                self._loras[key] = look.loras
                self.lora_switches += 1
        except (model_errors.CheckpointError, OSError) as error:
            if isinstance(error, model_errors.WeightsChangedError):
                self._evict(key)  # the next attempt loads what is there now
            raise errors.WeightsUnusable(str(error)) from error
        return model

    def mode_of(self, look: presets.Look) -> memory.Mode:
        """What the preset asks for, or what was found to fit after it did not."""
        return self._lower_modes.get(look.id) or wanted.mode_of(look)

    def step_down(self, look: presets.Look) -> memory.Mode | None:
        """After the device ran out of memory: the next mode for this look. None: there is none.

        Every model goes, the warm ones of other looks as well.
        """
        lower = _below(self.mode_of(look))
        for key in list(self._resident):
            self._evict(key)
        if lower is not None:
            self._lower_modes[look.id] = lower
        return lower

    def weight_hashes(self, model: ResidentModel) -> dict[str, str] | None:
        """SHA-256 per weight file; waits until they are known. None: they could not be read."""
        try:
            return model.hashes.result()
        except OSError as error:
            log.warning("weight_hashes.unknown", error=str(error))
            model.hashes = self._hasher.submit(self._hash, model.files)  # for the next video
            return None

    def lora_hashes(self, look: presets.Look) -> dict[str, str] | None:
        """SHA-256 per LoRA file of this look."""
        try:
            return {
                use.path: hashes.of_file(
                    self.models_dir / use.path, cache=self.home / hashes.HASHES_FILE
                )
                for use in look.loras
            }
        except OSError as error:
            log.warning("weight_hashes.unknown", error=str(error))
            return None

    def _key(self, look: presets.Look) -> WeightsKey:
        transformer, low_noise = wanted.transformer_files(look, self.models_dir)
        return WeightsKey(
            root=self.models_dir / look.model_path,
            task=look.task,
            transformer=transformer,
            low_noise_transformer=low_noise,
            base=look.base == "original",
            mode=self.mode_of(look),
        )

    def _make_room(self, key: WeightsKey, files: layout.ModelFiles, look: presets.Look) -> None:
        need = wanted.needed(look, files, key.mode)
        # The estimate is in bf16; a worker on a CPU computes in fp32.
        scale = self.device.dtype.itemsize / memory.COMPUTE_BYTES
        taken = int(need.device_bytes * scale)
        total = self.total_bytes or self.device.total_bytes()
        while self._resident and sum(self._bytes.values()) + taken > total * (
            1 - wanted.SPARE_SHARE
        ):
            self._evict(next(iter(self._resident)))
        stage = need.stages["denoise"]
        self._bytes[key] = int((sum(stage.values()) - stage["activations"]) * scale)

    def _evict(self, key: WeightsKey) -> None:
        self._bytes.pop(key, None)
        self._loras.pop(key, None)
        if self._resident.pop(key, None) is not None:
            log.info("model.evicted", root=str(key.root))
        gc.collect()
        if self.device.is_cuda:
            torch.cuda.empty_cache()

    def _load(self, key: WeightsKey, files: layout.ModelFiles) -> ResidentModel:
        began = time.monotonic()
        hashed = self._hasher.submit(self._hash, files)  # beside the loading
        try:
            untouched = untouched_weights(files)
            networks = self._networks(key, files)
        except BaseException:
            self._bytes.pop(key, None)
            raise
        model = ResidentModel(
            key,
            files=files,
            networks=networks,
            device=self.device.torch_device,
            hashes=hashed,
            untouched=untouched,
        )
        self.loads += 1
        seconds = round(time.monotonic() - began, 2)
        log.info("model.loaded", root=str(key.root), seconds=seconds, mode=wanted.told(key.mode))
        return model

    def _networks(self, key: WeightsKey, files: layout.ModelFiles) -> checkpoint.Networks:
        plain = key.mode.offload is memory.Offload.NONE and not key.mode.park_encoders
        device = self.device.torch_device if plain else torch.device("cpu")
        common = {"device": device, "dtype": self.device.dtype}
        if files.low_noise_transformer:
            return checkpoint.load_two_experts(
                key.root,
                high_noise_file=key.transformer,
                low_noise_file=key.low_noise_transformer,
                base=key.base,
                task=wanted.TASKS[key.task],
                **common,  # type: ignore[arg-type]  # two keywords of two types
            )
        load = (
            checkpoint.load_image_to_video if key.task == "i2v" else checkpoint.load_text_to_video
        )
        return load(key.root, transformer_file=key.transformer, base=key.base, **common)  # type: ignore[arg-type]

    def _hash(self, files: layout.ModelFiles) -> dict[str, str]:
        return hashes.of(files, cache=self.home / hashes.HASHES_FILE)


def _below(mode: memory.Mode) -> memory.Mode | None:
    if mode.offload is memory.Offload.NONE:
        return replace(mode, offload=memory.Offload.MODEL, park_encoders=False)
    if mode.offload is memory.Offload.MODEL:
        return replace(mode, offload=memory.Offload.BLOCK)
    return None if mode.vae_tiles else replace(mode, vae_tiles=True)
