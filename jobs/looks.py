"""A look: what decides a video beside prompt, seed and image. Every job carries one, frozen."""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, model_validator

DEFAULT_STEPS = (1000, 750, 500, 250)  # what the published 4-step models were distilled for
EXAMPLE_MODEL = "Wan2.1-T2V-14B"

SIDE_GRID = 16  # the VAE shrinks by 8, the transformer patches by 2
MIN_SIDE, MAX_SIDE = 16, 2048
FRAME_GRID = 4  # the VAE makes one latent frame of four, after the first
MAX_FRAMES = 481  # 30 s at 16 fps; the models were trained on 81
MAX_FPS = 120
MAX_NAME_BYTES = 255  # of a file or folder, on nearly every disk
MAX_PATH_BYTES = 1_000  # some systems take 1,024
MAX_STEPS = 50
MIN_SHIFT, MAX_SHIFT = 0.01, 100.0  # far below, fp32 makes noise levels above 1, or infinite
MAX_STRENGTH = 10.0
MAX_LORAS = 8
MAX_SEED = 2**63 - 1  # the widest signed integer of both databases

UNREADABLE = "this version of rushes cannot render what was stored"

LANDSCAPE: Mapping[str, tuple[int, int]] = {
    "480p": (832, 480),
    "540p": (960, 544),
    "720p": (1280, 720),
}
"""Width and height of a resolution."""
_SQUARE = {"480p": 480, "540p": 576, "720p": 960}

# Checks. Each returns the value or raises ValueError("must ..."); the caller puts the key in front.


def shown(value: object) -> str:
    """The value as a person wrote it, shortened, and safe to print."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except RecursionError:
        return "a deeply nested value"
    text = text if text.isprintable() else ascii(text)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _near_on_grid(value: int, *, grid: int, offset: int, low: int, high: int) -> str:
    """The one or two allowed numbers next to `value`, as a hint."""
    below = (value - offset) // grid * grid + offset
    near = {min(max(number, low), high) for number in (below, below + grid)}
    return " or ".join(str(number) for number in sorted(near)) + " would do"


def _check_whole(value: object, *, example: int) -> int:
    if type(value) is not int:
        raise ValueError(f"must be a whole number such as {example}, got {shown(value)}")
    return value


def _check_side(value: object) -> int:
    side = _check_whole(value, example=480)
    if side % SIDE_GRID or not MIN_SIDE <= side <= MAX_SIDE:
        hint = _near_on_grid(side, grid=SIDE_GRID, offset=0, low=MIN_SIDE, high=MAX_SIDE)
        raise ValueError(
            f"must be a multiple of {SIDE_GRID} from {MIN_SIDE} to {MAX_SIDE}, "
            f"got {shown(side)}: {hint}"
        )
    return side


def _check_num_frames(value: object) -> int:
    frames = _check_whole(value, example=81)
    if frames % FRAME_GRID != 1 or not 1 <= frames <= MAX_FRAMES:
        hint = _near_on_grid(frames, grid=FRAME_GRID, offset=1, low=1, high=MAX_FRAMES)
        raise ValueError(
            f"must be 4n+1 from 1 to {MAX_FRAMES}, such as 77 or 81, got {shown(frames)}: {hint}"
        )
    return frames


def _check_fps(value: object) -> int:
    fps = _check_whole(value, example=16)
    if not 1 <= fps <= MAX_FPS:
        nearest = min(max(fps, 1), MAX_FPS)
        raise ValueError(f"must be from 1 to {MAX_FPS}, got {shown(fps)}: {nearest} would do")
    return fps


def _check_steps(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(step) is int for step in value):
        raise ValueError(
            f"must be a list of whole numbers such as {list(DEFAULT_STEPS)}, got {shown(value)}"
        )
    if not 1 <= len(value) <= MAX_STEPS:
        raise ValueError(
            f"must have 1 to {MAX_STEPS} entries, got {len(value)}: {list(DEFAULT_STEPS)} would do"
        )
    good = sorted({min(max(step, 1), 1000) for step in value}, reverse=True)
    if list(value) != good:
        raise ValueError(
            "must be strictly decreasing numbers from 1 to 1000, "
            f"got {shown(value)}: {good} would do"
        )
    return tuple(value)


def _check_number(value: object, *, example: float) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"must be a number such as {example:g}, got {shown(value)}")
    assert isinstance(value, int | float)
    return value


def _check_shift(value: object) -> float:
    shift = _check_number(value, example=5)
    if not MIN_SHIFT <= shift <= MAX_SHIFT:  # NaN fails this too
        raise ValueError(
            f"must be from {MIN_SHIFT:g} to {MAX_SHIFT:g}, got {shown(value)}: 5 would do"
        )
    return float(shift)


def _check_strength(value: object) -> float:
    strength = _check_number(value, example=1)
    if not -MAX_STRENGTH <= strength <= MAX_STRENGTH:
        raise ValueError(
            f"must be from {-MAX_STRENGTH:g} to {MAX_STRENGTH:g}, got {shown(value)}: 1 would do"
        )
    return float(strength)


def _check_path(value: object, what: str, example: str) -> str:
    """A path in one spelling, so that "tiny" and "tiny/" are one look."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError(f'must name {what} such as "{example}", got {shown(value)}')
    path = PurePosixPath(value)
    if ".." in path.parts or not path.name or path.parts[0].startswith("~"):
        raise ValueError(
            f"must be below the models folder, or an absolute path, without '..' and '~', "
            f"got {shown(value)}"
        )
    longest = max(len(part.encode()) for part in path.parts)
    if longest > MAX_NAME_BYTES or len(str(path).encode()) > MAX_PATH_BYTES:
        raise ValueError(
            f"must be at most {MAX_PATH_BYTES} bytes, of which {MAX_NAME_BYTES} between slashes, "
            f"got {shown(value)}"
        )
    return str(path)


