"""SHA-256 of weight files, read once per machine: tens of gigabytes take a minute."""

import hashlib
import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple
from pathlib import Path

import structlog
from pydantic import TypeAdapter, ValidationError

from models import layout, stamps

log = structlog.get_logger()

HASHES_FILE = "weight-hashes.json"
HASHES = TypeAdapter(dict[str, dict[str, str]])  # stamp of the files -> their hashes

_cache_lock = threading.Lock()


def of(
    files: layout.ModelFiles, *, as_loaded: Sequence[stamps.Stamp], cache: Path
) -> dict[str, str]:
    """Of every file that makes a model. WeightsChangedError: one is another than it was then."""
    return _remembered(as_loaded, lambda: layout.weight_hashes(files), cache)


def of_file(path: Path, *, cache: Path) -> str:
    """Of one file, such as a LoRA. WeightsChangedError: it was replaced meanwhile."""
    now = [stamps.of(path)]
    return _remembered(now, lambda: {path.name: _read_hash(path)}, cache)[path.name]


def _read_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remembered(
    files: Sequence[stamps.Stamp], read: Callable[[], dict[str, str]], cache: Path
) -> dict[str, str]:
    """So that each file is read once per machine."""
    key = json.dumps({str(path): facts for path, *facts in map(astuple, files)}, sort_keys=True)
    with _cache_lock:
        known = _read_cache(cache)
    if key not in known:
        stamps.check(files)  # else it would be read for nothing
        known = {key: read()}
        stamps.check(files)
        with _cache_lock:
            _write_cache(cache, _read_cache(cache) | known)
    return known[key]


def _read_cache(cache: Path) -> dict[str, dict[str, str]]:
    """Empty when it is missing or damaged: then it is made anew."""
    try:
        return HASHES.validate_json(cache.read_bytes())
    except (OSError, ValidationError):
        return {}


def _write_cache(cache: Path, known: dict[str, dict[str, str]]) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        # The processes of other devices write to the same folder.
        part = cache.with_name(f"{cache.name}.{os.getpid()}.{threading.get_ident()}.part")
        part.write_text(json.dumps(known, indent=1), "utf-8")
        part.rename(cache)
    except OSError as error:
        log.warning("weight_hashes.not_cached", error=str(error))
