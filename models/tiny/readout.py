"""What a clip of the tiny world shows, read from its pixels by rules.

Shapes are coloured and everything else is grey, so a shape is where a pixel has chroma. A clip is
`consistent` when every frame shows one whole shape of one colour and about one size: a shape that
splits, smears, jumps or vanishes is not.
"""

# B batch, C RGB, T frames, H W rows columns, F = B * T frames as a batch

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import einops
import torch
from torch import Tensor
from torch.nn import functional

from models.tiny import world

CHROMA = 0.36  # largest minus smallest of R, G, B; the weakest colour has 0.64
WHOLE = 0.9  # share of the coloured pixels that must hang together
AREA_RANGE = (0.6, 1.6)  # of the clip's median area, for each frame
HIDDEN_AREA = 0.3  # of it, while a pillar may stand before the shape
JUMP = 3.0  # pixels that a centre may move from frame to frame beside the mean movement
STILL_BELOW = 0.2  # pixels per frame
FAST_ABOVE = 0.95  # pixels per frame, between both speeds
SMALLEST_AREA = 30  # pixels
FLOOD_STEPS = 6  # pixels between two looks at whether a flood still spreads

FACTORS = ("colour", "shape", "direction", "background", "speed", "depth")


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What one clip shows. None where nothing is to be seen of it."""

    colour: str | None
    shape: str | None
    direction: str | None
    background: str
    speed: str | None
    depth: str | None
    consistent: bool
    pixels_per_frame: float

    def agrees(self, scene: world.Scene) -> dict[str, bool]:
        """For each factor whether it is as the scene has it, and whether the clip holds together.

        Speed is compared where the scene names one.
        """
        same = {name: getattr(self, name) == getattr(scene, name) for name in FACTORS}
        if scene.speed is None:
            same["speed"] = True
        return same | {"consistent": self.consistent}


def accuracy(readings: Sequence[Reading], scenes: Sequence[world.Scene]) -> Mapping[str, float]:
    """Share of the clips in which each factor is right, and `all`: everything at once."""
    agreed = [reading.agrees(scene) for reading, scene in zip(readings, scenes, strict=True)]
    shares = {name: sum(each[name] for each in agreed) / len(agreed) for name in agreed[0]}
    return shares | {"all": sum(all(each.values()) for each in agreed) / len(agreed)}


def read(clips_BCTHW: Tensor) -> list[Reading]:
    """Read clips in [-1, 1]."""
    return [_read_one(clip.float().clamp(-1, 1) * 0.5 + 0.5) for clip in clips_BCTHW]


def _read_one(clip_CTHW: Tensor) -> Reading:
    frames_FCHW = clip_CTHW.transpose(0, 1)
    mask_FHW = (frames_FCHW.amax(1) - frames_FCHW.amin(1)) > CHROMA
    has_pillar = _has_pillar(frames_FCHW)
    background = _background(frames_FCHW)
    areas_F = mask_FHW.sum((1, 2)).float()
    if areas_F.min() < SMALLEST_AREA:
        return Reading(
            colour=None, shape=None, direction=None, background=background, speed=None,
            depth=None, consistent=False, pixels_per_frame=0.0,
        )  # fmt: skip
    centres_F2 = _centres(mask_FHW)
    movement, direction = _movement(centres_F2)
    depth = _depth(mask_FHW, centres_F2) if has_pillar else None
    colours_F = _colours(frames_FCHW, mask_FHW)
    clear_FHW = mask_FHW[_is_free(centres_F2, mask_FHW.shape[-1])] if has_pillar else mask_FHW
    return Reading(
        colour=list(world.COLOURS)[int(colours_F.mode().values)],
        shape=_shape(clear_FHW if len(clear_FHW) else mask_FHW),
        direction=direction,
        background=background,
        speed=None if direction == world.STILL else _speed(movement),
        depth=depth,
        consistent=_is_consistent(mask_FHW, areas_F, centres_F2, colours_F, depth),
        pixels_per_frame=movement,
    )


def _background(frames_FCHW: Tensor) -> str:
    grey = frames_FCHW.mean(1)
    border = torch.cat([grey[:, :2].flatten(), grey[:, -2:].flatten(), grey[..., :2].flatten()])
    level = float(border.median())
    return min(world.BACKGROUNDS, key=lambda name: abs(world.BACKGROUNDS[name] - level))


def _has_pillar(frames_FCHW: Tensor) -> bool:
    """Grey in the middle of the top and bottom rows, halfway between both backgrounds."""
    middle = frames_FCHW.shape[-1] // 2
    columns = frames_FCHW[..., middle - 1 : middle + 1]
    ends = torch.cat([columns[..., :3, :], columns[..., -3:, :]], dim=-2)
    return abs(float(ends.median()) - world.PILLAR_LEVEL) < 0.2


def _centres(mask_FHW: Tensor) -> Tensor:
    """(x, y) of the middle of each frame's bounding box, in pixels: hidden parts move it less."""
    columns, rows = mask_FHW.any(1), mask_FHW.any(2)
    return torch.stack([_middle(columns), _middle(rows)], dim=1)


def _middle(occupied_FN: Tensor) -> Tensor:
    first, last = _ends(occupied_FN)
    return (first + last + 1).float() / 2


def _ends(occupied_FN: Tensor) -> tuple[Tensor, Tensor]:
    length = occupied_FN.shape[1]
    first = occupied_FN.int().argmax(1)
    last = length - 1 - occupied_FN.flip(1).int().argmax(1)
    return first, last


