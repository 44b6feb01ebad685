"""How large the video of an image becomes: pure arithmetic, no torch.

Two rules are in use for Wan2.1 image-to-video, and they give different sizes for one image:

    keep_area   the image's own aspect at about the preset's area; the image is stretched the last
                few pixels. Official Wan, and LightX2V's command line.
    adaptive    the nearest of three aspects (landscape, square, portrait) at one of three
                resolutions; the image is cropped to that aspect. LightX2V's server.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

PIXELS_PER_TOKEN = 16  # the autoencoder's 8 pixels times the transformer's patch of 2

Resolution = Literal["480p", "540p", "720p"]
SizeRule = Literal["keep_area", "adaptive"]

NOT_CROPPED_BELOW = 0.01  # difference of height / width that is stretched instead


@dataclass(frozen=True)
class Size:
    width: int
    height: int

    @property
    def area(self) -> int:
        return self.width * self.height


@dataclass(frozen=True)
class Box:
    """Pixels [left, right) x [top, bottom) of an image."""

    left: int
    top: int
    right: int
    bottom: int


# Height / width -> sizes; the first wins a tie, so the order is part of the rule.
BUCKETS: dict[float, dict[Resolution, Size]] = {
    0.667: {"480p": Size(832, 480), "540p": Size(960, 544), "720p": Size(1280, 720)},
    1.5: {"480p": Size(480, 832), "540p": Size(544, 960), "720p": Size(720, 1280)},
    1.0: {"480p": Size(480, 480), "540p": Size(576, 576), "720p": Size(960, 960)},
}


def for_image(rule: SizeRule, image: Size, *, target_area: int) -> Size:
    """The video's size for an image under a rule; `target_area` is the preset's width * height.

    Raises ValueError for an unknown rule and for an image too narrow to show at that area.
    """
    if rule not in _RULES:
        raise ValueError(f"size rule must be one of {', '.join(_RULES)}, got {rule!r}")
    if min(image.width, image.height) < 1:
        raise ValueError(f"an image needs at least one pixel, got {image.width}x{image.height}")
    return _RULES[rule](image, target_area)


def keep_area(image: Size, target_area: int) -> Size:
    """The image's aspect at no more than the target area, down to multiples of 16.

    In whole numbers: official Wan's floating point loses a row of tokens where the size comes out
    even, and makes 832x464 of an image that is 832x480 already.
    """
    height = _whole_tokens(target_area * image.height, image.width)
    width = _whole_tokens(target_area * image.width, image.height)
    if min(width, height) < PIXELS_PER_TOKEN:
        given = f"{image.width}x{image.height}"
        raise ValueError(f"an image of {given} is too narrow for a video of {target_area} pixels")
    return Size(width, height)


def adaptive(image: Size, resolution: Resolution) -> Size:
    """The bucket nearest in height / width."""
    aspect = image.height / image.width
    return BUCKETS[min(BUCKETS, key=lambda bucket: abs(bucket - aspect))][resolution]


def resolution_of(target_area: int) -> Resolution:
    """The resolution whose landscape size is nearest in area: 480 * 832 -> "480p"."""
    landscape = BUCKETS[0.667]
    return min(landscape, key=lambda name: abs(landscape[name].area - target_area))


def crop(image: Size, shape: Size) -> Box:
    """The middle of an image that has a shape's aspect; all of it where it nearly has it anyway."""
    wanted, aspect = shape.height / shape.width, image.height / image.width
    width, height = image.width, image.height
    if abs(aspect - wanted) >= NOT_CROPPED_BELOW:
        if aspect > wanted:
            height = max(1, int(wanted * width))
        else:
            width = max(1, int(height / wanted))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return Box(left=left, top=top, right=left + width, bottom=top + height)


def _adaptive_by_area(image: Size, target_area: int) -> Size:
    return adaptive(image, resolution_of(target_area))


_RULES: dict[SizeRule, Callable[[Size, int], Size]] = {
    "keep_area": keep_area,
    "adaptive": _adaptive_by_area,
}
SIZE_RULES: tuple[SizeRule, ...] = tuple(_RULES)


def _whole_tokens(numerator: int, denominator: int) -> int:
    """sqrt(numerator / denominator), down to a multiple of 16."""
    return math.isqrt(numerator // (denominator * PIXELS_PER_TOKEN**2)) * PIXELS_PER_TOKEN
