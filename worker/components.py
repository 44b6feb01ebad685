"""Which networks are resident on the device."""

import gc
import json
import os
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import torch
from pydantic import TypeAdapter, ValidationError

from jobs import presets
from models import checkpoint, layout
from models import errors as model_errors
from worker import errors
from worker.device import Device

log = structlog.get_logger()

HASHES_FILE = "weight-hashes.json"
HASHES = TypeAdapter(dict[str, dict[str, str]])  # stamp of the files -> their hashes


@dataclass
class Components:
    """Keeps the networks of the last model warm: most jobs need the same as the one before."""

    models_dir: Path
    home: Path
    device: Device
    loads: int = 0
    _root: Path | None = None
    _networks: checkpoint.TextToVideoNetworks | None = None
    _files: layout.ModelFiles | None = None
    _hashes: Future[dict[str, str]] | None = None
    _hasher: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(1, thread_name_prefix="weight-hashes")
    )

    def networks_for(self, look: presets.Look) -> checkpoint.TextToVideoNetworks:
        """Networks of this look's model; loads them, and lets the others go, if need be."""
        root = self.models_dir / look.model_path
        if self._networks is None or root != self._root:
            try:
                files = layout.find(root)  # before the warm ones go
                self._evict()
                self._networks = self._load(files)
            except (model_errors.CheckpointError, OSError) as error:
                raise errors.WeightsUnusable(str(error)) from error
            self._root = root
        return self._networks

    def weight_hashes(self) -> dict[str, str] | None:
        """SHA-256 per weight file of the resident model; waits until they are known.

        None: the files could not be read once more. The video is none the worse for it.
        """
        assert self._files is not None
        assert self._hashes is not None
        try:
            return self._hashes.result()
        except OSError as error:
            log.warning("weight_hashes.unknown", error=str(error))
            self._begin_to_hash(self._files)  # for the next video
            return None

    def _evict(self) -> None:
        self._networks = None
        gc.collect()
        if self.device.is_cuda:
            torch.cuda.empty_cache()

    def _load(self, files: layout.ModelFiles) -> checkpoint.TextToVideoNetworks:
        began = time.monotonic()
        # Read beside the loading: hashing tens of gigabytes takes a minute, the first time.
        self._begin_to_hash(files)
        networks = checkpoint.load_text_to_video(
            files.root, device=self.device.torch_device, dtype=self.device.dtype
        )
        self.loads += 1
        seconds = round(time.monotonic() - began, 2)
        log.info("model.loaded", root=str(files.root), seconds=seconds)
        return networks

    def _begin_to_hash(self, files: layout.ModelFiles) -> None:
        self._files = files
        cache = self.home / HASHES_FILE
        self._hashes = self._hasher.submit(cached_weight_hashes, files, cache=cache)


_cache_lock = threading.Lock()


def cached_weight_hashes(files: layout.ModelFiles, *, cache: Path) -> dict[str, str]:
    """By path, size and time of change, so that each file is read once per machine."""
    stamp = {str(path): [path.stat().st_size, path.stat().st_mtime_ns] for path in files.weights}
    key = json.dumps(stamp, sort_keys=True)
    with _cache_lock:
        known = _read_cache(cache)
    if key not in known:
        known = {key: layout.weight_hashes(files)}
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