def _movement(centres_F2: Tensor) -> tuple[float, str]:
    """Pixels per frame, and the direction it is nearest to."""
    span = max(1, len(centres_F2) // 6)  # ends are means over a few frames
    travel = centres_F2[-span:].mean(0) - centres_F2[:span].mean(0)
    x, y = (travel / (len(centres_F2) - span)).tolist()
    if max(abs(x), abs(y)) < STILL_BELOW:
        return max(abs(x), abs(y)), world.STILL
    if abs(x) >= abs(y):
        return abs(x), "right" if x > 0 else "left"
    return abs(y), "down" if y > 0 else "up"


def _speed(pixels_per_frame: float) -> str:
    return "quickly" if pixels_per_frame > FAST_ABOVE else "slowly"


def _colours(frames_FCHW: Tensor, mask_FHW: Tensor) -> Tensor:
    """Index of the nearest colour to the mean of each frame's shape."""
    weights = mask_FHW.unsqueeze(1).float()
    mean_FC = (frames_FCHW * weights).sum((2, 3)) / weights.sum((2, 3))
    known_NC = torch.tensor(list(world.COLOURS.values()))
    return torch.cdist(mean_FC, known_NC).argmin(1)


def _shape(mask_FHW: Tensor) -> str:
    """By majority over the frames."""
    return max(votes := [_shape_of(mask) for mask in mask_FHW], key=votes.count)


def _shape_of(mask_HW: Tensor) -> str:
    (left,), (right,) = _ends(mask_HW.any(0)[None])
    (top,), (bottom,) = _ends(mask_HW.any(1)[None])
    box = mask_HW[top : bottom + 1, left : right + 1].float()
    height, width = box.shape
    if width > 1.7 * height:
        return "bar"
    core = box[height * 2 // 5 : height - height * 2 // 5, width * 2 // 5 : width - width * 2 // 5]
    if core.mean() < 0.5:
        return "ring"
    upper, lower = box[: height // 3].mean(), box[height - height // 3 :].mean()
    return "triangle" if upper < 0.62 * lower else "circle"


def _pillar_columns(width: int) -> slice:
    half = int(world.PILLAR_HALF_WIDTH)
    return slice(width // 2 - half, width // 2 + half)


def _is_free(centres_F2: Tensor, width: int) -> Tensor:
    """Frames in which the shape is clear of the pillar."""
    reach = world.RADII[1] + world.PILLAR_HALF_WIDTH
    return (centres_F2[:, 0] - width / 2).abs() > reach


def _depth(mask_FHW: Tensor, centres_F2: Tensor) -> str:
    """In front if the shape's colour covers the pillar's columns while it passes."""
    width = mask_FHW.shape[-1]
    passing = (centres_F2[:, 0] - width / 2).abs() < world.RADII[0] / 2
    seen = mask_FHW[passing][:, :, _pillar_columns(width)]
    return "in front of" if seen.any(1).float().mean() > 0.5 else "behind"


def _is_consistent(
    mask_FHW: Tensor, areas_F: Tensor, centres_F2: Tensor, colours_F: Tensor, depth: str | None
) -> bool:
    ratios = areas_F / areas_F.median()
    least = HIDDEN_AREA if depth == "behind" else AREA_RANGE[0]
    steps_F2 = centres_F2.diff(dim=0)
    jumps = (steps_F2 - steps_F2.mean(0)).abs().max()
    allowed = JUMP + (world.PILLAR_HALF_WIDTH * 2 if depth == "behind" else 0.0)
    return (
        bool((colours_F == colours_F[0]).all())
        and float(ratios.min()) > least
        and float(ratios.max()) < AREA_RANGE[1]
        and float(jumps) < allowed
        and float(_whole_share(mask_FHW, depth).min()) > WHOLE
    )


def _whole_share(mask_FHW: Tensor, depth: str | None) -> Tensor:
    """Of each frame's coloured pixels the share that hangs together with the middle ones."""
    passable = mask_FHW.clone()
    if depth == "behind":
        passable[:, :, _pillar_columns(mask_FHW.shape[-1])] = True
    frames, rows, columns = mask_FHW.shape
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    places_HW2 = torch.stack([x, y], dim=-1) + 0.5
    to_centre = (places_HW2 - _centres(mask_FHW)[:, None, None]).square().sum(-1)
    start = to_centre.masked_fill(~mask_FHW, torch.inf).flatten(1).argmin(1)
    flooded = functional.one_hot(start, rows * columns).view(frames, rows, columns).float()
    while True:
        before = flooded
        for _ in range(FLOOD_STEPS):
            grown = functional.max_pool2d(flooded.unsqueeze(1), 3, stride=1, padding=1)[:, 0]
            flooded = grown * passable
        if torch.equal(flooded, before):
            break
    return (flooded * mask_FHW).sum((1, 2)) / mask_FHW.sum((1, 2))


def grid(clips_BCTHW: Tensor) -> Tensor:
    """A contact sheet [H, W, 3] in 0..255: a row per clip, every second frame, twice as large."""
    some = clips_BCTHW[:, :, ::2].float().clamp(-1, 1)
    padded = functional.pad(some, (1, 1, 1, 1), value=0.0)
    sheet = einops.rearrange(padded, "b c t h w -> (b h) (t w) c")
    levels = ((sheet + 1) * 127.5).round().to(torch.uint8)
    return levels.repeat_interleave(2, 0).repeat_interleave(2, 1)
