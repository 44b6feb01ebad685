"""The JSON beside each video: everything that made it, so that it can be made again."""

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from jobs import lifecycle
from worker import scratch, stopwatch
from worker.video import VideoInfo


@dataclass(frozen=True, kw_only=True)
class Rendering:
    """What a finished render leaves to tell, beside the job itself."""

    video: VideoInfo
    timings: stopwatch.Timings
    worker: str
    memory: str
    """How the weights were placed."""
    ran_out: str | None
    """Why they were placed so, when a first try had too little memory."""
    peak_memory_bytes: int | None
    device: dict[str, Any]
    latents_sha256: str | None = None
    weights_sha256: dict[str, str] | None = None
    loras_sha256: dict[str, str] | None = None


def of(
    claim: lifecycle.Claim, folder: scratch.AttemptFolder, rendering: Rendering
) -> dict[str, Any]:
    """Reads the finished video for its size and SHA-256."""
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
        "weights_sha256": rendering.weights_sha256,
        "loras_sha256": rendering.loras_sha256,
        "memory": rendering.memory,
        "ran_out_of_memory": rendering.ran_out,
        "rushes": importlib.metadata.version("rushes"),
        **rendering.device,
        "worker": rendering.worker,
        "seconds": rendering.timings.seconds,
        **rendering.timings.on_device(),
        "peak_memory_bytes": rendering.peak_memory_bytes,
    }
