"""What `jobs` calls of `worker` and `models`, which stand above it or beside it.

The command line starts workers and asks about weights, though `jobs` must not import them. So it
names what it needs here, and only here; a test finds each of them. None is loaded before its call.
"""

import importlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Part:
    """A name in a module of ours that is loaded when it is called for."""

    module: str
    name: str
    loads_torch: bool = False

    def load(self) -> Any:
        return getattr(importlib.import_module(self.module), self.name)


RUN_WORKERS = Part("worker.launch", "run")
RENDERING_SETTINGS = Part("worker.launch", "check_settings")
WORKER_SETTINGS = Part("worker.settings", "WorkerSettings")
DEVICE_SLOTS = Part("worker.gpus", "slots")
SCRATCH_FOLDERS = Part("worker.scratch", "folders")
FIND_WEIGHTS = Part("worker.wanted", "find")
UNLIKE_HEADERS = Part("worker.wanted", "unlike_headers")
KEYS_PASSED_OVER = Part("worker.wanted", "keys_passed_over")
FIT = Part("worker.wanted", "fits")
COPY_TINY_MODEL = Part("models.tiny.shipped", "copy")
FIND_MODEL = Part("models.layout", "find")
QUANTIZE = Part("models.quantized_files", "write", loads_torch=True)
QUANTIZED_PLACE = Part("models.quantized_files", "target_for", loads_torch=True)
QUANTIZATION_SCHEME = Part("models.quantization", "Scheme", loads_torch=True)
READ_TRAINING = Part("worker.distill", "read", loads_torch=True)
TRAIN = Part("worker.distill", "run", loads_torch=True)
TRAINING_COST = Part("worker.distill", "cost_of", loads_torch=True)
TRAINING_LISTENER = Part("worker.distill", "Told", loads_torch=True)
RENDER_ALONE = Part("worker.alone", "render", loads_torch=True)

ALL = (
    RUN_WORKERS,
    RENDERING_SETTINGS,
    WORKER_SETTINGS,
    DEVICE_SLOTS,
    SCRATCH_FOLDERS,
    FIND_WEIGHTS,
    UNLIKE_HEADERS,
    KEYS_PASSED_OVER,
    FIT,
    COPY_TINY_MODEL,
    FIND_MODEL,
    QUANTIZE,
    QUANTIZED_PLACE,
    QUANTIZATION_SCHEME,
    READ_TRAINING,
    TRAIN,
    TRAINING_COST,
    TRAINING_LISTENER,
    RENDER_ALONE,
)
