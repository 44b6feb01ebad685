"""What a look wants of a model folder: which files, placed how, how much memory. Loads no torch."""

import contextlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs import looks
from models import errors as model_errors
from models import layout, memory, safetensors_files, transformer_headers
from models import transformer_files as named_files
from worker import gpus, host_memory

SPARE_SHARE = 0.05  # of a device's memory: gaps of the allocator, workspace of kernels


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Whether one device could render a look, by estimate."""

    device: str
    has_bytes: int | None
    """None: the device does not say."""
    needs_bytes: int
    worst_stage: str
    mode: str
    needs_host_bytes: int
    """Main memory for as long as the model is loaded."""
    has_host_bytes: int
    """Free now, for this process."""
    told_host: str
    """What takes it, as an addition to a sentence."""

    @property
    def is_enough(self) -> bool:
        return self.has_bytes is None or self.needs_bytes <= self.has_bytes * (1 - SPARE_SHARE)


def mode_of(look: looks.Look) -> memory.Mode:
    """What the preset asks for."""
    offload = memory.Offload(look.offload)
    wants_parking = look.text_encoder_on_cpu or look.image_encoder_on_cpu or look.vae_on_cpu
    return memory.Mode(
        offload=offload,
        # The other modes park all networks anyway.
        park_encoders=wants_parking and offload is memory.Offload.NONE,
        text_encoder_on_cpu=look.unload_encoders,
        vae_tiles=look.vae_tiling,
    )


def transformer_files(look: looks.Look, models_dir: Path) -> tuple[Path | None, Path | None]:
    """The transformer and the one for low noise, where the look names them."""
    first = look.high_noise_transformer or look.transformer
    low = look.low_noise_transformer
    return (
        None if first is None else models_dir / first,
        None if low is None else models_dir / low,
    )


def is_fault_of_host(error: Exception, look: looks.Look, models_dir: Path) -> bool:
    """Whether the model's folder here is bad for everybody, and not just for what this look asks.

    Else one look that no host can load would take every worker away from its model.
    """
    if is_gone(look, models_dir):
        return True
    if isinstance(error, model_errors.MissingLoraError):
        return False
    root, named = models_dir / look.model_path, transformer_files(look, models_dir)
    is_named = named != (None, None)
    if is_named and isinstance(error, model_errors.ConfigError) and error.against:
        return False
    try:
        own = _own_files(look, models_dir)
    except (model_errors.CheckpointError, OSError):
        return False
    if isinstance(error, (model_errors.MissingFileError, model_errors.AmbiguousFilesError)):
        # What `base` asks for may be missing where others find all that they want.
        return not _is_whole(root, named)
    where = _place_of(error)
    if where is None:
        return isinstance(error, OSError) and not is_named
    return where.is_relative_to(root) and where not in own


def _own_files(look: looks.Look, models_dir: Path) -> set[Path]:
    """What this look alone asks for. CheckpointError: a transformer that it names is not there."""
    own = {models_dir / use.path for use in look.loras}
    root = models_dir / look.model_path
    for path in filter(None, transformer_files(look, models_dir)):
        own |= {path, path.parent}
        for file in named_files.named(path):
            own |= {file, file.parent}  # shards are told by their folder
            if file.parent != root:
                own.add(file.parent / "config.json")
    return own


def _is_whole(root: Path, named: tuple[Path | None, Path | None]) -> bool:
    try:
        layout.find(root, transformer_file=named[0], low_noise_file=named[1])
    except (model_errors.CheckpointError, OSError):
        return False
    return True


def _place_of(error: Exception) -> Path | None:
    """The file that it is about."""
    name = error.filename if isinstance(error, OSError) else getattr(error, "path", None)
    return None if name is None else Path(os.fsdecode(name))


def is_gone(look: looks.Look, models_dir: Path) -> bool:
    """Whether the model's folder is not there (any more): unmounted, or moved away."""
    return not (models_dir / look.model_path).is_dir()


def find(look: looks.Look, models_dir: Path) -> layout.ModelFiles:
    """The files that this look renders with; of weights and LoRAs no more than headers are read.

    CheckpointError says what is missing or would not load, UnfitLoraError that a LoRA fits nowhere.
    """
    root = models_dir / look.model_path
    first, low = transformer_files(look, models_dir)
    files = layout.find(
        root,
        transformer_file=first,
        low_noise_file=low,
        base=look.base == "original",
        task=layout.TASKS[look.task],
    )
    if files.low_noise_transformer and look.boundary_step_index is None:
        # Else the first of them would be asked at every step.
        problem = "has two transformers, and the preset no boundary_step_index: 2 is for 4 steps"
        raise model_errors.WrongTaskError(root, problem)
    if look.boundary_step_index is not None and not files.low_noise_transformer:
        problem = "has one transformer, and the preset a boundary_step_index between two"
        raise model_errors.WrongTaskError(root, problem)
    transformer_headers.check(files)
    for use in look.loras:
        _check_lora(models_dir / use.path, files)
    return files


