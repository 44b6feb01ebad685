"""Whether other files make a warm model by now. No disk that hangs holds it up."""

from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path

from models import errors as model_errors
from models import layout, stamps
from worker import copies
from worker.resident import ResidentModel

DISK_SECONDS = 5.0  # some thirty questions to a server take a tenth of one


@dataclass
class Looks:
    """At the files of models, in a thread: what is not answered yet is not asked again."""

    models_dir: Path
    _looker: futures.ThreadPoolExecutor = field(
        default_factory=lambda: futures.ThreadPoolExecutor(1, thread_name_prefix="model-files")
    )
    _last: "futures.Future[bool] | None" = None

    def was_replaced(self, model: ResidentModel) -> bool:
        """False also while files are copied, and where they are gone: what is loaded stays."""
        if self._last is not None and not self._last.done():
            return False
        files, as_loaded = model.files, model.as_loaded  # a thread that hangs keeps no networks
        named = model.key.transformer, model.key.low_noise_transformer
        is_base = model.key.base

        def look() -> bool:
            now = layout.find(
                files.root, transformer_file=named[0], low_noise_file=named[1], base=is_base
            )
            are_same = [stamp.path for stamp in as_loaded] == [*now.weights, *now.configs]
            if now == files and are_same and not _have_changed(as_loaded):
                return False
            elsewhere = {path.parent for path in now.weights if not path.is_relative_to(now.root)}
            folders = {now.root, *elsewhere}
            return all(copies.beside(folder, self.models_dir).is_copied for folder in folders)

        self._last = self._looker.submit(look)
        try:
            return self._last.result(timeout=DISK_SECONDS)
        except (model_errors.CheckpointError, OSError):  # TimeoutError is one
            return False


def _have_changed(as_loaded: tuple[stamps.Stamp, ...]) -> bool:
    try:
        stamps.check(as_loaded)
    except model_errors.WeightsChangedError:
        return True
    return False
