"""The safetensors format: headers read without torch, files written tensor by tensor.

A file is the header's length in 8 bytes, the header in JSON, then the bytes of the tensors.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from models import errors, foreign_files

LENGTH_BYTES = 8
LONGEST_HEADER = 100_000_000  # bytes; what the format allows
SMALL_BYTES = 10_000  # of a tensor that is text; ComfyUI's have less than a hundred
BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U8": 8,
    "BOOL": 8,
}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type in safetensors' words, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * BITS[self.dtype] // 8


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file by name. Raises UnreadableWeightsError."""
    entries = {}
    for name, entry in _read_json(path).items():
        if name == "__metadata__":
            continue
        try:
            entries[name] = Entry(entry["dtype"], tuple(map(int, entry["shape"])))
            known = entry["dtype"] in BITS and min(entries[name].shape, default=0) >= 0
        except (KeyError, TypeError, ValueError, OverflowError):
            known = False
        if not known:
            raise errors.UnreadableWeightsError(path, f"its header says of {name}: {entry!r}")
    return entries


def read_metadata(path: Path) -> dict[str, str]:
    """The free text that the writer of a file left in its header."""
    metadata = _read_json(path).get("__metadata__", {})
    if not isinstance(metadata, dict):
        raise errors.UnreadableWeightsError(path, "its header's __metadata__ is no object")
    return {str(key): str(value) for key, value in metadata.items()}


def read_small(path: Path, names: Iterable[str]) -> dict[str, bytes]:
    """The bytes of tensors by name, at most the first of each. Raises UnreadableWeightsError."""
    header, contents = _read_json(path), {}
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            for name in names:
                begin, end = header[name]["data_offsets"]
                stream.seek(LENGTH_BYTES + length + begin)
                contents[name] = stream.read(min(max(end - begin, 0), SMALL_BYTES))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise errors.UnreadableWeightsError(path, f"no safetensors file: {error}") from error
    return contents


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
            if not 0 < length <= LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(stream.read(length))
    except (OSError, ValueError, RecursionError) as error:
        reason = foreign_files.told(path) or f"no safetensors header: {error}"
        raise errors.UnreadableWeightsError(path, reason) from error
    if not isinstance(header, dict):
        raise errors.UnreadableWeightsError(path, "no safetensors header")
    return header


class Writer:
    """Takes the tensors of a file in the order of its header, one at a time."""

    def __init__(self, stream: IO[bytes], entries: Mapping[str, Entry]) -> None:
        self._stream = stream
        self._left = dict(entries)

    def write(self, name: str, content: bytes) -> None:
        expected, entry = next(iter(self._left.items()))
        assert name == expected, f"{name} was written in place of {expected}"
        assert len(content) == entry.num_bytes, f"{name} has {len(content)} bytes, not {entry}"
        self._stream.write(content)
        del self._left[name]

    def finish(self) -> None:
        assert not self._left, f"not written: {list(self._left)}"


@contextlib.contextmanager
def create(
    path: Path,
    entries: Mapping[str, Entry],
    metadata: Mapping[str, str],
    *,
    replace: bool = False,
) -> Iterator[Writer]:
    """Write a file; it appears under its name when it is whole.

    Raises FileExistsError for one that is there, unless it may be replaced.
    """
    if path.exists() and not replace:
        raise FileExistsError(f"{path} exists already; nothing was written")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as stream:
            header = _header(entries, metadata)
            stream.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
            writer = Writer(stream, entries)
            yield writer
            writer.finish()
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _header(entries: Mapping[str, Entry], metadata: Mapping[str, str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, entry in entries.items():
        end = start + entry.num_bytes
        header[name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    return text + b" " * (-len(text) % 8)  # the data begins at a multiple of 8