def _check_model_path(value: object) -> str:
    return _check_path(value, "a folder of weights", EXAMPLE_MODEL)


def _check_weights(value: object) -> str | None:
    if value is None:
        return None
    path = _check_path(value, "a file or folder of weights", f"{EXAMPLE_MODEL}/distill_models")
    if path.lower().endswith(".gguf"):
        raise ValueError(
            f"names a GGUF file, which is not supported: use the bf16, fp8 or int8 checkpoint; "
            f"got {shown(value)}"
        )
    return path


def _check_lora_path(value: object) -> str:
    return _check_path(value, "a LoRA file", "loras/film.safetensors")


def _check_boundary(value: object) -> int | None:
    return None if value is None else _check_whole(value, example=2)


def _check_one_of(*allowed: str | None) -> BeforeValidator:
    def check(value: object) -> object:
        if value not in allowed:
            names = " or ".join(shown(name) for name in allowed if name is not None)
            raise ValueError(f"must be {names}, got {shown(value)}")
        return value

    return BeforeValidator(check)


# What a job carries.

Expert = Literal["high_noise_model", "low_noise_model"]
EXPERTS: tuple[Expert, ...] = ("high_noise_model", "low_noise_model")

WeightsPath = Annotated[str | None, BeforeValidator(_check_weights)]


class LoraUse(BaseModel, frozen=True, extra="forbid"):
    """A LoRA file and how strongly it changes the weights."""

    path: Annotated[str, BeforeValidator(_check_lora_path)]
    """Below the worker's models folder, or absolute."""
    strength: Annotated[float, BeforeValidator(_check_strength)] = 1.0
    name: Annotated[Expert | None, _check_one_of(*EXPERTS, None)] = None
    """Which of Wan2.2's two networks; None: all of them."""


