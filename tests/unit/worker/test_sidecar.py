"""What made a video is told under its own name, and nothing else is."""

import hashlib
import importlib.metadata

from jobs import lifecycle, looks
from worker import scratch, sidecar, stopwatch, video


def test_each_fact_has_its_own_name(look, tmp_path):
    """All values differ, so that none can stand in another's place."""
    claim = lifecycle.Claim(
        attempt_id=11,
        job_id=22,
        batch_id="a-batch",
        custom_id="shot-33",
        number=4,
        meta={"scene": "5"},
        queue="rushes.render.tiny",
        spec=looks.RenderSpec(
            look=look(),
            prompt="a red circle",
            negative_prompt="blur",
            image_key="inputs/picture.png",
            seed=66,
        ),
    )
    folder = scratch.AttemptFolder(root=tmp_path, batch_id="a-batch", attempt_id=11)
    folder.make()
    folder.video.write_bytes(b"seven bytes and more")
    rendering = sidecar.Rendering(
        video=video.VideoInfo(
            width=16, height=32, num_frames=5, fps=8.0, codec="h264", pixel_format="yuv420p"
        ),
        timings=stopwatch.Timings(
            seconds={"denoise": 7.0}, device_began=1_700_000_000.0, device_ended=1_700_000_008.0
        ),
        worker="gpu0@here",
        memory="block offload",
        ran_out="too little memory",
        peak_memory_bytes=99,
        device={"device": "H200", "encoder": "libx264"},
        latents_sha256="of the latents",
        weights_sha256={"dit.safetensors": "of the weights"},
        loras_sha256={"style.safetensors": "of the LoRA"},
    )
    assert sidecar.of(claim, folder, rendering) == look().model_dump(mode="json") | {
        "batch_id": "a-batch",
        "job_id": 22,
        "custom_id": "shot-33",
        "attempt_id": 11,
        "attempt": 4,
        "metadata": {"scene": "5"},
        "prompt": "a red circle",
        "negative_prompt": "blur",
        "image_key": "inputs/picture.png",
        "seed": 66,
        "video": {
            "width": 16,
            "height": 32,
            "num_frames": 5,
            "fps": 8.0,
            "codec": "h264",
            "pixel_format": "yuv420p",
            "bytes": 20,
            "sha256": hashlib.sha256(b"seven bytes and more").hexdigest(),
        },
        "latents_sha256": "of the latents",
        "weights_sha256": {"dit.safetensors": "of the weights"},
        "loras_sha256": {"style.safetensors": "of the LoRA"},
        "memory": "block offload",
        "ran_out_of_memory": "too little memory",
        "rushes": importlib.metadata.version("rushes"),
        "device": "H200",
        "encoder": "libx264",
        "worker": "gpu0@here",
        "seconds": {"denoise": 7.0},
        "device_began_at": "2023-11-14T22:13:20+00:00",
        "device_ended_at": "2023-11-14T22:13:28+00:00",
        "peak_memory_bytes": 99,
    }
