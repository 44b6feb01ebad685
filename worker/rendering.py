"""A claimed job -> a finished folder, with the networks on this process's device."""

import functools
import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs import images, lifecycle, looks, reports, settings, storage, stores
from models import fusion, sequence_parallel
from worker import (
    behind,
    checks,
    components,
    credentials,
    device,
    errors,
    h264,
    heartbeat,
    kernels,
    pipeline,
    provenance,
    resident,
    scratch,
    sidecar,
    stopwatch,
    video,
    wanted,
)
from worker.settings import WorkerSettings

HASH_LOOK_SECONDS = 5.0
AGAIN = "submit it again, then retry"
MOST_WAITING_BYTES = 256_000_000
"""Of frames that wait for ffmpeg: 81 of 1280x720 do, so the device waits for larger ones alone."""


@dataclass(frozen=True, kw_only=True)
class Renderer:
    """The networks, their device, and what they need of the settings."""

    worker_settings: WorkerSettings
    device: device.Device
    components: components.Components
    read_image: Callable[[str], bytes]
    """An input image by its key; a RenderError says why there is none."""
    tokens: sequence_parallel.Tokens = field(default_factory=sequence_parallel.AllTokens)
    """Those that this process computes of each video."""
    compiler: fusion.Compiler | None = None
    safety: checks.Checks = field(default_factory=checks.Checks)
    credentials: "credentials.Credentials | None" = None
    fetcher: futures.ThreadPoolExecutor = field(
        default_factory=lambda: futures.ThreadPoolExecutor(1, thread_name_prefix="fetcher")
    )
    _waiting: set[int] = field(default_factory=set, init=False)
    """Attempts whose mp4 is there, and for whose weights' hashes a tail waits."""
    _ends: threading.Event = field(default_factory=threading.Event, init=False)

    def render(
        self,
        claim: lifecycle.Claim,
        folder: scratch.AttemptFolder,
        heart: heartbeat.Progress,
        *,
        ran_out: str | None = None,
    ) -> Callable[[], None]:
        """All that the device does. What is left leaves a finished video in the folder.

        DeviceOutOfMemory: step down, then try again.
        """
        timings = stopwatch.Timings(self.device.synchronize)
        with self.device.faults(), ExitStack() as parts:
            folder.make()
            self.device.reset_peak_memory()
            model, latents_BCTHW = self.make_latents(claim.spec, timings, heart.reached)
            encoder = parts.enter_context(self._encoder(claim, folder, heart))
            for frames_THWC in pipeline.decode(
                latents_BCTHW, model, timings=timings, reached=heart.reached
            ):
                encoder.take(frames_THWC)
            # Nothing of the device, nor of a model that the next job may replace, is kept.
            left = Unfinished(
                claim=claim,
                folder=folder,
                heart=heart,
                timings=timings,
                clean_latents=latents_BCTHW.float().cpu(),
                memory=wanted.told(model.key.mode),
                ran_out=ran_out,
                peak_memory_bytes=self.device.peak_memory_bytes(),
                device=self._description() | {"encoder": encoder.writer.encoder},
                hashing=self.components.hashing(model),
                loras_sha256=self.components.lora_hashes(claim.spec.look, model),
            )
            return functools.partial(self._finish, left, encoder, parts.pop_all())

    def _finish(self, left: "Unfinished", encoder: "Encoder", parts: ExitStack) -> None:
        """What needs no device: in a thread, while the next job is rendered."""
        with parts:
            left.heart.reached("mux", 0, 1)
            with left.timings.stage("mux"):
                info = encoder.finish(self.credentials)
        latents_sha256 = pipeline.latents_sha256(left.clean_latents)
        self._await_hashes(left)
        rendering = sidecar.Rendering(
            video=info,
            timings=left.timings,
            worker=self.worker_settings.worker_name,
            memory=left.memory,
            ran_out=left.ran_out,
            peak_memory_bytes=left.peak_memory_bytes,
            device=left.device,
            latents_sha256=latents_sha256,
            weights_sha256=self.components.weight_hashes(left.hashing),
            loras_sha256=left.loras_sha256,
        )
        left.folder.finish(sidecar.of(left.claim, left.folder, rendering))

    def _await_hashes(self, left: "Unfinished") -> None:
        """Of the weights: minutes the first time, and no stall of ours."""
        self._waiting.add(left.claim.attempt_id)
        try:
            while not left.hashing.done() and not self._ends.is_set():
                left.heart.reached("hash", 0, 1)
                futures.wait([left.hashing], timeout=HASH_LOOK_SECONDS)
        finally:
            self._waiting.discard(left.claim.attempt_id)

    @contextmanager
    def _encoder(
        self, claim: lifecycle.Claim, folder: scratch.AttemptFolder, heart: heartbeat.Progress
    ) -> Iterator["Encoder"]:
        look, origin = claim.spec.look, provenance.Origin.of(claim)
        with (
            # Outermost: when ffmpeg has been killed, no write waits for it any more.
            behind.Behind("frames") as beside,
            video.Mp4Writer(
                folder.video,
                width=look.width,
                height=look.height,
                fps=look.fps,
                worker_settings=self.worker_settings,
                comment=origin.comment,
            ) as writer,
        ):
            yield Encoder(
                folder=folder,
                look=look,
                origin=origin,
                check=self.safety.of_frames(claim),
                writer=writer,
                beside=beside,
                heart=heart,
            )

    def make_latents(
        self, spec: looks.RenderSpec, timings: stopwatch.Timings, reached: pipeline.Reached
    ) -> tuple[resident.ResidentModel, Tensor]:
        """The model, loaded if need be, and the video's clean latents.

        Where tokens are shared, all processes call this with the same spec.
        """
        reached("load", 0, 1)
        with timings.stage("load"):
            model = self.components.model_for(spec.look)
            model.share(self.tokens)
        return model, pipeline.make_latents(
            spec,
            model,
            device=self.device,
            timings=timings,
            reached=reached,
            image=self._image(spec, model),
        )

    def step_down(self, look: looks.Look) -> str | None:
        """After running out of memory: place less on the device. In words; None: nothing less."""
        with self.device.faults():
            lower = self.components.step_down(look)
        return None if lower is None else wanted.told(lower)

    def num_waiting(self) -> int:
        """Of how many videos the mp4 is there and the hashes of their weights are not yet."""
        return len(self._waiting)

    def hurry(self) -> None:
        """This process ends: what is left of its videos waits for no hash any more."""
        self._ends.set()

    def report(self, *, renders: int) -> reports.Report:
        return self.components.report(renders=renders)

    def _description(self) -> dict[str, Any]:
        facts = self.device.description() | kernels.description(self.compiler)
        if self.tokens.num_processes > 1:
            facts["devices_per_video"] = self.tokens.num_processes
        return facts

    def _image(
        self, spec: looks.RenderSpec, model: resident.ResidentModel
    ) -> Callable[[], Tensor] | None:
        """The first frame as it was submitted, fetched while the text is encoded."""
        if spec.image_key is None or model.knows_image(spec.image_key, spec.look):
            return None
        return self.fetcher.submit(self._fetched, spec.image_key).result

    def _fetched(self, key: str) -> Tensor:
        try:
            image = images.decode_rgb(self.read_image(key))
        except images.ImageError as error:
            raise errors.ImageLost(f"{key} in the results store: {error}; {AGAIN}") from error
        return torch.from_numpy(np.array(image))


