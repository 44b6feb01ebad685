"""Which networks are resident on the device: loads, keeps warm, evicts."""

import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import structlog
import torch

from jobs import looks, reports
from models import checkpoint, layout, memory, stamps
from models import errors as model_errors
from worker import errors, hashes, host_memory, replaced, reservations, room, wanted
from worker.device import Device
from worker.resident import ResidentModel, WeightsKey, untouched_weights

log = structlog.get_logger()

LOOK_SECONDS = 0.2  # while another process of this host loads
VAE_DTYPES = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Components:
    """As many models as fit stay warm; the least recently used one goes first."""

    models_dir: Path
    home: Path
    device: Device
    device_bytes: int | None = None
    """Memory of the device for models; None: what it has."""
    host_bytes: int | None = None
    """The same of main memory; None: what is free when it is needed."""
    loads: int = 0
    lora_switches: int = 0
    _resident: "OrderedDict[WeightsKey, ResidentModel]" = field(default_factory=OrderedDict)
    _shares: dict[WeightsKey, room.Share] = field(default_factory=dict)
    _needs: dict[tuple[WeightsKey, str], memory.Need] = field(default_factory=dict)
    _lower_modes: dict[str, memory.Mode] = field(default_factory=dict)
    _loras: dict[WeightsKey, tuple[looks.LoraUse, ...] | None] = field(default_factory=dict)
    _looked_at: set[tuple[WeightsKey, str]] = field(default_factory=set)
    _hasher: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="weight-hashes")
    )
    _reserved: reservations.Reservations = field(init=False)
    _looks: replaced.Looks = field(init=False)

    def __post_init__(self) -> None:
        self._reserved = reservations.Reservations(self.home)
        self._looks = replaced.Looks(self.models_dir)

    def model_for(self, look: looks.Look) -> ResidentModel:
        """The look's networks with its LoRAs; loads them, and lets others go, if need be."""
        key = self._key(look)
        try:
            model = self._warm(key, look)
            self._switch_loras(key, model, look)
        finally:
            self._reserved.release()
        self._look_at_headers(key, model, look)
        return model

    def _look_at_headers(self, key: WeightsKey, model: ResidentModel, look: looks.Look) -> None:
        """What renders all the same, perhaps worse, is told once, and no failure."""
        if (key, look.id) in self._looked_at:
            return
        self._looked_at.add((key, look.id))
        try:
            unlike = wanted.unlike_headers(look, model.files, self.models_dir)
            passed_over = wanted.keys_passed_over(look, model.files, self.models_dir)
        except model_errors.CheckpointError as error:
            unlike, passed_over = [str(error)], {}
        for each in unlike:
            log.warning("model.unlike_header", because=each)
        for path, count in passed_over.items():
            log.info("lora.keys_passed_over", path=path, keys=count)

    def _switch_loras(self, key: WeightsKey, model: ResidentModel, look: looks.Look) -> None:
        """Also where the look is the same: a LoRA's file may have been replaced."""
        # Forgotten first: after a failure it is unknown what is merged.
        self._loras[key] = None
        try:
            has_changed = model.apply_loras(look, self.models_dir)
        except model_errors.UnfitLoraError as error:
            raise errors.LoraUnfit(self._told_of(error)) from error
        except (model_errors.CheckpointError, OSError) as error:
            if wanted.is_gone(look, self.models_dir):
                # What is loaded stays: jobs without a LoRA go on, and the folder may come back.
                gone = f"{key.root} was there when its model was loaded, and is gone"
                raise errors.WeightsAbsent(gone) from error
            if getattr(error, "path", None) in model.files.weights:
                self._evict(key)  # the next attempt loads what is there now
                if isinstance(error, model_errors.WeightsChangedError):
                    raise errors.WeightsAbsent(self._told_of(error)) from error
            raise errors.WeightsUnusable(self._told_of(error)) from error
        self._loras[key] = look.loras
        self.lora_switches += has_changed

    def _warm(self, key: WeightsKey, look: looks.Look) -> ResidentModel:
        try:
            model = self._resident.get(key)
            is_old = model is not None and self._looks.was_replaced(model)
            files = model.files if model and not is_old else wanted.find(look, self.models_dir)
            if is_old:
                log.info("model.replaced", root=str(key.root))
                model = None
                self._evict(key)
            self._make_room(key, files, look)  # a bad folder cost no warm model
            model = model or self._load(key, files)
        except model_errors.UnfitLoraError as error:
            raise errors.LoraUnfit(self._told_of(error)) from error
        except model_errors.WrongTaskError as error:
            raise errors.SpecUnusable(self._told_of(error)) from error
        except (model_errors.CheckpointError, OSError) as error:
            is_of_host = wanted.is_fault_of_host(error, look, self.models_dir)
            if is_of_host:
                raise errors.WeightsAbsent(str(error)) from error
            raise errors.WeightsUnusable(self._told_of(error)) from error
        self._resident[key] = model
        self._resident.move_to_end(key)
        return model

    def _told_of(self, error: Exception) -> str:
        """For those who submit: files by their place in the models folder, wherever that lies."""
        return str(error).replace(f"{self.models_dir}/", "")

    def report(self, *, renders: int) -> reports.Report:
        """What is loaded and how often it changed."""
        return reports.Report(
            renders=renders,
            loads=self.loads,
            lora_switches=self.lora_switches,
            # Copied: the end of one video reports while the next one loads.
            resident=tuple(
                self._told(key, share)
                for key in list(self._resident)
                if (share := self._shares.get(key)) is not None
            ),
            device_used_bytes=self.device.used_bytes(),
            host_used_bytes=host_memory.process_bytes(),
        )

    def _told(self, key: WeightsKey, share: room.Share) -> reports.Resident:
        return reports.Resident(
            model=str(key.transformer or key.root),
            loras=tuple(use.path for use in self._loras.get(key) or ()),
            memory=wanted.told(key.mode),
            device_bytes=share.device_resident,
            host_bytes=share.host_resident,
        )

    def mode_of(self, look: looks.Look) -> memory.Mode:
        """What the preset asks for, or what was found to fit after it did not."""
        return self._lower_modes.get(look.id) or wanted.mode_of(look)

    def step_down(self, look: looks.Look) -> memory.Mode | None:
        """After the device ran out of memory: the next mode for this look. None: there is none.

        Every model goes, the warm ones of other looks as well.
        """
        lower = _below(self.mode_of(look))
        for key in list(self._resident):
            self._evict(key)
        if lower is not None:
            self._lower_modes[look.id] = lower
        return lower

    def hashing(self, model: ResidentModel) -> "Future[dict[str, str]]":
        """Of its weights, under way or done; begun anew where they could not be read before."""
        if model.hashes.done() and model.hashes.exception() is not None:
            model.hashes = self._hasher.submit(self._hash, model.files, model.as_loaded)
        return model.hashes

    def weight_hashes(self, hashing: "Future[dict[str, str]]") -> dict[str, str] | None:
        """SHA-256 per weight file. None: not known yet, not to be read, or replaced since."""
        if not hashing.done():
            log.warning("weight_hashes.unknown", error="the worker ends before they are")
            return None
        try:
            return hashing.result()
        except (model_errors.CheckpointError, OSError) as error:
            log.warning("weight_hashes.unknown", error=str(error))
            return None

    def lora_hashes(self, look: looks.Look, model: ResidentModel) -> dict[str, str] | None:
        """SHA-256 per LoRA file that the model has. None: one of them was replaced since."""
        cache = self.home / hashes.HASHES_FILE
        try:
            found = {
                use.path: hashes.of_file(self.models_dir / use.path, cache=cache)
                for use in look.loras
            }
            model.check_loras()  # after reading: these are the files that were merged
        except (model_errors.CheckpointError, OSError) as error:
            log.warning("weight_hashes.unknown", error=str(error))
            return None
        return found

    def _key(self, look: looks.Look) -> WeightsKey:
        transformer, low_noise = wanted.transformer_files(look, self.models_dir)
        return WeightsKey(
            root=self.models_dir / look.model_path,
            task=look.task,
            transformer=transformer,
            low_noise_transformer=low_noise,
            base=look.base == "original",
            mode=self.mode_of(look),
            vae_dtype=look.vae_dtype,
        )

    def _make_room(self, key: WeightsKey, files: layout.ModelFiles, look: looks.Look) -> None:
        """Before each job: a larger one than before needs more beside the same weights.

        HostOutOfMemory when main memory is short though nothing else is loaded: the kernel would
        end this process. The device is tried all the same, since its failure is no more than that.
        """
        need = self._need(key, files, look)
        held = self._shares.get(key) if key in self._resident else None
        share = room.share_of(need, self.device).kept_beside(held)
        here = room.Room(
            device=self.device, device_bytes=self.device_bytes, host_bytes=self.host_bytes
        )
        while not self._has_room(key, need, share, held, here):
            time.sleep(LOOK_SECONDS)
        self._shares[key] = share

    def _has_room(
        self,
        key: WeightsKey,
        need: memory.Need,
        share: room.Share,
        held: room.Share | None,
        here: room.Room,
    ) -> bool:
        """Evict until there is, and reserve it. False: look again when others have loaded."""
        with self._reserved.turn() as pending_bytes:
            while True:
                others = {other: self._shares[other] for other in self._resident if other != key}
                on_device = here.device_lacks(share, others.values())
                on_host = here.host_lacks(
                    share, others.values(), held=held, pending_bytes=pending_bytes
                )
                if on_host and pending_bytes:
                    # Partly taken already, so counted twice: no reason to evict or to give up.
                    return False
                if on_host and self._forget():
                    continue  # measured again, before a model goes or a job fails
                helps = [
                    other
                    for other, its in others.items()
                    if (on_device and its.device_resident) or (on_host and its.host_resident)
                ]
                if not helps and on_host:
                    raise self._host_out_of_memory(need, share, lacking_bytes=on_host)
                if not helps:
                    break
                self._evict(helps[0])
            self._reserved.reserve(share.beyond(held))
        return True

    def _need(self, key: WeightsKey, files: layout.ModelFiles, look: looks.Look) -> memory.Need:
        if (key, look.id) not in self._needs:
            self._needs[key, look.id] = wanted.needed(look, files, key.mode, self.models_dir)
        return self._needs[key, look.id]

    def _host_out_of_memory(
        self, need: memory.Need, share: room.Share, *, lacking_bytes: int
    ) -> errors.HostOutOfMemory:
        parts = dict(need.host) or dict(need.stages[need.worst_stage])
        parts.pop("device context", None)
        largest = sorted(parts, key=lambda part: parts[part], reverse=True)
        return errors.HostOutOfMemory(
            needed_bytes=share.host_peak,
            lacking_bytes=lacking_bytes,
            free_bytes=host_memory.now().free_bytes,
            what=", ".join(largest[:3]),
        )

    def _forget(self) -> bool:
        """What all models keep of texts and images goes. False: there was nothing."""
        had_some = [model for model in self._resident.values() if model.forget()]
        if had_some:
            self.device.give_up_caches()
        return bool(had_some)

    def _evict(self, key: WeightsKey) -> None:
        self._shares.pop(key, None)
        self._loras.pop(key, None)
        self._needs = {pair: need for pair, need in self._needs.items() if pair[0] != key}
        self._looked_at = {pair for pair in self._looked_at if pair[0] != key}
        if self._resident.pop(key, None) is not None:
            log.info("model.evicted", root=str(key.root))
        self.device.give_up_caches()

    def _load(self, key: WeightsKey, files: layout.ModelFiles) -> ResidentModel:
        began = time.monotonic()
        as_loaded = tuple(stamps.of(path) for path in files.weights + files.configs)
        hashed = self._hasher.submit(self._hash, files, as_loaded)  # beside the loading
        untouched = untouched_weights(files)
        networks = self._networks(key, files)
        self._check_unchanged(as_loaded)
        model = ResidentModel(
            key,
            files=files,
            networks=networks,
            device=self.device.torch_device,
            hashes=hashed,
            untouched=untouched,
            as_loaded=as_loaded,
        )
        self.loads += 1
        seconds = round(time.monotonic() - began, 2)
        log.info("model.loaded", root=str(key.root), seconds=seconds, mode=wanted.told(key.mode))
        return model

    def _check_unchanged(self, as_loaded: Sequence[stamps.Stamp]) -> None:
        """After loading. One that was replaced meanwhile: nobody knows which half was read."""
        try:
            stamps.check(as_loaded)
        except model_errors.WeightsChangedError as error:
            raise errors.WeightsAbsent(f"{error.path} was replaced while it was loaded") from error

    def _networks(self, key: WeightsKey, files: layout.ModelFiles) -> checkpoint.Networks:
        is_resident = key.mode.offload is memory.Offload.NONE
        plain = is_resident and not (key.mode.park_encoders or key.mode.text_encoder_on_cpu)
        device = self.device.torch_device if plain else torch.device("cpu")
        return checkpoint.load(
            files, device=device, dtype=self.device.dtype, vae_dtype=VAE_DTYPES[key.vae_dtype]
        )

    def _hash(self, files: layout.ModelFiles, as_loaded: Sequence[stamps.Stamp]) -> dict[str, str]:
        return hashes.of(files, as_loaded=as_loaded, cache=self.home / hashes.HASHES_FILE)


def _below(mode: memory.Mode) -> memory.Mode | None:
    if mode.offload is memory.Offload.NONE:
        return replace(mode, offload=memory.Offload.MODEL, park_encoders=False)
    if mode.offload is memory.Offload.MODEL:
        return replace(mode, offload=memory.Offload.BLOCK)
    return None if mode.vae_tiles else replace(mode, vae_tiles=True)
