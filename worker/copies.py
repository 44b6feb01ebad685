"""Whether a model is being copied to its folder."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

# Longer than a copy pauses, and than NFS keeps a list of files that others add to.
COPIED_SECONDS = 60.0
MODEL_DEPTHS = ("*", "*/*", "*/*/*", "*/*/*/*", "*/*/*/*/*")  # of files, also in parts of models


@dataclass(frozen=True, kw_only=True)
class Files:
    sizes_bytes: Mapping[Path, int]
    is_copied: bool
    """Nothing has changed for a while."""


def beside(folder: Path, models_dir: Path) -> Files:
    """What is copied together: a part of a model that is not all there looks like one. OSError."""
    below = folder.relative_to(models_dir).parts if folder.is_relative_to(models_dir) else ()
    top = models_dir / below[0] if below else folder
    files = {path: path.stat() for path in _all_below(top) if path.is_file()}
    now = time.time()
    return Files(
        sizes_bytes={path: status.st_size for path, status in files.items()},
        # Of the inode: `cp -a` sets the time of the content back. The server's clock may be ahead.
        is_copied=all(abs(now - each.st_ctime) >= COPIED_SECONDS for each in files.values()),
    )


def _all_below(folder: Path) -> Iterator[Path]:
    for depth in MODEL_DEPTHS:
        yield from folder.glob(depth)