class Look(BaseModel, frozen=True, extra="forbid"):
    """Everything that decides the picture except prompt, seed and image; named by its content.

    The fields from `offload` on ask something of the machine: they are here because a job that
    fits a small GPU with them may not fit it without.
    """

    task: Annotated[Literal["t2v", "i2v"], _check_one_of("t2v", "i2v")]
    model_path: Annotated[str, BeforeValidator(_check_model_path)]
    """Folder of the weights: absolute, or below the worker's models folder."""
    denoising_step_list: Annotated[tuple[int, ...], BeforeValidator(_check_steps)]
    """Indices into the shifted noise levels; its length is the number of steps."""
    step_rule: Annotated[Literal["euler", "renoise"], _check_one_of("euler", "renoise")]
    sample_shift: Annotated[float, BeforeValidator(_check_shift)]
    width: Annotated[int, BeforeValidator(_check_side)]
    height: Annotated[int, BeforeValidator(_check_side)]
    num_frames: Annotated[int, BeforeValidator(_check_num_frames)]
    fps: Annotated[int, BeforeValidator(_check_fps)]
    size_rule: Annotated[
        Literal["fixed", "area", "bucket"], _check_one_of("fixed", "area", "bucket")
    ] = "fixed"
    """How an image becomes width x height: see `sized`."""
    transformer: WeightsPath = None
    """A complete checkpoint, file or folder, in place of the one that lies in the model folder."""
    base: Annotated[Literal["distilled", "original"], _check_one_of("distilled", "original")] = (
        "distilled"
    )
    """Which transformer of the model folder: "original" is what a distillation LoRA is made for."""
    quantization: Annotated[Literal["fp8", "int8"] | None, _check_one_of("fp8", "int8", None)] = (
        None
    )
    """What the preset says of its checkpoint; what the file says decides."""
    loras: tuple[LoraUse, ...] = ()
    """In the order in which they are applied."""
    boundary_step_index: Annotated[int | None, BeforeValidator(_check_boundary)] = None
    """Wan2.2: the first step of the low-noise network. None: there is one network."""
    high_noise_transformer: WeightsPath = None
    low_noise_transformer: WeightsPath = None
    offload: Annotated[
        Literal["none", "model", "block"], _check_one_of("none", "model", "block")
    ] = "none"
    """What of the transformer waits in main memory until its turn: nothing, all, or its blocks."""
    vae_tiling: bool = False
    vae_dtype: Annotated[Literal["bf16", "fp32"] | None, _check_one_of("bf16", "fp32", None)] = None
    """What frames are decoded in. None: what the worker computes in, bf16 on a GPU."""
    text_encoder_on_cpu: bool = False
    """Waits in main memory while it is not needed; the next two likewise."""
    image_encoder_on_cpu: bool = False
    vae_on_cpu: bool = False
    unload_encoders: bool = False
    """The text encoder never comes to the device: prompts are encoded on the processor."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        problems = [*self._task_problems(), *self._network_problems(), *self._lora_problems()]
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _task_problems(self) -> Iterator[str]:
        if self.task == "t2v" and self.size_rule != "fixed":
            yield f'size_rule "{self.size_rule}" is for images: text to video takes "fixed"'

    def _network_problems(self) -> Iterator[str]:
        high, low = self.high_noise_transformer, self.low_noise_transformer
        if (high is None) != (low is None):
            missing = "low" if low is None else "high"
            yield f"Wan2.2 has two networks: the {missing}-noise checkpoint is missing"
        boundary = self.boundary_step_index
        if boundary is None:
            if high is not None and low is not None:
                yield (
                    "two checkpoints need boundary_step_index, the first step of the second: "
                    "2 would do for 4 steps"
                )
            return
        if not 1 <= boundary < self.num_steps:
            hint = f"{self.num_steps // 2} would do" if self.num_steps > 1 else "use two steps"
            yield (
                "boundary_step_index must leave each network a step, from 1 to "
                f"{self.num_steps - 1}, got {boundary}: {hint}"
            )
        if self.transformer is not None:
            yield (
                "Wan2.2 has two networks: name high_noise_original_ckpt and "
                "low_noise_original_ckpt instead of one checkpoint"
            )

    def _lora_problems(self) -> Iterator[str]:
        if len(self.loras) > MAX_LORAS:
            yield f"there may be {MAX_LORAS} LoRAs, got {len(self.loras)}: merge some of them"
        if self.boundary_step_index is None and any(lora.name for lora in self.loras):
            yield "a LoRA's name says which of Wan2.2's networks is meant: Wan2.1 has one, leave it"
        places = [(lora.path, lora.name) for lora in self.loras]
        for path, _ in sorted({place for place in places if places.count(place) > 1}, key=str):
            yield f"LoRA {shown(path)} is there twice: use it once, with another strength"

    @cached_property
    def id(self) -> str:
        """16 hex digits of the content's SHA-256; equal looks have equal ids on every machine."""
        # A field that comes later has a default and is left out while it has it: ids stay.
        content = self.model_dump(mode="json", exclude_defaults=True)
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def weights(self) -> str:
        """Equal for looks between which a worker has nothing to load and nothing to merge."""
        names = {"task", "model_path", "transformer", "base", "quantization", "loras", "offload"}
        names |= {"high_noise_transformer", "low_noise_transformer", "vae_tiling", "vae_dtype"}
        names |= {"text_encoder_on_cpu", "image_encoder_on_cpu", "vae_on_cpu", "unload_encoders"}
        return self.model_dump_json(include=names)

    @property
    def num_steps(self) -> int:
        return len(self.denoising_step_list)

    @property
    def needs_image(self) -> bool:
        return self.task == "i2v"

    @property
    def crops_image(self) -> bool:
        """The middle of the image is shown; else all of it, stretched by a few pixels."""
        return self.size_rule != "area"

    def sized(self, image_width: int, image_height: int) -> "Look":
        """The look with the size of the video that an image of so many pixels becomes.

        `area`: the image's aspect at no more than the area of width x height, down to multiples
        of 16. `bucket`: landscape, square or portrait, whichever is nearest, in the resolution
        nearest to that area. `fixed`: width x height whatever the image. Not to be applied twice:
        the size of the answer is no longer that of the preset.
        """
        if self.size_rule == "fixed":
            return self
        assert min(image_width, image_height) >= 1
        if self.size_rule == "bucket":
            width, height = _bucket(image_width, image_height, self.width * self.height)
        else:
            width, height = _area(image_width, image_height, self.width * self.height)
        if not (MIN_SIDE <= width <= MAX_SIDE and MIN_SIDE <= height <= MAX_SIDE):
            raise ValueError(
                f"an image of {image_width}x{image_height} pixels is too narrow for a video of "
                f"about {self.width}x{self.height}: crop it"
            )
        return self.with_changes({"width": width, "height": height})

    def with_changes(self, changes: Mapping[str, object]) -> "Look":
        """A look that was checked again; ValueError names each field and what would do."""
        try:
            return Look.model_validate(self.model_dump() | dict(changes))
        except ValidationError as error:
            told = (f"{field} {text}".lstrip() for field, text in messages(error))
            raise ValueError("; ".join(told)) from None


