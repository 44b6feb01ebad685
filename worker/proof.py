"""Whether a device computes as it should: a small render, sums and memory, each with an answer."""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs import looks, presets
from models.tiny import make
from worker import components, device, errors, pipeline, stopwatch

# M, N rows and columns

MODEL = "tiny"
PRESET = """{
  "model_path": "tiny", "denoising_step_list": [1000, 750, 500, 250], "step_rule": "euler",
  "sample_shift": 5, "target_width": 64, "target_height": 64, "target_video_length": 9, "fps": 8
}"""
PROMPT, SEED = "a self-test", 1
TOLERANCES = {torch.float32: 0.02, torch.bfloat16: 0.05, torch.float16: 0.02}
"""Relative error of the latents against fp32 on the processor, which itself has 0.002 in bf16."""
PRODUCT_SIZE = {True: 4096, False: 128}  # on a GPU, elsewhere
PRODUCTS = 100
MEMORY_SHARE = 0.9  # of what is free on a GPU
CHUNK_BYTES = 1 << 28  # small beside what is left free, which comparing needs
PATTERN_SEED = 7


def prove(here: device.Device, folder: Path) -> dict[str, Any]:
    """Seconds per part, for the logs. Raises a RenderError that says what is wrong.

    `folder` is for a tiny model, which is the same on every machine.
    """
    seconds: dict[str, Any] = {}
    with here.faults():
        for part in (_renders, _multiplies, _remembers):
            began = time.perf_counter()
            part(here, folder)
            here.synchronize()
            seconds[part.__name__.removeprefix("_")] = round(time.perf_counter() - began, 2)
    return {"device": here.name, "seconds": seconds}


def _renders(here: device.Device, folder: Path) -> None:
    """Finite, the same twice, and what the processor computes but for rounding."""
    make.make(folder / MODEL)
    preset = folder / "selftest.json"
    preset.write_text(PRESET)
    look = presets.load(str(preset)).look
    spec = looks.RenderSpec(look=look, prompt=PROMPT, negative_prompt=None, seed=SEED)
    first, again = _render(spec, here, folder, times=2)
    if not all(torch.equal(one, other) for one, other in zip(first, again, strict=True)):
        raise errors.DeviceFault(f"{here.name}: two renders of one seed differ")
    processor = device.Device(
        torch_device=torch.device("cpu"), dtype=torch.float32, name="the processor"
    )
    ((reference, _),) = _render(spec, processor, folder, times=1)
    error = float((first[0] - reference).norm() / reference.norm())
    if not error <= TOLERANCES[here.dtype]:
        raise errors.DeviceFault(
            f"{here.name}: the latents in {here.dtype} are {error:.2g} away from the processor's, "
            f"more than {TOLERANCES[here.dtype]:g}"
        )


def _render(
    spec: looks.RenderSpec, here: device.Device, folder: Path, *, times: int
) -> list[tuple[Tensor, Tensor]]:
    """latents_BCTHW in fp32 and frames_THWC, on the processor."""
    model = components.Components(models_dir=folder, home=folder, device=here).model_for(spec.look)
    timings = stopwatch.Timings(here.synchronize)
    rendered = []
    for _ in range(times):
        latents_BCTHW = pipeline.make_latents(
            spec, model, device=here, timings=timings, reached=_go_on
        )
        frames = list(pipeline.decode(latents_BCTHW, model, timings=timings, reached=_go_on))
        rendered.append((latents_BCTHW.float().cpu(), torch.cat(frames)))
    return rendered


def _go_on(_stage: str, _step: int, _steps: int) -> None:
    """Nobody watches: whoever started this process ends it after a time."""


def _multiplies(here: device.Device, _folder: Path) -> None:
    """The same product again and again, under load, has the same bits."""
    size = PRODUCT_SIZE[here.is_cuda]
    generator = torch.Generator().manual_seed(PATTERN_SEED)
    left_MN = torch.randn(size, size, generator=generator).to(here.torch_device, here.dtype)
    expected_MM = left_MN @ left_MN.T
    if not expected_MM.isfinite().all():
        raise errors.NotFinite(f"{here.name}: NaN or infinity in a product of small numbers")
    wrong = torch.zeros((), dtype=torch.int64, device=here.torch_device)
    for _ in range(PRODUCTS):
        wrong += (left_MN @ left_MN.T != expected_MM).sum()
    if int(wrong):
        raise errors.DeviceFault(f"{here.name}: a product repeated {PRODUCTS} times differs")


def _remembers(here: device.Device, _folder: Path) -> None:
    """What is written to nearly all free memory of a GPU is read back."""
    if not here.is_cuda:
        return
    free, _ = torch.cuda.mem_get_info(here.torch_device)
    number = max(1, int(free * MEMORY_SHARE) // CHUNK_BYTES)
    generator = torch.Generator(here.torch_device).manual_seed(PATTERN_SEED)
    pattern = torch.randint(
        -(2**62), 2**62, (CHUNK_BYTES // 8,), generator=generator, device=here.torch_device
    )
    chunks = [pattern ^ index for index in range(number - 1)]
    for index, chunk in enumerate(chunks):
        chunk ^= index
        if not torch.equal(chunk, pattern):
            raise errors.DeviceFault(f"{here.name}: memory does not hold what was written to it")
