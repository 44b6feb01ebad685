"""A process from its start to the first frame: `python -m benchmarks.cold ours|theirs FOLDER`.

Prints the times (of day, in seconds) at which all code was loaded, the model was, the transformer
was first asked, and the first frame was on the host. `benchmarks.paired` starts it.
"""

# Imports are part of what is measured, and each side has its own.

import json
import os
import sys
import time
from pathlib import Path


class Moments:
    """When something was first reached."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def reach(self, name: str) -> None:
        self.seconds.setdefault(name, time.time())


def ours(_models_dir: Path, moments: Moments) -> None:
    """As a render process does it, without Celery."""
    from benchmarks import scales
    from jobs import settings
    from worker import checks, pipeline, rendering, stopwatch
    from worker.settings import WorkerSettings

    moments.reach("code")
    renderer = rendering.make(settings.load(), WorkerSettings(), checks.Checks())
    here = renderer.device
    spec = scales.spec(scales.of(is_gpu=here.is_cuda), scales.PROMPT)
    model = renderer.components.model_for(spec.look)
    moments.reach("model")
    model.networks.transformer.register_forward_pre_hook(lambda *_: moments.reach("step"))
    timings = stopwatch.Timings(here.synchronize)
    latents = pipeline.make_latents(
        spec, model, device=here, timings=timings, reached=lambda *_: None
    )
    chunks = pipeline.decode(latents, model, timings=timings, reached=lambda *_: None)
    next(chunks)
    moments.reach("frame")


def theirs(models_dir: Path, moments: Moments) -> None:
    import torch

    from benchmarks import measuring, reference, scales
    from worker import device
    from worker.settings import WorkerSettings

    moments.reach("code")
    here = device.current(WorkerSettings())
    scale = scales.of(is_gpu=here.is_cuda)
    pipeline = reference.load(models_dir / scales.MODEL, dtype=here.dtype, device=here.torch_device)
    moments.reach("model")
    pipeline.transformer.register_forward_pre_hook(lambda *_: moments.reach("step"))
    with torch.inference_mode(), measuring.same_attention():
        frames = pipeline(
            prompt=scales.PROMPT,
            height=scale.height,
            width=scale.width,
            num_frames=scale.num_frames,
            num_inference_steps=4,
            guidance_scale=1.0,
            output_type="pt",
        ).frames[0]
        reference.to_uint8(frames)
    moments.reach("frame")


def main() -> None:
    side, folder = sys.argv[1:]
    os.environ |= {"RUSHES_MODELS_DIR": folder, "RUSHES_HOME": folder}
    moments = Moments()
    {"ours": ours, "theirs": theirs}[side](Path(folder), moments)
    sys.stdout.write(json.dumps(moments.seconds) + "\n")
    sys.stdout.flush()
    os._exit(0)  # threads that hash weights are none of this


if __name__ == "__main__":
    main()
