"""Probe videos of a student in training."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from jobs import errors
from models import checkpoint, layout
from models.distillation import course
from models.vae import WanVAE
from worker import device, pipeline, video
from worker import errors as worker_errors
from worker import settings as worker_settings_module


@dataclass
class Probes:
    """Writes probe videos; the autoencoder stays on the processor between them."""

    plan: course.Course
    files: layout.ModelFiles
    here: device.Device
    on_note: Callable[[str], None]
    vae: WanVAE | None = None

    def write(self, updates: int, place: int, latents_BCTHW: Tensor) -> None:
        """Of one prompt after so many updates: probes/update_000050_prompt_0.mp4."""
        path = self.plan.output / "probes" / f"update_{updates:06}_prompt_{place}.mp4"
        try:
            with self.here.faults():
                self._write(path, latents_BCTHW)
        except worker_errors.DeviceFault:  # the training has no device either
            raise
        except (OSError, errors.RushesError) as error:
            self.on_note(f"no probe video {path.name}: {error}")

    def _write(self, path: Path, latents_BCTHW: Tensor) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.vae is None:
            self.vae = checkpoint.load_vae(self.files, device="cpu", dtype=torch.float32)
        try:
            self._encode(path, self.vae.to(self.here.torch_device), latents_BCTHW)
        finally:
            self.vae.to("cpu")

    def _encode(self, path: Path, vae: WanVAE, latents_BCTHW: Tensor) -> None:
        plan = self.plan
        with video.Mp4Writer(
            path,
            width=plan.target_width,
            height=plan.target_height,
            fps=plan.fps,
            worker_settings=worker_settings_module.WorkerSettings(),
        ) as writer:
            with torch.inference_mode():
                for frames_BCTHW in vae.decode_chunks(latents_BCTHW):
                    writer.write(pipeline.to_uint8(frames_BCTHW))
            writer.finish()
