"""What image-to-video tells the transformer of its image: latents with a mask, and CLIP's tokens.

A condition depends on the image, the size and the length alone. It is computed once, kept for
other prompts and seeds of the same image, and joined to the noisy latents in every step; it is
never noised itself.
"""

# B batch, C channels (RGB, latent, or of the condition: mask and latent), T frames, H W rows
# columns, S text tokens, I image tokens, G width of text or of image tokens

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from models import image_encoder, sampling, sizes, transformer, vae

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, kw_only=True)
class Target:
    """The video that an image is to start; with `image_sha256` the key to keep a condition under.

    `crops`: the image is cropped to the video's aspect, as size rule "adaptive" asks for;
    otherwise it is stretched to the video's size, as "keep_area" does.
    """

    width: int
    height: int
    num_frames: int
    crops: bool = False


@dataclass(frozen=True)
class Condition:
    """What one image adds to every step of a video."""

    y_BCTHW: Tensor  # noqa: N815  # named by its axes, as everywhere
    """[1, 4 + 16, T, h, w], fp32: the mask, then the latents of the first frame, normalised."""
    image_tokens_BIG: Tensor | None  # noqa: N815
    """[1, 257, 1280], in the image encoder's dtype. None for Wan2.2, which has no such encoder."""


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
        image_BCHW = crop_to_fill(image_BCHW, sizes.Size(target.width, target.height))
    # Resized on the CPU, so that every device encodes the same frame.
    frame_BCHW = first_frame(image_BCHW, target).to(autoencoder.conv1.weight.device)
    latents_BCTHW = autoencoder.encode(pad_in_time(frame_BCHW, target.num_frames))
    mask_BCTHW = first_frame_mask(latents_BCTHW, channels=autoencoder.config.temporal_stride)
    return Condition(
        y_BCTHW=torch.cat([mask_BCTHW, latents_BCTHW], dim=1),
        image_tokens_BIG=None if clip is None else clip.encode(image_BCHW),
    )


def velocity(
    network: transformer.WanTransformer, context_BSG: Tensor, condition: Condition
) -> sampling.VelocityFn:
    """What `sampling.denoise` asks at each step: the noisy latents come first, then mask and image.

    The condition is brought to the context's device here, once.
    """
    y_BCTHW = condition.y_BCTHW.to(context_BSG.device)
    tokens_BIG = condition.image_tokens_BIG
    if tokens_BIG is not None:
        tokens_BIG = tokens_BIG.to(context_BSG.device)

    def of(latents_BCTHW: Tensor, timestep_B: Tensor) -> Tensor:
        joined_BCTHW = torch.cat([latents_BCTHW, y_BCTHW.to(latents_BCTHW.dtype)], dim=1)
        predicted: Tensor = network(joined_BCTHW, timestep_B, context_BSG, tokens_BIG)
        return predicted

    return of


def from_pil(image: "Image.Image") -> Tensor:
    """RGB levels [H, W, 3] as uint8, turned upright as EXIF says.

    Any mode of 8 or 16 bits will do. Transparency is dropped and colour profiles are not applied,
    as in official Wan. Raises ValueError for a damaged file and for floating-point levels.
    """
    from PIL import Image  # only here: who has tensors needs no Pillow

    try:
        image.load()
    except OSError as error:
        raise ValueError(f"the image is damaged: {error}") from error
    upright = _upright(image)
    if upright.mode == "F":
        raise ValueError("an image of floating-point levels has no known range; use 8 or 16 bits")
    if upright.mode.startswith("I"):  # 16 bits of grey, which Pillow would cut off at 255
        levels = np.asarray(upright).astype(np.float64).clip(0, 65535) / 257
        upright = Image.fromarray(levels.round().astype(np.uint8))
    return torch.from_numpy(np.array(upright.convert("RGB")))


def _upright(image: "Image.Image") -> "Image.Image":
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except SyntaxError:  # Pillow's word for an EXIF block that is none; viewers show these as is
        return image


def image_sha256(image_HWC: Tensor) -> str:
    """Of the levels and the shape: equal for one picture in two files."""
    digest = hashlib.sha256(repr(tuple(image_HWC.shape)).encode())
    digest.update(image_HWC.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_signed(image_HWC: Tensor) -> Tensor:
    """0..255 -> [-1, 1] in fp32, [1, 3, H, W]."""
    is_image = image_HWC.ndim == 3 and image_HWC.shape[-1] == 3 and image_HWC.numel() > 0
    if not is_image or image_HWC.dtype != torch.uint8:
        given = f"{image_HWC.dtype} {list(image_HWC.shape)}"
        raise ValueError(f"an image must be uint8 [H, W, 3], got {given}")
    return (image_HWC.permute(2, 0, 1)[None].float() / 255 - 0.5) / 0.5


def crop_to_fill(image_BCHW: Tensor, size: sizes.Size) -> Tensor:
    """The middle of the image at exactly this size; antialiased, as LightX2V's server has it."""
    rows, columns = image_BCHW.shape[2:]
    box = sizes.crop(sizes.Size(columns, rows), size)
    return functional.interpolate(
        image_BCHW[:, :, box.top : box.bottom, box.left : box.right],
        size=(size.height, size.width),
        mode="bicubic",
        align_corners=False,
        antialias=True,
    )


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
