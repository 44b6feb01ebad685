"""The trained tiny models that come with the package. Nothing here loads torch."""

import shutil
import tempfile
from pathlib import Path

FOLDER = Path(__file__).with_name("weights")
NAMES = ("tiny", "tiny_i2v")


def copy(name: str, folder: Path) -> bool:
    """Copy one of NAMES to `folder`, all or nothing; False where there is something already.

    Raises OSError where it cannot be written.
    """
    if _holds_something(folder):
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        shutil.copytree(FOLDER / name, scratch / name)
        (scratch / name).replace(folder)
    except OSError:
        if not _holds_something(folder):  # else another process was quicker
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return True


def _holds_something(folder: Path) -> bool:
    return folder.is_dir() and any(folder.iterdir())