@dataclass(frozen=True, kw_only=True)
class Unfinished:
    """A render whose frames are on their way into the mp4, and what its sidecar will tell."""

    claim: lifecycle.Claim
    folder: scratch.AttemptFolder
    heart: heartbeat.Progress
    timings: stopwatch.Timings
    clean_latents: Tensor
    """BCTHW in fp32, on the host."""
    memory: str
    ran_out: str | None
    peak_memory_bytes: int | None
    device: dict[str, Any]
    hashing: "futures.Future[dict[str, str]]"
    """Of the weights."""
    loras_sha256: dict[str, str] | None


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Frames go straight into ffmpeg, in a thread: the device decodes the next ones meanwhile."""

    folder: scratch.AttemptFolder
    look: looks.Look
    origin: provenance.Origin
    check: checks.FrameCheck
    writer: video.Mp4Writer
    beside: behind.Behind
    heart: heartbeat.Progress

    def take(self, frames_THWC: Tensor) -> None:
        """Returns at once unless too many wait. Raises what went wrong with earlier frames."""
        self.beside.check()
        self.beside.wait(leave=MOST_WAITING_BYTES // frames_THWC.nbytes)
        self.beside.do(functools.partial(self._look_and_write, frames_THWC))

    def _look_and_write(self, frames_THWC: Tensor) -> None:
        self.check.look_at(frames_THWC)
        self.writer.write(frames_THWC)
        self.heart.keep()  # of a slow check each piece is a step

    def finish(self, signs: "credentials.Credentials | None") -> video.VideoInfo:
        """A whole, marked and checked mp4."""
        # A slow preset has much left to encode: no stall, and it can still be cancelled.
        while not self.beside.wait(seconds=video.LOOK_SECONDS):
            self.heart.reached("mux", 0, 1)
        self.writer.finish(on_progress=lambda: self.heart.reached("mux", 0, 1))
        look, path = self.look, self.folder.video
        with scratch.disk_errors():
            provenance.mark(path, self.origin)
            if signs is not None:
                signs.sign(path, self.origin)
        return video.check(
            path, width=look.width, height=look.height, num_frames=look.num_frames, fps=look.fps
        )


def make(
    config: settings.Settings, worker_settings: WorkerSettings, asked: checks.Checks
) -> Renderer:
    """Touches the device for the first time."""
    here = device.current(worker_settings)
    compiler = kernels.set_up(worker_settings, here, cache=config.home / "kernels")
    # An encoder that is not there is told before there is a job.
    h264.encoder(worker_settings, width=h264.NVENC_LEAST, height=h264.NVENC_LEAST)
    # Opened once: a client of S3 takes 0.1 s to make.
    store = functools.cache(functools.partial(stores.open_store, config))
    return Renderer(
        worker_settings=worker_settings,
        device=here,
        components=components.Components(
            models_dir=config.models_dir, home=config.home, device=here
        ),
        read_image=functools.partial(read_stored, store),
        compiler=compiler,
        safety=asked,
        credentials=credentials.load(worker_settings),
    )


def read_stored(store: Callable[[], storage.ObjectStore], key: str) -> bytes:
    """From the results store. ImageLost, or StoreUnavailable where the store is to blame."""
    try:
        try:
            data = store().read_bytes(key)
        except storage.ObjectMissing as error:
            store().check()
            if next(iter(store().list()), None) is None:
                # Else a disk that is not mounted would end every job for good.
                empty = f"{error}; {store().url} holds nothing at all"
                raise errors.StoreUnavailable(empty) from error
            raise errors.ImageLost(f"{error}; {AGAIN}") from error
    except storage.StorageError as error:
        raise errors.StoreUnavailable(str(error)) from error
    if hashlib.sha256(data).hexdigest() != key.rpartition("/")[2]:
        other = "not the image that was submitted (its sha256 differs)"
        raise errors.ImageLost(f"{key} in the results store: {other}: {AGAIN}")
    return data
