"""RenderSpec -> frames, in pure order: text, noise, steps, decoding. No database, no broker."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from jobs import looks
from models import sampling
from worker import errors, resident, stopwatch
from worker.device import Device

# B batch (1), C channels, T frames, H height, W width

Reached = Callable[[str, int, int], None]
"""(stage, step, steps): called between steps; what it raises ends the render."""


@torch.inference_mode()
def make_latents(
    spec: looks.RenderSpec,
    model: resident.ResidentModel,
    *,
    device: Device,
    timings: stopwatch.Timings,
    reached: Reached,
    image: Callable[[], Tensor] | None = None,
) -> Tensor:
    """Encode prompt and image and denoise: clean latents_BCTHW in fp32.

    `image` gives image_HWC when the text is encoded: it may be on its way until then. Not called
    where the model knows its condition.
    """
    look = spec.look
    try:
        levels = sampling.noise_levels(look.denoising_step_list, look.sample_shift)
        shape = model.networks.vae.config.latent_shape(
            num_frames=look.num_frames, height=look.height, width=look.width
        )
    except ValueError as error:
        raise errors.SpecUnusable(str(error)) from error
    reached("text", 0, 1)
    with ThreadPoolExecutor(1, thread_name_prefix="noise") as beside:
        # On the host while the device encodes; later the device would wait for it.
        drawn = beside.submit(sampling.initial_noise, spec.seed, shape, "cpu")
        with timings.stage("text"):
            context_1SD = model.encode_text(spec.prompt)
    noise_BCTHW, generator = drawn.result()
    condition = None
    if spec.image_key is not None:
        reached("image", 0, 1)
        image_HWC = None
        if image is not None and not model.knows_image(spec.image_key, look):
            with timings.stage("load"):
                image_HWC = image()
        with timings.stage("image"):
            condition = model.condition(spec.image_key, image_HWC, look)

    def on_step(step: int, steps: int) -> None:
        device.synchronize()  # else the steps would be queued long before they are computed
        reached("denoise", step, steps)
        denoiser.select(step)

    with timings.stage("denoise"), model.denoiser(context_1SD, condition, look) as denoiser:
        latents_BCTHW = sampling.denoise(
            denoiser,
            noise_BCTHW.to(device.torch_device),
            levels,
            step_rule=look.step_rule,
            generator=generator,
            on_step=on_step,
        )
    if not latents_BCTHW.isfinite().all():
        raise errors.NotFinite(f"NaN or infinity in the latents, with weights in {device.dtype}")
    return latents_BCTHW


def decode(
    latents_BCTHW: Tensor,
    model: resident.ResidentModel,
    *,
    timings: stopwatch.Timings,
    reached: Reached,
) -> Iterator[Tensor]:
    """Chunks of frames_THWC, uint8 RGB on the CPU, as they are decoded.

    A GPU works on the next chunk while one is taken: of its time, the stage has what the host
    launches and waits for.
    """
    steps = latents_BCTHW.shape[2]
    chunks = model.decode_chunks(
        latents_BCTHW, on_tile=lambda _tile, _tiles: reached("decode", 0, steps)
    )
    before: FramesUnderWay | None = None
    try:
        for step in range(steps):
            reached("decode", step, steps)
            with timings.stage("decode", waits=False), torch.inference_mode():
                newest = FramesUnderWay(next(chunks))
                # A GPU is asked for a chunk before it is waited for with the one before: else
                # it would stand idle while the next one's kernels are launched.
                due, before = (before, newest) if newest.is_behind else (newest, None)
                frames_THWC = None if due is None else due.arrived()
            if frames_THWC is not None:
                yield frames_THWC
        if before is not None:
            with timings.stage("decode", waits=False):
                frames_THWC = before.arrived()
            yield frames_THWC
    finally:
        if before is not None:
            before.wait()  # also where nobody wants them: a fault of theirs is of this job


class FramesUnderWay:
    """Frames [-1, 1] that the device has been asked for: as uint8, on their way to the host."""

    def __init__(self, frames_BCTHW: Tensor) -> None:
        self._dtype = str(frames_BCTHW.dtype).removeprefix("torch.")
        self._is_finite = frames_BCTHW.isfinite().all().to("cpu", non_blocking=True)
        self._frames_THWC = _uint8(frames_BCTHW).to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if frames_BCTHW.is_cuda:
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch's own
            self._event.record()

    @property
    def is_behind(self) -> bool:
        """The device works on them while the host goes on."""
        return self._event is not None

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()

    def arrived(self) -> Tensor:
        """frames_THWC, when they are there. NotFinite: there is no picture."""
        self.wait()
        if not self._is_finite:
            raise errors.NotFinite(f"NaN in the frames, decoded in {self._dtype}")
        # A copy: those that wait for ffmpeg would hold pinned memory, which is dear.
        return self._frames_THWC.clone() if self.is_behind else self._frames_THWC


def to_uint8(frames_BCTHW: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded to the nearest: frames_THWC on the CPU."""
    return _uint8(frames_BCTHW).cpu()


def _uint8(frames_BCTHW: Tensor) -> Tensor:
    scaled = (frames_BCTHW.float() + 1).mul_(127.5).round_().clamp_(0, 255)
    return scaled.to(torch.uint8)[0].permute(1, 2, 3, 0).contiguous()


def latents_sha256(latents_BCTHW: Tensor) -> str:
    """Of the fp32 bytes, C order: equal for a seed on the same kind of machine."""
    return hashlib.sha256(latents_BCTHW.float().cpu().contiguous().numpy().tobytes()).hexdigest()
