"""Which models lie on this host, and which have come since it began."""

import functools
import os
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from jobs import presets, queues, settings

log = structlog.get_logger()

# Longer than a copy pauses, and than NFS keeps a list of files that others add to.
COPIED_SECONDS = 60.0
EXPERT_FOLDERS = ("high_noise_model", "low_noise_model")
MODEL_MARKERS = ("config.json", "model_index.json")
MODEL_DEPTHS = ("*", "*/*", "*/*/*", "*/*/*/*", "*/*/*/*/*")  # of files, also in parts of models


@dataclass
class Newcomers:
    """Models that come while a host runs, each told once its copy has ended."""

    config: settings.Settings
    _before: dict[str, Mapping[Path, int]] = field(default_factory=dict)

    def look(self, *, known: Collection[str]) -> tuple[str, ...]:
        """Queues of others than these. Two looks must agree, and no file be new. OSError."""
        seen = {
            queue: _files_beside(folder, self.config.models_dir)
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


@dataclass(frozen=True, kw_only=True)
class _Files:
    sizes_bytes: Mapping[Path, int]
    is_copied: bool
    """Nothing has changed for a while."""


def find(config: settings.Settings) -> dict[str, Path]:
    """Queue -> folder, of each model that lies on this host now."""
    folder = config.models_dir
    marked = {
        _model_of(path.parent)
        for depth in ("*", "*/*", "*/*/*")
        for marker in MODEL_MARKERS
        for path in folder.glob(f"{depth}/{marker}")
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


def _files_beside(folder: Path, models_dir: Path) -> _Files:
    """Of what is copied together: a part of a model that is not all there looks like one."""
    below = folder.relative_to(models_dir).parts if folder.is_relative_to(models_dir) else ()
    top = models_dir / below[0] if below else folder
    files = {path: path.stat() for path in _all_below(top) if path.is_file()}
    now = time.time()
    return _Files(
        sizes_bytes={path: status.st_size for path, status in files.items()},
        # Of the inode: `cp -a` sets the time of the content back. The server's clock may be ahead.
        is_copied=all(abs(now - each.st_ctime) >= COPIED_SECONDS for each in files.values()),
    )


def _all_below(folder: Path) -> Iterator[Path]:
    for depth in MODEL_DEPTHS:
        yield from folder.glob(depth)


def _model_of(folder: Path) -> Path:
    """Wan2.2 has a config in each of its two transformers' folders, perhaps none of its own."""
    return folder.parent if folder.name in EXPERT_FOLDERS else folder


def _is_part_of_model(path: Path, folder: Path) -> bool:
    """`model/transformer` has a config of its own, but the model is `model`."""
    return path.parent != folder and any((path.parent / name).exists() for name in MODEL_MARKERS)
