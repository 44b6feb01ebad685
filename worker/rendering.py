"""A claimed job -> a finished folder, with the networks on this process's device."""

import functools
from collections.abc import Callable
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from jobs import images, lifecycle, presets, reports, settings, storage
from models import fusion, sequence_parallel
from worker import (
    checks,
    components,
    credentials,
    device,
    errors,
    heartbeat,
    kernels,
    pipeline,
    provenance,
    resident,
    scratch,
    sidecar,
    video,
    wanted,
)
from worker.settings import WorkerSettings

HASH_LOOK_SECONDS = 5.0


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

    def render(
        self,
        claim: lifecycle.Claim,
        folder: scratch.AttemptFolder,
        heart: heartbeat.Progress,
        *,
        ran_out: str | None = None,
    ) -> None:
        """Leave a finished video in the folder. DeviceOutOfMemory: step down, then try again."""
        timings = pipeline.Timings(device=self.device)
        with self.device.faults():
            folder.make()
            self.device.reset_peak_memory()
            model, latents_BCTHW = self.make_latents(claim.spec, timings, heart.reached)
            info = self._make_mp4(claim, folder, latents_BCTHW, model, timings, heart)
            latents_sha256 = pipeline.latents_sha256(latents_BCTHW)
            while not model.hashes.done():
                # Of the weights: minutes the first time, and no stall of ours.
                heart.reached("hash", 0, 1)
                futures.wait([model.hashes], timeout=HASH_LOOK_SECONDS)
            rendering = sidecar.Rendering(
                video=info,
                seconds=timings.seconds,
                worker=self.worker_settings.worker_name,
                memory=wanted.told(model.key.mode),
                ran_out=ran_out,
                peak_memory_bytes=self.device.peak_memory_bytes(),
                device=self._description(),
                latents_sha256=latents_sha256,
                weights_sha256=self.components.weight_hashes(model),
                loras_sha256=self.components.lora_hashes(claim.spec.look, model),
            )
            folder.finish(sidecar.of(claim, folder, rendering))

    def make_latents(
        self, spec: presets.RenderSpec, timings: pipeline.Timings, reached: pipeline.Reached
    ) -> tuple[resident.ResidentModel, Tensor]:
        """The model, loaded if need be, and the video's clean latents.

        Where tokens are shared, all processes call this with the same spec.
        """
        reached("load", 0, 1)
        with timings.stage("load"):
            model = self.components.model_for(spec.look)
            model.share(self.tokens)
            image_HWC = self._image(spec, model)
        return model, pipeline.make_latents(
            spec,
            model,
            device=self.device,
            timings=timings,
            reached=reached,
            image_HWC=image_HWC,
        )

    def step_down(self, look: presets.Look) -> str | None:
        """After running out of memory: place less on the device. In words; None: nothing less."""
        lower = self.components.step_down(look)
        return None if lower is None else wanted.told(lower)

    def report(self, *, renders: int) -> reports.Report:
        return self.components.report(renders=renders)

    def _description(self) -> dict[str, Any]:
        facts = self.device.description() | kernels.description(self.compiler)
        if self.tokens.num_processes > 1:
            facts["devices_per_video"] = self.tokens.num_processes
        return facts

    def _image(self, spec: presets.RenderSpec, model: resident.ResidentModel) -> Tensor | None:
        """The first frame as it was submitted, unless its condition is at hand."""
        if spec.image_key is None or model.knows_image(spec.image_key, spec.look):
            return None
        try:
            image = images.decode_rgb(self.read_image(spec.image_key))
        except images.ImageError as error:
            raise errors.ImageLost(f"{spec.image_key} in the results store: {error}") from error
        return torch.from_numpy(np.array(image))

    def _make_mp4(
        self,
        claim: lifecycle.Claim,
        folder: scratch.AttemptFolder,
        latents_BCTHW: Tensor,
        model: resident.ResidentModel,
        timings: pipeline.Timings,
        heart: heartbeat.Progress,
    ) -> video.VideoInfo:
        """Decoded chunks go straight into ffmpeg: the mp4 is ready when the last one is."""
        look, origin = claim.spec.look, provenance.Origin.of(claim)
        check = self.safety.of_frames(claim)
        with video.Mp4Writer(
            folder.video,
            width=look.width,
            height=look.height,
            fps=look.fps,
            worker_settings=self.worker_settings,
            comment=origin.comment,
        ) as writer:
            for frames_THWC in pipeline.decode(
                latents_BCTHW, model, timings=timings, reached=heart.reached
            ):
                check.look_at(frames_THWC)
                writer.write(frames_THWC)
            heart.reached("mux", 0, 1)
            with timings.stage("mux"):
                writer.finish()
                with scratch.disk_errors():
                    provenance.mark(folder.video, origin)
                    if self.credentials is not None:
                        self.credentials.sign(folder.video, origin)
                return video.check(
                    folder.video,
                    width=look.width,
                    height=look.height,
                    num_frames=look.num_frames,
                    fps=look.fps,
                )


def make(
    config: settings.Settings, worker_settings: WorkerSettings, asked: checks.Checks
) -> Renderer:
    """Touches the device for the first time."""
    here = device.current(worker_settings)
    compiler = kernels.set_up(worker_settings, here, cache=config.home / "kernels")
    return Renderer(
        worker_settings=worker_settings,
        device=here,
        components=components.Components(
            models_dir=config.models_dir, home=config.home, device=here
        ),
        read_image=functools.partial(read_stored, config),
        compiler=compiler,
        safety=asked,
        credentials=credentials.load(worker_settings),
    )


def read_stored(config: settings.Settings, key: str) -> bytes:
    """From the results store. ImageLost, or StoreUnavailable where the store is to blame."""
    store = storage.open_store(config)
    try:
        try:
            return store.read_bytes(key)
        except storage.ObjectMissing as error:
            store.check()
            if next(iter(store.list()), None) is None:
                # Else a disk that is not mounted would end every job for good.
                empty = f"{error}; {store.url} holds nothing at all"
                raise errors.StoreUnavailable(empty) from error
            raise errors.ImageLost(str(error)) from error
    except storage.StorageError as error:
        raise errors.StoreUnavailable(str(error)) from error
