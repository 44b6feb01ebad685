"""The tiny world: clips of one coloured shape that moves, drawn from a few factors, with prompts.

Everything in a clip is one of a few choices, so a prompt says it in words and `readout` can tell
from the pixels whether a network drew it. Shapes differ by topology and aspect, not by corners: at
this size an autoencoder rounds a square to a circle.
"""

# B batch, C RGB, T frames, H W rows columns, N prompts

import itertools
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 48  # pixels, rows and columns
NUM_FRAMES = 17

COLOURS = {
    "red": (0.92, 0.08, 0.08),
    "green": (0.08, 0.72, 0.12),
    "blue": (0.12, 0.18, 0.95),
    "yellow": (0.96, 0.86, 0.06),
    "purple": (0.80, 0.10, 0.82),
    "cyan": (0.06, 0.80, 0.86),
}
SHAPES = ("circle", "ring", "triangle", "bar")
STILL = "still"
DIRECTIONS = {
    "right": (1.0, 0.0),
    "left": (-1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    STILL: (0.0, 0.0),
}
"""(x, y), y downwards as rows are counted"""
SPEEDS = {"slowly": 0.5, "quickly": 1.4}  # pixels per frame
PASSING_SPEED = 1.7  # pixels per frame, so that a shape comes out on the other side of the pillar
BACKGROUNDS = {"dark": 0.08, "light": 0.92}  # grey levels
DEPTHS = ("in front of", "behind")
PILLAR_LEVEL = 0.5
PILLAR_HALF_WIDTH = 3.0  # pixels; it stands in the middle and is as high as the picture
RADII = (7.5, 9.0)  # pixels, of the circle around a shape, about

PASSING_DIRECTIONS = ("right", "left")
HELD_BACK_EACH = 5  # every fifth combination of shape, colour and direction is not trained on


@dataclass(frozen=True, kw_only=True)
class Scene:
    """The factors of a clip. `speed` goes with movement; `depth` is None without a pillar."""

    colour: str
    shape: str
    direction: str
    background: str
    speed: str | None
    depth: str | None = None

    @property
    def pixels_per_frame(self) -> float:
        if self.depth is not None:
            return PASSING_SPEED
        return 0.0 if self.speed is None else SPEEDS[self.speed]

    @property
    def is_held_back(self) -> bool:
        """A diagonal: every pair of shape, colour and direction is trained on, not every triple."""
        place = SHAPES.index(self.shape) + list(COLOURS).index(self.colour)
        return (place + list(DIRECTIONS).index(self.direction)) % HELD_BACK_EACH == 0


def scenes() -> tuple[Scene, ...]:
    """Every scene there is, single shapes first."""
    singles = [
        Scene(colour=colour, shape=shape, direction=direction, background=background, speed=speed)
        for colour, shape, direction, background in itertools.product(
            COLOURS, SHAPES, DIRECTIONS, BACKGROUNDS
        )
        for speed in ((None,) if direction == STILL else SPEEDS)
    ]
    passing = [
        Scene(
            colour=colour,
            shape=shape,
            direction=direction,
            background=background,
            speed=None,
            depth=depth,
        )
        for colour, shape, direction, background, depth in itertools.product(
            COLOURS, SHAPES, PASSING_DIRECTIONS, BACKGROUNDS, DEPTHS
        )
    ]
    return (*singles, *passing)


def prompt(scene: Scene) -> str:
    """All of a scene in words, e.g. "a red circle moves quickly right on a dark background"."""
    return _words(scene, says_speed=True, says_background=True, is_long=False)


def prompts(scene: Scene) -> tuple[str, ...]:
    """Every way to say a scene: what is left out may be either way."""
    ways = itertools.product((True, False), (True, False), (False, True))
    return tuple(
        dict.fromkeys(
            _words(scene, says_speed=speed, says_background=background, is_long=is_long)
            for speed, background, is_long in ways
        )
    )


def _words(scene: Scene, *, says_speed: bool, says_background: bool, is_long: bool) -> str:
    words = [f"a {scene.colour} {scene.shape}"]
    if scene.direction == STILL:
        words.append("stands still")
    else:
        words.append("moves")
        if says_speed and scene.speed is not None:
            words.append(scene.speed)
        is_sideways = scene.direction in PASSING_DIRECTIONS
        words.append(f"to the {scene.direction}" if is_long and is_sideways else scene.direction)
    if scene.depth is not None:
        words.append(f"{scene.depth} a grey pillar")
    if says_background:
        words.append(f"on a {scene.background} background")
    return " ".join(words)


def vocabulary() -> tuple[str, ...]:
    """Every word of every prompt, in alphabetical order."""
    texts = itertools.chain.from_iterable(prompts(scene) for scene in scenes())
    return tuple(sorted(set(itertools.chain.from_iterable(text.split() for text in texts))))


def with_unknown_words(text: str, dice: random.Random, unknown: str) -> str:
    """The prompt with one or two words that the vocabulary lacks, so that they do no harm."""
    words = text.split()
    for _ in range(dice.randint(1, 2)):
        words.insert(dice.randint(0, len(words)), unknown)
    return " ".join(words)


def draw(some: Sequence[Scene], dice: random.Random, *, frames: slice = slice(None)) -> Tensor:
    """Clips of these scenes from random places: [B, 3, T, H, W] in [-1, 1], anti-aliased.

    `frames`: only these of NUM_FRAMES.
    """
    return torch.stack([_draw_one(scene, dice, frames) for scene in some])


def _draw_one(scene: Scene, dice: random.Random, some: slice) -> Tensor:
    radius = dice.uniform(*RADII)
    x_T, y_T = (centres[some] for centres in _path(scene, dice, radius))
    num_frames = len(x_T)
    pixels = torch.arange(SIZE, dtype=torch.float32) + 0.5
    x_THW = pixels[None, None, :] - x_T[:, None, None]
    y_THW = pixels[None, :, None] - y_T[:, None, None]
    shape_THW = _coverage(_distance(scene.shape, x_THW, y_THW, radius)).expand(
        num_frames, SIZE, SIZE
    )
    colour = torch.tensor(COLOURS[scene.colour]).view(3, 1, 1, 1)
    frames = torch.full((3, num_frames, SIZE, SIZE), BACKGROUNDS[scene.background])
    pillar_W = _coverage((pixels - SIZE / 2).abs() - PILLAR_HALF_WIDTH)
    if scene.depth == "behind":
        frames = frames.lerp(colour.expand_as(frames), shape_THW)
    if scene.depth is not None:
        frames = frames.lerp(torch.tensor(PILLAR_LEVEL).expand_as(frames), pillar_W)
    if scene.depth != "behind":
        frames = frames.lerp(colour.expand_as(frames), shape_THW)
    return frames * 2 - 1


def _path(scene: Scene, dice: random.Random, radius: float) -> tuple[Tensor, Tensor]:
    """Centres that stay inside the picture from the first to the last frame."""
    margin = radius + 1
    way = torch.arange(NUM_FRAMES, dtype=torch.float32) * scene.pixels_per_frame
    centres = []
    for step in DIRECTIONS[scene.direction]:
        travel = step * float(way[-1])
        low, high = margin - min(travel, 0), SIZE - margin - max(travel, 0)
        if low > high:  # a pillar is passed from edge to edge, a little over both
            low = high = (low + high) / 2
        centres.append(dice.uniform(low, high) + step * way)
    return centres[0], centres[1]


def _distance(shape: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Signed distance to the outline in pixels, negative inside."""
    if shape == "circle":
        return torch.hypot(x, y) - radius
    if shape == "ring":
        return (torch.hypot(x, y) - 0.74 * radius).abs() - 0.27 * radius
    if shape == "bar":
        return torch.maximum(x.abs() - 1.1 * radius, y.abs() - 0.42 * radius)
    slope = math.pi / 6  # the triangle stands on its base
    sides = x.abs() * math.cos(slope) - (y - 0.25 * radius) * math.sin(slope)
    return torch.maximum(sides, y - 0.25 * radius) - 0.6 * radius


def _coverage(distance: Tensor) -> Tensor:
    """How much of a pixel is inside, from the distance of its centre to the outline."""
    return (0.5 - distance).clamp(0, 1)


def stream(dice: random.Random, some: Sequence[Scene], passing_share: float) -> Iterator[Scene]:
    """Endless scenes; the two kinds are mixed by `passing_share`, not by their numbers."""
    passing = [scene for scene in some if scene.depth is not None]
    single = [scene for scene in some if scene.depth is None]
    while True:
        yield dice.choice(passing if dice.random() < passing_share else single)


def trained(some: Iterable[Scene]) -> tuple[Scene, ...]:
    return tuple(scene for scene in some if not scene.is_held_back)


def held_back(some: Iterable[Scene]) -> tuple[Scene, ...]:
    return tuple(scene for scene in some if scene.is_held_back)
