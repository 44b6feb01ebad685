"""What image-to-video tells the transformer of its image: latents with a mask, and CLIP's tokens.

A condition depends on the image, the size and the length alone. It is computed once, kept for
other prompts and seeds of the same image, and joined to the noisy latents in every step; it is
never noised itself.
"""

# B batch, C channels (RGB, latent, or of the condition: mask and latent), T frames, H W rows
# columns, S text tokens, I image tokens, G width of text or of image tokens

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from models import image_encoder, sampling, transformer, vae

NOT_CROPPED_BELOW = 0.01  # difference of height / width that is stretched instead


@dataclass(frozen=True, kw_only=True)
class Target:
    """The video that an image is to start.

    `crops`: the image is cropped to the video's aspect; otherwise it is stretched to its size.
    """

    width: int
    height: int
    num_frames: int
    crops: bool = False


@dataclass(frozen=True)
class Condition:
    """What images add to every step of their videos."""

    y_BCTHW: Tensor  # noqa: N815  # named by its axes, as everywhere
    """[B, 4 + 16, T, h, w], fp32: the mask, then the latents of the first frame, normalised."""
    image_tokens_BIG: Tensor | None  # noqa: N815
    """[B, 257, 1280], in the image encoder's dtype. None for Wan2.2, which has no such encoder."""

    def __getitem__(self, rows: Tensor) -> "Condition":
        """Of some of the images. `rows`: int64 [B]."""
        tokens_BIG = self.image_tokens_BIG
        return Condition(self.y_BCTHW[rows], None if tokens_BIG is None else tokens_BIG[rows])

    def joined(self, latents_BCTHW: Tensor) -> Tensor:
        """What the transformer takes: the noisy latents come first."""
        return torch.cat([latents_BCTHW, self.y_BCTHW.to(latents_BCTHW.dtype)], dim=1)

    @property
    def nbytes(self) -> int:
        """As of a tensor."""
        tokens_BIG = self.image_tokens_BIG
        return self.y_BCTHW.nbytes + (0 if tokens_BIG is None else tokens_BIG.nbytes)


def encode(
    image_HWC: Tensor,
    target: Target,
    *,
    clip: image_encoder.ImageEncoder | None,
    autoencoder: vae.WanVAE,
) -> Condition:
    """Show both networks an RGB image of any size (uint8, on the CPU).

    CLIP sees the image as it came, not as resized for the video; where it is cropped, both see the
    crop. Raises ValueError for another kind of tensor and for sizes that have no latents.
    """
    image_BCHW = to_signed(image_HWC)
    if target.crops:
        image_BCHW = crop_to_fill(image_BCHW, target)
    # Resized on the CPU, so that every device encodes the same frame.
    frame_BCHW = first_frame(image_BCHW, target).to(autoencoder.conv1.weight.device)
    latents_BCTHW = autoencoder.encode(pad_in_time(frame_BCHW, target.num_frames), still_from=1)
    mask_BCTHW = first_frame_mask(latents_BCTHW, channels=autoencoder.config.temporal_stride)
    return Condition(
        y_BCTHW=torch.cat([mask_BCTHW, latents_BCTHW], dim=1),
        image_tokens_BIG=None if clip is None else clip.encode(image_BCHW),
    )


def velocity(
    network: transformer.WanTransformer, context_BSG: Tensor, condition: Condition
) -> sampling.VelocityFn:
    """What `sampling.denoise` asks at each step.

    The condition is brought to the context's device here, once.
    """
    tokens_BIG = condition.image_tokens_BIG
    if tokens_BIG is not None:
        tokens_BIG = tokens_BIG.to(context_BSG.device)
    here = Condition(condition.y_BCTHW.to(context_BSG.device), tokens_BIG)

    def of(latents_BCTHW: Tensor, timestep_B: Tensor) -> Tensor:
        joined_BCTHW = here.joined(latents_BCTHW)
        predicted: Tensor = network(joined_BCTHW, timestep_B, context_BSG, here.image_tokens_BIG)
        return predicted

    return of


def to_signed(image_HWC: Tensor) -> Tensor:
    """0..255 -> [-1, 1] in fp32, [1, 3, H, W]."""
    is_image = image_HWC.ndim == 3 and image_HWC.shape[-1] == 3 and image_HWC.numel() > 0
    if not is_image or image_HWC.dtype != torch.uint8:
        given = f"{image_HWC.dtype} {list(image_HWC.shape)}"
        raise ValueError(f"an image must be uint8 [H, W, 3], got {given}")
    return (image_HWC.permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5


def crop_to_fill(image_BCHW: Tensor, target: Target) -> Tensor:
    """The middle of the image at exactly this size; antialiased, as LightX2V's server has it."""
    rows, columns = middle(*image_BCHW.shape[2:], aspect=target.height / target.width)
    return functional.interpolate(
        image_BCHW[:, :, rows, columns],
        size=(target.height, target.width),
        mode="bicubic",
        align_corners=False,
        antialias=True,
    )


def middle(height: int, width: int, *, aspect: float) -> tuple[slice, slice]:
    """Rows and columns of an image that have this height / width; all where it nearly has it."""
    rows, columns = height, width
    if abs(height / width - aspect) >= NOT_CROPPED_BELOW:
        if height / width > aspect:
            rows = max(1, int(aspect * width))
        else:
            columns = max(1, int(height / aspect))
    top, left = (height - rows) // 2, (width - columns) // 2
    return slice(top, top + rows), slice(left, left + columns)


def first_frame(image_BCHW: Tensor, target: Target) -> Tensor:
    """The image stretched to the video's size: bicubic, not antialiased, not clamped."""
    size = (target.height, target.width)
    return functional.interpolate(image_BCHW, size=size, mode="bicubic", align_corners=False)


def pad_in_time(frame_BCHW: Tensor, num_frames: int) -> Tensor:
    """[B, 3, num_frames, H, W]: the frame, then zeros, which are mid grey and not black."""
    return functional.pad(frame_BCHW.unsqueeze(2), (0, 0, 0, 0, 0, num_frames - 1))


def first_frame_mask(latents_BCTHW: Tensor, *, channels: int) -> Tensor:
    """One where a frame is given: all of the first latent frame, whose `channels` frames are one.

    Channel c of latent frame t tells of frame 4t - 3 + c; for t = 0 all four tell of frame 0.
    """
    batch, _, *grid = latents_BCTHW.shape
    mask_BCTHW = latents_BCTHW.new_zeros(batch, channels, *grid)
    mask_BCTHW[:, :, 0] = 1
    return mask_BCTHW
