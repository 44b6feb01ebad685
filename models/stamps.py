"""What a file was when it was read, to tell whether another one lies in its place by now."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from models import errors


@dataclass(frozen=True, order=True)
class Stamp:
    """Two that are equal are of one file with one content."""

    path: Path
    num_bytes: int
    modified_ns: int
    inode: int
    inode_changed_ns: int

    def check(self) -> None:
        """Raises WeightsChangedError where it is another file now, OSError where there is none.

        Archives with fixed times unpack to files of one size and time. `chmod` and links change the
        time of the inode, and some file systems number files anew: both together are a new file.
        """
        now = of(self.path)
        has_changed = (now.num_bytes, now.modified_ns) != (self.num_bytes, self.modified_ns)
        is_new = now.inode != self.inode and now.inode_changed_ns != self.inode_changed_ns
        if has_changed or is_new:
            raise errors.WeightsChangedError(self.path)


def check(stamps: Iterable[Stamp]) -> None:
    """Raises as `Stamp.check` does, for the first one that is another."""
    for stamp in stamps:
        stamp.check()


def of(path: Path) -> Stamp:
    status = path.stat()
    return Stamp(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns)