def _check_lora(path: Path, files: layout.ModelFiles) -> None:
    if not os.path.isfile(path):  # noqa: PTH113  # of a path that cannot be looked at, too
        raise model_errors.MissingLoraError(files.root, path)
    # One that cannot be read is told by who merges it, as the LoRA's fault and not the model's.
    with contextlib.suppress(model_errors.UnreadableWeightsError):
        transformer_headers.check_lora(path, files)


def unlike_headers(look: looks.Look, files: layout.ModelFiles, models_dir: Path) -> list[str]:
    """Where the look asks for other steps than a file of it was distilled for, by its header.

    `rushes distill` writes such headers; files of others say nothing. Raises CheckpointError for a
    file that cannot be read.
    """
    asked = {
        "denoising_step_list": list(look.denoising_step_list),
        "step_rule": look.step_rule,
        "sample_shift": look.sample_shift,
    }
    loras = [models_dir / use.path for use in look.loras]
    some = [path for paths in files.experts for path in paths[:1]]
    told = []
    for path in (*some, *loras):
        header = {} if path.suffix != ".safetensors" else _distilled_for(path)
        told += [
            f"{path} was distilled for {key} {header[key]}, the preset has {wanted}"
            for key, wanted in asked.items()
            if key in header and header[key] != wanted
        ]
    return told


def keys_passed_over(
    look: looks.Look, files: layout.ModelFiles, models_dir: Path
) -> dict[str, int]:
    """LoRA -> how many of its keys are for an image encoder that the model does not have.

    Raises CheckpointError for a file that cannot be read.
    """
    counts = {
        use.path: transformer_headers.keys_passed_over(models_dir / use.path, files)
        for use in look.loras
    }
    return {path: count for path, count in counts.items() if count}


def _distilled_for(path: Path) -> Mapping[str, object]:
    found: dict[str, object] = dict(safetensors_files.read_metadata(path))
    for key in ("denoising_step_list", "sample_shift"):
        try:
            found[key] = json.loads(str(found[key]))
        except (KeyError, ValueError, RecursionError):
            found.pop(key, None)
    return found


def needed(
    look: looks.Look, files: layout.ModelFiles, mode: memory.Mode, models_dir: Path
) -> memory.Need:
    return memory.needed(
        files,
        num_frames=look.num_frames,
        height=look.height,
        width=look.width,
        mode=mode,
        vae_bytes=memory.WIDE_BYTES if look.vae_dtype == "fp32" else memory.COMPUTE_BYTES,
        switches_loras=bool(look.loras),
        lora_bytes=sum(_lora_bytes(models_dir / use.path) for use in look.loras),
    )


def _lora_bytes(path: Path) -> int:
    """0 for what cannot be read: who merges it tells why, and that it is the LoRA's fault."""
    try:
        entries = memory.headers([path]).values()
    except model_errors.CheckpointError:
        return 0
    return sum(entry.num_elements * memory.COMPUTE_BYTES for entry in entries)


def fits(look: looks.Look, models_dir: Path) -> list[Fit]:
    """For each GPU of this machine. ValueError: why it cannot be said."""
    mode = mode_of(look)
    try:
        files = find(look, models_dir)
        memory.headers(models_dir / use.path for use in look.loras)
        need = needed(look, files, mode, models_dir)
    except model_errors.CheckpointError as error:
        raise ValueError(str(error)) from error
    devices: list[tuple[str, int | None]] = [
        (f"GPU {gpu.number} ({gpu.name})", gpu.memory_bytes) for gpu in gpus.find()
    ]
    largest = sorted(need.host, key=lambda part: need.host[part], reverse=True)[:3]
    here = host_memory.now()
    # A worker without a GPU computes in fp32 from main memory.
    devices = devices or [("the CPU", here.total_bytes // 2)]
    return [
        Fit(
            device=name,
            has_bytes=memory_bytes,
            needs_bytes=need.device_bytes,
            worst_stage=need.worst_stage,
            mode=told(mode),
            needs_host_bytes=need.host_bytes,
            has_host_bytes=here.free_bytes,
            told_host=f" ({', '.join(largest)})" if largest else "",
        )
        for name, memory_bytes in devices
    ]


def told(mode: memory.Mode) -> str:
    """For logs and records: `block offload, VAE in tiles`."""
    parts = []
    if mode.offload is not memory.Offload.NONE:
        parts.append(f"{mode.offload.value} offload")
    if mode.park_encoders:
        parts.append("encoders parked")
    if mode.text_encoder_on_cpu:
        parts.append("text encoder on the CPU")
    if mode.vae_tiles:
        parts.append("VAE in tiles")
    return ", ".join(parts) or "resident"
