"""Which models lie on this host, and which have come since it began."""

import functools
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from jobs import presets, queues, settings
from worker import copies

log = structlog.get_logger()

EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")
MODEL_MARKERS = ("config.json", "model_index.json")


@dataclass
class Newcomers:
    """Models that come while a host runs, each told once its copy has ended."""

    config: settings.Settings
    _before: dict[str, Mapping[Path, int]] = field(default_factory=dict)

    def look(self, *, known: Collection[str]) -> tuple[str, ...]:
        """Queues of others than these. Two looks must agree, and no file be new. OSError."""
        seen = {
            queue: copies.beside(folder, self.config.models_dir)
            for queue, folder in find(self.config).items()
            if queue not in known
        }
        ended = [
            queue
            for queue, files in seen.items()
            if files.is_copied and self._before.get(queue) == files.sizes_bytes
        ]
        self._before = {queue: files.sizes_bytes for queue, files in seen.items()}
        return tuple(sorted(ended))


def find(config: settings.Settings) -> dict[str, Path]:
    """Queue -> folder, of each model that lies on this host now."""
    folder = config.models_dir
    marked = {
        _model_of(path.parent)
        for depth in ("*", "*/*", "*/*/*")
        for marker in MODEL_MARKERS
        for path in folder.glob(f"{depth}/{marker}")
        if not _is_empty(path)
    }
    paths = {
        path.relative_to(folder).as_posix()
        for path in marked
        if path != folder and not _is_part_of_model(path, folder)
    }
    for preset in presets.available(config.presets_dir):
        if not isinstance(preset, presets.Preset):
            continue
        if os.path.isdir(folder / preset.look.model_path):  # noqa: PTH112  # False where we may not look, too
            paths.add(preset.look.model_path)
    return {queues.of_model(path): folder / path for path in paths if _is_utf8(path)}


def _is_utf8(path: str) -> bool:
    """No queue and no preset can have another name."""
    try:
        path.encode()
    except UnicodeEncodeError:
        _tell_unnamed(os.fsencode(path).decode("utf-8", "backslashreplace"))
        return False
    return True


@functools.cache
def _tell_unnamed(path: str) -> None:
    """Once: it is found at every look."""
    log.warning("launcher.model_left_out", path=path)


def _model_of(folder: Path) -> Path:
    """Wan2.2 has a config in each of its two transformers' folders, perhaps none of its own."""
    return folder.parent if folder.name in EXPERT_FOLDERS else folder


def _is_part_of_model(path: Path, folder: Path) -> bool:
    """`model/transformer` has a config of its own, but the model is `model`."""
    markers = [path.parent / name for name in MODEL_MARKERS]
    return path.parent != folder and any(each.exists() and not _is_empty(each) for each in markers)


def _is_empty(path: Path) -> bool:
    """As config.json is in some of LightX2V's repositories, which hold weights only."""
    try:
        return path.stat().st_size == 0
    except OSError:
        return False  # not known to be
