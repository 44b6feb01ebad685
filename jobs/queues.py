"""Names of the queues: one per model, taken by the workers that have its weights."""

import hashlib
import re
from pathlib import PurePosixPath

PREFIX = "rushes.render."
MAX_SLUG_CHARS = 60
SIMULATED = "simulated"  # the one model that needs no weights: simulated devices render it alone


def of_model(model_path: str) -> str:
    """`Wan2.1-T2V-14B` -> `rushes.render.wan2.1-t2v-14b`; a path of several parts gets a mark."""
    path = PurePosixPath(model_path)
    slug = re.sub(r"[^a-z0-9.]+", "-", path.name.lower()).strip("-.")[:MAX_SLUG_CHARS]
    if slug and len(path.parts) == 1 and slug == path.name.lower():
        return PREFIX + slug
    mark = hashlib.sha256(model_path.encode()).hexdigest()[:8]
    return f"{PREFIX}{slug or 'model'}-{mark}"


def may_lie_elsewhere(queue: str) -> bool:
    """Whether its model's path may have several parts; of an absolute one it has."""
    return re.search(r"-[0-9a-f]{8}$", queue) is not None


def is_simulated(model_path: str) -> bool:
    """For rehearsals: `simulated`, or a path below it to stand for several models."""
    return PurePosixPath(model_path).parts[:1] == (SIMULATED,)
