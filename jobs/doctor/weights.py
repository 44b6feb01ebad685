"""The weights of each preset: they are here, complete, and fit the devices."""

import os
from collections.abc import Iterator

from jobs import errors, parts, presets, settings
from jobs.doctor import checks, devices


def check(config: settings.Settings) -> Iterator[checks.Check]:
    """A warning, not a failure: the weights may be on other machines."""
    absent: dict[str, list[str]] = {}
    for preset in presets.available(config.presets_dir):
        if not isinstance(preset, presets.Preset):
            continue
        folder = config.models_dir / preset.look.model_path
        if os.path.isdir(folder):  # noqa: PTH112  # False where we may not look, too
            yield _weights_of(config, preset)
        else:
            absent.setdefault(preset.look.model_path, []).append(preset.name)
    if absent:
        wanted = "; ".join(f"{model} (for {len(names)} presets)" for model, names in absent.items())
        folder = config.models_dir
        where = f"not in {folder}" if folder.is_dir() else f"there is no folder {folder}"
        advice = "put those there that this machine is to render; docs/weights.md"
        yield checks.warn("weights elsewhere", f"{where}: {wanted}", advice)


def _weights_of(config: settings.Settings, preset: presets.Preset) -> checks.Check:
    name = f"weights {preset.name}"
    try:
        files = parts.FIND_WEIGHTS.load()(preset.look, config.models_dir)
        unlike = parts.UNLIKE_HEADERS.load()(preset.look, files, config.models_dir)
        passed_over = parts.KEYS_PASSED_OVER.load()(preset.look, files, config.models_dir)
    except ValueError as error:
        return checks.warn(
            name, str(error), "complete the folder: workers here cannot render these jobs"
        )
    if unlike:
        return checks.warn(
            name, "; ".join(unlike), "it renders, though worse: mend the preset or the file"
        )
    total = sum(files.sizes_bytes.values())
    seen = f"{files.root}: {files.layout.value}, {len(files.weights)} files, {total:,} bytes"
    for path, count in passed_over.items():
        seen += f"; {count} keys of {path} are passed over: they are for Wan2.1's image encoder"
    return checks.ok(name, seen)


def fits(config: settings.Settings, preset_name: str) -> Iterator[checks.Check]:
    """Whether each device here could render a preset: estimated from the checkpoint's sizes."""
    preset = presets.load(preset_name, folder=config.presets_dir)
    name = f"fit {preset.name}"
    try:
        found = parts.FIT.load()(preset.look, config.models_dir)
    except ValueError as error:
        yield checks.fail(
            name, str(error), "put the model there; docs/weights.md says which file where"
        )
        return
    except errors.GpusUnknown as error:
        yield checks.fail(name, f"nvidia-smi: {error.said}", devices.NO_DRIVER)
        return
    for fit in found:
        seen = (
            f"{fit.device}: needs about {fit.needs_bytes / 1e9:.1f} GB ({fit.worst_stage}; "
            f"{fit.mode}), has "
            + ("an unknown size" if fit.has_bytes is None else f"{fit.has_bytes / 1e9:.1f} GB")
        )
        advice = "take a preset with offload or 8-bit weights: docs/weights.md, memory modes"
        yield checks.ok(name, seen) if fit.is_enough else checks.fail(name, seen, advice)
    fit = found[0]
    if not fit.needs_host_bytes:
        return
    seen = (
        f"each of its workers keeps about {fit.needs_host_bytes / 1e9:.1f} GB in main memory"
        f"{fit.told_host}, {fit.has_host_bytes / 1e9:.1f} GB are free"
    )
    advice = "take a preset with less offload, 8-bit weights or no LoRA: docs/weights.md"
    fits_host = fit.needs_host_bytes <= fit.has_host_bytes
    yield (
        checks.ok(f"{name}, main memory", seen)
        if fits_host
        else checks.fail(f"{name}, main memory", seen, advice)
    )
