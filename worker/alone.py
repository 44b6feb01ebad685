"""Prompts -> videos in a folder, here and now: no database, no broker, no store.

One process, or several that torchrun started, one per GPU; then all of them denoise each video
together, and the first one does the rest. When one fails, torchrun ends the others. What is
finished stays, and is passed over the next time.
"""

import dataclasses
import datetime
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from torch import distributed

from jobs import errors as jobs_errors
from jobs import lifecycle, looks, settings
from models import sequence_parallel
from worker import checks, errors, gpus, group, rendering, runner, scratch, stopwatch
from worker import settings as worker_settings_module

log = structlog.get_logger()

TORCH_SEES_NONE = (
    "torch sees no GPU: it is a build for processors, or the driver is too old for its CUDA"
)
PATIENCE = datetime.timedelta(hours=1)  # for one that reads its weights from a slow disk


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the first process tells the others to denoise with it."""

    spec: looks.RenderSpec
    image: bytes | None


class _Unwatched:
    """Nobody cancels a video from elsewhere: whoever wants it to stop ends this process."""

    def reached(self, stage: str, step: int, steps: int) -> None:
        """Goes on."""

    def keep(self) -> None:
        """Goes on."""


def render(
    claims: Mapping[str, lifecycle.Claim],
    target: Path,
    known: settings.Settings,
    *,
    read_image: Callable[[str], bytes],
    on_begin: Callable[[str], None],
    on_video: Callable[[str, Path], None],
) -> None:
    """Each video and its sidecar, by these names, into the folder.

    `on_begin` hears of each video that is to be made, `on_video` of each that is there. RushesError
    for the first one that fails. In processes beside the first, claims are not looked at.
    """
    with group.joined(patience=PATIENCE), _exchange_errors():
        renderer = _renderer(known)
        if not group.is_first():
            _follow(renderer)
            return
        for name, claim in claims.items():
            video = target / f"{name}.mp4"
            if not video.exists():
                on_begin(name)
                image = _image(claim.spec, read_image)
                _tell_others(Work(spec=claim.spec, image=image))
                _make(_with_image(renderer, image), claim, video)
            on_video(name, video)
        _tell_others(None)


@contextmanager
def _exchange_errors() -> Iterator[None]:
    try:
        yield
    except sequence_parallel.ExchangeError as error:
        raise errors.DeviceFault(str(error)) from error


def _renderer(known: settings.Settings) -> rendering.Renderer:
    mine = worker_settings_module.load().model_copy(
        update={"worker_name": f"render@{known.host_name}"}
    )
    if mine.device == "auto" and group.is_first() and not torch.cuda.is_available():
        # In a thread: a driver that does not answer would hold up everything.
        threading.Thread(target=_tell_of_gpus, daemon=True).start()
    if not group.are_many():
        return rendering.make(known, mine, checks.Checks.load(known, mine))
    if torch.cuda.is_available() and mine.device in ("auto", "cuda"):
        mine = mine.model_copy(update={"device": f"cuda:{torch.cuda.current_device()}"})
    made = rendering.make(known, mine, checks.Checks.load(known, mine))
    return dataclasses.replace(made, tokens=sequence_parallel.SharedTokens())


def _tell_of_gpus() -> None:
    """Hours of the processor would be a dear way to learn of an old driver."""
    with suppress(jobs_errors.GpusUnknown):  # that is in the log already
        if found := [gpu.name for gpu in gpus.find()]:
            log.warning("gpu.not_used", gpus=found, because=TORCH_SEES_NONE)


def _image(spec: looks.RenderSpec, read_image: Callable[[str], bytes]) -> bytes | None:
    if spec.image_key is None:
        return None
    try:
        return read_image(spec.image_key)
    except jobs_errors.RushesError as error:
        raise errors.ImageLost(str(error)) from error


def _with_image(renderer: rendering.Renderer, image: bytes | None) -> rendering.Renderer:
    def read(_key: str) -> bytes:
        assert image is not None
        return image

    return dataclasses.replace(renderer, read_image=read)


def _make(renderer: rendering.Renderer, claim: lifecycle.Claim, video: Path) -> None:
    """The sidecar first: where a video is, it is complete."""
    with (
        scratch.disk_errors(),
        tempfile.TemporaryDirectory(prefix=".unfinished-", dir=video.parent) as unfinished,
    ):
        folder = scratch.AttemptFolder(
            root=Path(unfinished), batch_id=claim.batch_id, attempt_id=claim.attempt_id
        )
        if group.are_many():
            # Out of memory, the others cannot step down with it: they are amidst the same step.
            left = renderer.render(claim, folder, _Unwatched())
        else:
            left = runner.render(renderer, claim, folder, _Unwatched())
        left()
        folder.sidecar.replace(video.with_suffix(".json"))
        folder.video.replace(video)


def _follow(renderer: rendering.Renderer) -> None:
    timings = stopwatch.Timings(renderer.device.synchronize)
    while (work := _told_by_first()) is not None:
        # What is not finite is so for all, and the first one says it.
        with renderer.device.faults(), suppress(errors.NotFinite):
            _with_image(renderer, work.image).make_latents(work.spec, timings, _Unwatched().reached)


def _tell_others(work: Work | None) -> None:
    if group.are_many():
        distributed.broadcast_object_list([work])


def _told_by_first() -> Work | None:
    heard: list[Work | None] = [None]
    with suppress(RuntimeError):  # the first one has ended, and has said why
        distributed.broadcast_object_list(heard)
    return heard[0]
