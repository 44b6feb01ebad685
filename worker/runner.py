"""One attempt, from the claim to a finished mp4 on this host's disk."""

import contextlib
import importlib.metadata
import os
import traceback
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import structlog
import torch
from sqlalchemy.exc import DBAPIError
from torch import Tensor

from jobs import (
    broker,
    database,
    dispatch,
    images,
    lifecycle,
    presets,
    retries,
    settings,
    states,
    storage,
    workers,
)
from worker import (
    components,
    device,
    errors,
    finished,
    heartbeat,
    pipeline,
    resident,
    scratch,
    video,
    wanted,
)
from worker import settings as worker_settings_module

log = structlog.get_logger()

HASH_LOOK_SECONDS = 5.0
DEVICE_LOST = 71  # exit status, for the logs


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """What a finished render leaves to tell."""

    latents_sha256: str
    video: video.VideoInfo
    seconds: dict[str, float]
    memory: str
    """How the weights were placed."""
    ran_out: str | None
    """Why it was placed so, when a first try had too little memory."""


@dataclass
class Tally:
    """What this process has done since it began."""

    renders: int = 0


@dataclass(frozen=True, kw_only=True)
class Runner:
    """What one render process holds for as long as it lives."""

    config: settings.Settings
    worker_settings: worker_settings_module.WorkerSettings
    db: database.Database
    bell: broker.Broker
    device: device.Device
    components: components.Components
    tally: Tally = field(default_factory=Tally)

    def run_attempt(self, job_id: int) -> None:
        """Render this job if it may still start. Every way it ends is written to its row."""
        try:
            if self._lacks_room():
                return
            claim = self.db.write(
                lifecycle.claim,
                job_id,
                worker=self.worker_settings.worker_name,
                lease_seconds=self.config.lease_seconds,
                max_running_per_owner=self.config.max_running_per_owner,
            )
        except DBAPIError as error:
            log.warning("claim.missed", job_id=job_id, error=str(error)[:300])
            return
        if claim is None:
            log.info("claim.refused", job_id=job_id)
            return
        log.info("attempt.started", job_id=job_id, attempt_id=claim.attempt_id)
        self.tally.renders += 1
        folder = scratch.AttemptFolder(
            root=self.config.scratch_dir, batch_id=claim.batch_id, attempt_id=claim.attempt_id
        )
        try:
            self._render(claim, folder)
        except errors.AttemptEnded as ended:
            folder.remove()
            self._end(claim, ended)
        except errors.HostFault as fault:
            folder.remove()
            self._give_back(claim, fault)
        except Exception as error:
            folder.remove()
            self._fail(claim, error)
        else:
            self._hand_over(claim, folder)
        finally:
            self._report()
            self.bell.kick()

    def _lacks_room(self) -> bool:
        """This host's fault, not the job's: it stays queued, and its message is sent again."""
        free = scratch.free_bytes(self.config.scratch_dir)
        if free >= workers.MIN_FREE_BYTES:
            return False
        reason = f"{self.config.scratch_dir}: {free / 1e6:.0f} MB free, too little for a video"
        self._refuse(workers.ALL_QUEUES, states.FailureKind.DISK, reason)
        return True

    def _render(self, claim: lifecycle.Claim, folder: scratch.AttemptFolder) -> None:
        heart = heartbeat.Heartbeat(
            self.db,
            claim.attempt_id,
            lease_seconds=self.config.lease_seconds,
            worker_settings=self.worker_settings,
        )
        with heart:
            try:
                self._render_once(claim, folder, heart)
                return
            except errors.DeviceOutOfMemory as error:
                ran_out = str(error)
            # Outside of the handler: the exception holds on to every tensor of the failed try.
            lower = self.components.step_down(claim.spec.look)
            if lower is None:
                raise errors.DeviceOutOfMemory(f"{ran_out}; there is no smaller memory mode")
            mode = wanted.told(lower)
            log.warning("memory.stepped_down", job_id=claim.job_id, mode=mode, error=ran_out)
            self._render_once(claim, folder, heart, ran_out=ran_out)

    def _render_once(
        self,
        claim: lifecycle.Claim,
        folder: scratch.AttemptFolder,
        heart: heartbeat.Heartbeat,
        *,
        ran_out: str | None = None,
    ) -> None:
        timings = pipeline.Timings(device=self.device)
        with self.device.faults():
            folder.make()
            self.device.reset_peak_memory()
            heart.reached("load", 0, 1)
            with timings.stage("load"):
                model = self.components.model_for(claim.spec.look)
                image_HWC = self._image(claim.spec, model)
            latents_BCTHW = pipeline.make_latents(
                claim.spec,
                model,
                device=self.device,
                timings=timings,
                reached=heart.reached,
                image_HWC=image_HWC,
            )
            info = self._make_mp4(claim, folder, latents_BCTHW, model, timings, heart)
            rendering = Rendering(
                latents_sha256=pipeline.latents_sha256(latents_BCTHW),
                video=info,
                seconds=timings.seconds,
                memory=wanted.told(model.key.mode),
                ran_out=ran_out,
            )
            while not model.hashes.done():
                # Of the weights: minutes the first time, and no stall of ours.
                heart.reached("hash", 0, 1)
                futures.wait([model.hashes], timeout=HASH_LOOK_SECONDS)
            folder.finish(self._sidecar(claim, folder, model, rendering))

    def _image(self, spec: presets.RenderSpec, model: resident.ResidentModel) -> Tensor | None:
        """The first frame as it was submitted, unless its condition is at hand."""
        if spec.image_key is None or model.knows_image(spec.image_key, spec.look):
            return None
        try:
            image = images.decode_rgb(self._stored(spec.image_key))
        except images.ImageError as error:
            raise errors.ImageLost(f"{spec.image_key} in the results store: {error}") from error
        return torch.from_numpy(np.array(image))

    def _stored(self, key: str) -> bytes:
        store = storage.open_store(self.config)
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

    def _make_mp4(
        self,
        claim: lifecycle.Claim,
        folder: scratch.AttemptFolder,
        latents_BCTHW: Tensor,
        model: resident.ResidentModel,
        timings: pipeline.Timings,
        heart: heartbeat.Heartbeat,
    ) -> video.VideoInfo:
        """Decoded chunks go straight into ffmpeg: the mp4 is ready when the last one is."""
        look = claim.spec.look
        with video.Mp4Writer(
            folder.video,
            width=look.width,
            height=look.height,
            fps=look.fps,
            worker_settings=self.worker_settings,
        ) as writer:
            for frames_THWC in pipeline.decode(
                latents_BCTHW, model, timings=timings, reached=heart.reached
            ):
                writer.write(frames_THWC)
            heart.reached("mux", 0, 1)
            with timings.stage("mux"):
                writer.finish()
                return video.check(
                    folder.video,
                    width=look.width,
                    height=look.height,
                    num_frames=look.num_frames,
                    fps=look.fps,
                )

    def _sidecar(
        self,
        claim: lifecycle.Claim,
        folder: scratch.AttemptFolder,
        model: resident.ResidentModel,
        rendering: "Rendering",
    ) -> dict[str, Any]:
        """Everything that made this video, so that it can be made again."""
        info = rendering.video
        return {
            "batch_id": claim.batch_id,
            "job_id": claim.job_id,
            "custom_id": claim.custom_id,
            "attempt_id": claim.attempt_id,
            "attempt": claim.number,
            "metadata": claim.meta,
            "prompt": claim.spec.prompt,
            "negative_prompt": claim.spec.negative_prompt,
            "image_key": claim.spec.image_key,
            "seed": claim.spec.seed,
            **claim.spec.look.model_dump(mode="json"),
            "video": {
                "width": info.width,
                "height": info.height,
                "num_frames": info.num_frames,
                "fps": info.fps,
                "codec": info.codec,
                "pixel_format": info.pixel_format,
                "bytes": folder.video.stat().st_size,
                "sha256": scratch.sha256(folder.video),
            },
            "latents_sha256": rendering.latents_sha256,
            "weights_sha256": self.components.weight_hashes(model),
            "loras_sha256": self.components.lora_hashes(claim.spec.look),
            "memory": rendering.memory,
            "ran_out_of_memory": rendering.ran_out,
            "rushes": importlib.metadata.version("rushes"),
            **self.device.description(),
            "worker": self.worker_settings.worker_name,
            "seconds": rendering.seconds,
            "peak_memory_bytes": self.device.peak_memory_bytes(),
        }

    def _hand_over(self, claim: lifecycle.Claim, folder: scratch.AttemptFolder) -> None:
        """Leave the finished video to this host's publisher; the device is free from here on."""
        try:
            self._accept(claim)
            verdict = finished.renew(self.db, self.config, folder, note=None)
            if verdict is lifecycle.Verdict.GO_ON:
                self.bell.send_publish(self.config.host_name, claim.attempt_id)
        except (DBAPIError, broker.BrokerUnavailable) as error:
            # The launcher finds the finished folder and sends again.
            log.warning("publish.not_sent", attempt_id=claim.attempt_id, error=str(error)[:300])
        log.info("attempt.rendered", job_id=claim.job_id, attempt_id=claim.attempt_id)

    def _end(self, claim: lifecycle.Claim, ended: errors.AttemptEnded) -> None:
        event = "attempt.superseded"
        if isinstance(ended, errors.AttemptCancelled):
            event = "attempt.cancelled"
            try:
                self.db.write(lifecycle.cancel_attempt, claim.attempt_id)
            except DBAPIError as unreachable:
                # The lease ends by itself, and the job is cancelled then.
                log.warning("attempt.not_told", error=str(unreachable)[:300])
        log.info(event, job_id=claim.job_id, attempt_id=claim.attempt_id)

    def _give_back(self, claim: lifecycle.Claim, fault: errors.HostFault) -> None:
        """The job waits for a better host, and this one steps aside."""
        reason = str(fault)
        queue = workers.ALL_QUEUES if fault.is_of_all_queues else claim.queue
        facts = {"job_id": claim.job_id, "attempt_id": claim.attempt_id, "kind": fault.kind}
        log.error("attempt.given_back", **facts, error=reason)
        try:
            # First: or this worker might be sent the job again.
            self._refuse(queue, fault.kind, reason)
            wait_seconds = retries.wait_after_release(claim.number)
            self.db.write(
                lifecycle.release, claim.attempt_id, reason=reason, wait_seconds=wait_seconds
            )
        except DBAPIError as unreachable:
            # The lease ends by itself.
            log.warning("attempt.not_told", **facts, error=str(unreachable)[:300])

    def _refuse(self, queue: str, kind: states.FailureKind, reason: str) -> None:
        name = self.worker_settings.worker_name
        seconds = self.db.write(workers.refuse, name, queue=queue, kind=kind, reason=reason)
        log.error("worker.refuses", queue=queue or "all", seconds=round(seconds), error=reason)
        if queue:
            with contextlib.suppress(broker.BrokerUnavailable):
                # Its launcher does it too, a little later, and for all queues.
                self.bell.steer(name, leave=[queue])

    def _accept(self, claim: lifecycle.Claim) -> None:
        """It went well: what this worker refused of the queue, and why, is over."""
        self.db.write(workers.accept, self.worker_settings.worker_name, queue=claim.queue)

    def _report(self) -> None:
        """What this process holds, for people; a word that is lost does no harm."""
        try:
            told = self.components.report(renders=self.tally.renders)
            self.db.write(workers.report, self.worker_settings.worker_name, told)
        except DBAPIError as error:
            log.warning("worker.report_missed", error=str(error)[:200])

    def _fail(self, claim: lifecycle.Claim, error: Exception) -> None:
        kind = error.kind if isinstance(error, errors.RenderError) else states.FailureKind.INTERNAL
        message = str(error) if isinstance(error, errors.RenderError) else _described(error)
        detail = "".join(traceback.format_exception(error))
        facts = {"job_id": claim.job_id, "attempt_id": claim.attempt_id, "kind": kind}
        log.error("attempt.failed", **facts, error=message, detail=detail)
        try:
            self.db.write(
                lifecycle.fail,
                claim.attempt_id,
                kind=kind,
                error=message,
                budgets=dispatch.budgets(self.config),
                detail=detail,
            )
        except DBAPIError as unreachable:
            # The lease ends by itself.
            log.warning("attempt.not_told", **facts, error=str(unreachable)[:300])
        if kind is states.FailureKind.DEVICE:
            # This process can no longer use its device; its parent starts a fresh one.
            self.bell.kick()
            os._exit(DEVICE_LOST)


def make() -> Runner:
    """From the environment of this process. Touches the device for the first time."""
    config = settings.load()
    worker_settings = worker_settings_module.load()
    here = device.current(worker_settings)
    return Runner(
        config=config,
        worker_settings=worker_settings,
        db=database.connect(config),
        bell=broker.Broker(config),
        device=here,
        components=components.Components(
            models_dir=config.models_dir, home=config.home, device=here
        ),
    )


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
