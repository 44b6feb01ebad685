"""Whether a model is being copied to its folder."""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

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
    # With folders: of what was taken away they alone tell.
    found = {path: path.stat() for path in (top, *_all_below(top)) if path.exists()}
    now = time.time()
    return Files(
        sizes_bytes={path: each.st_size for path, each in found.items() if S_ISREG(each.st_mode)},
        # Of the inode: `cp -a` sets the time of the content back. The server's clock may be ahead.
        is_copied=all(abs(now - each.st_ctime) >= COPIED_SECONDS for each in found.values()),
    )


def _all_below(folder: Path) -> Iterator[Path]:
    for depth in MODEL_DEPTHS:
        yield from folder.glob(depth)