def _area(image_width: int, image_height: int, area: int) -> tuple[int, int]:
    # In whole numbers: with LightX2V's floating point an 832x480 image makes an 832x464 video.
    return (
        _whole_tokens(area * image_width, image_height),
        _whole_tokens(area * image_height, image_width),
    )


def _whole_tokens(numerator: int, denominator: int) -> int:
    """sqrt(numerator / denominator), down to a multiple of 16."""
    return math.isqrt(numerator // (denominator * SIDE_GRID**2)) * SIDE_GRID


def _bucket(image_width: int, image_height: int, area: int) -> tuple[int, int]:
    resolution = min(LANDSCAPE, key=lambda name: abs(math.prod(LANDSCAPE[name]) - area))
    width, height = LANDSCAPE[resolution]
    side = _SQUARE[resolution]
    # By height / width; of two equally near ones the first: the order is part of the rule.
    shapes = {0.667: (width, height), 1.5: (height, width), 1.0: (side, side)}
    return shapes[min(shapes, key=lambda aspect: abs(aspect - image_height / image_width))]


class RenderSpec(BaseModel, frozen=True, extra="forbid"):
    """All that a worker needs to know to render a job; frozen at submit."""

    look: Look
    prompt: str = Field(min_length=1)
    negative_prompt: str | None
    """Kept for models that use it: distilled models render without it."""
    image_key: str | None = None
    """The first frame, in the results store."""
    seed: int = Field(ge=0, le=MAX_SEED)


def unreadable(error: ValidationError) -> str:
    """Where something stored says what this version does not know: the first three places."""
    return "; ".join(f"{'.'.join(map(str, d['loc']))}: {d['msg']}" for d in error.errors()[:3])


def messages(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Field (empty: the whole) and our own sentence, for each thing that is wrong."""
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        text = str(cause) if cause is not None else detail["msg"]
        field, *inside = detail["loc"] or ("",)
        if inside:
            place = [f"entry {part + 1}:" if isinstance(part, int) else part for part in inside]
            text = " ".join([*map(str, place), text])
        yield str(field), text
