"""Presets: what a video looks like, read from LightX2V's config files. Nothing about machines."""

import difflib
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, NoReturn

import json5
from pydantic import BaseModel, BeforeValidator, Field, ValidationError

from jobs import errors

SHIPPED_FOLDER = Path(__file__).resolve().parent.parent / "configs"

DEFAULT_STEPS = (1000, 750, 500, 250)  # what the published 4-step models were distilled for
DEFAULT_MODEL_PATH = "Wan2.1-T2V-14B"

SIDE_GRID = 16  # the VAE shrinks by 8, the transformer patches by 2
MIN_SIDE, MAX_SIDE = 16, 2048
FRAME_GRID = 4  # the VAE makes one latent frame of four, after the first
MAX_FRAMES = 481  # 30 s at 16 fps; the models were trained on 81
MAX_FPS = 120
MAX_STEPS = 50
MAX_SHIFT = 100.0
MAX_SEED = 2**63 - 1  # the widest signed integer of both databases
MAX_FILE_BYTES = 65_536  # json5 needs seconds for more, and a preset has 30 lines


# Checks. Each returns the value or raises ValueError("must ..."); the caller puts the key in front.


def _shown(value: object) -> str:
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
        raise ValueError(f"must be a whole number such as {example}, got {_shown(value)}")
    return value


def _check_side(value: object) -> int:
    side = _check_whole(value, example=480)
    if side % SIDE_GRID or not MIN_SIDE <= side <= MAX_SIDE:
        hint = _near_on_grid(side, grid=SIDE_GRID, offset=0, low=MIN_SIDE, high=MAX_SIDE)
        raise ValueError(
            f"must be a multiple of {SIDE_GRID} from {MIN_SIDE} to {MAX_SIDE}, "
            f"got {_shown(side)}: {hint}"
        )
    return side


def _check_num_frames(value: object) -> int:
    frames = _check_whole(value, example=81)
    if frames % FRAME_GRID != 1 or not 1 <= frames <= MAX_FRAMES:
        hint = _near_on_grid(frames, grid=FRAME_GRID, offset=1, low=1, high=MAX_FRAMES)
        raise ValueError(
            f"must be 4n+1 from 1 to {MAX_FRAMES}, such as 77 or 81, got {_shown(frames)}: {hint}"
        )
    return frames


def _check_fps(value: object) -> int:
    fps = _check_whole(value, example=16)
    if not 1 <= fps <= MAX_FPS:
        nearest = min(max(fps, 1), MAX_FPS)
        raise ValueError(f"must be from 1 to {MAX_FPS}, got {_shown(fps)}: {nearest} would do")
    return fps


def _check_steps(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not all(type(step) is int for step in value):
        raise ValueError(
            f"must be a list of whole numbers such as {list(DEFAULT_STEPS)}, got {_shown(value)}"
        )
    if not 1 <= len(value) <= MAX_STEPS:
        raise ValueError(
            f"must have 1 to {MAX_STEPS} entries, got {len(value)}: {list(DEFAULT_STEPS)} would do"
        )
    good = sorted({min(max(step, 1), 1000) for step in value}, reverse=True)
    if list(value) != good:
        raise ValueError(
            "must be strictly decreasing numbers from 1 to 1000, "
            f"got {_shown(value)}: {good} would do"
        )
    return tuple(value)


def _check_shift(value: object) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"must be a number such as 5, got {_shown(value)}")
    assert isinstance(value, int | float)
    if not 0 < value <= MAX_SHIFT:  # NaN fails this too
        raise ValueError(f"must be above 0, up to {MAX_SHIFT:g}, got {_shown(value)}: 5 would do")
    return float(value)


def _check_model_path(value: object) -> str:
    """The folder in one spelling, so that "tiny" and "tiny/" are one look."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        raise ValueError(
            f'must name a folder of weights such as "{DEFAULT_MODEL_PATH}", got {_shown(value)}'
        )
    path = PurePosixPath(value)
    if ".." in path.parts or not path.name or path.parts[0].startswith("~"):
        raise ValueError(
            f"must be a folder below the models folder or an absolute path without '..' and '~', "
            f"got {_shown(value)}"
        )
    return str(path)


def _check_one_of(*allowed: str) -> BeforeValidator:
    def check(value: object) -> object:
        if value not in allowed:
            raise ValueError(f"must be {' or '.join(map(_shown, allowed))}, got {_shown(value)}")
        return value

    return BeforeValidator(check)


# What a job carries.


class Look(BaseModel, frozen=True, extra="forbid"):
    """Everything that decides the picture except prompt, seed and image; named by its content."""

    task: Annotated[Literal["t2v"], _check_one_of("t2v")]
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

    @cached_property
    def id(self) -> str:
        """16 hex digits of the content's SHA-256; equal looks have equal ids on every machine."""
        # A field that comes later has a default and is left out while it has it: ids stay.
        content = self.model_dump(mode="json", exclude_defaults=True)
        canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @property
    def num_steps(self) -> int:
        return len(self.denoising_step_list)


class RenderSpec(BaseModel, frozen=True, extra="forbid"):
    """All that a worker needs to know to render a job; frozen at submit."""

    look: Look
    prompt: str = Field(min_length=1)
    negative_prompt: str | None
    """Kept for models that use it: distilled models render without it."""
    seed: int = Field(ge=0, le=MAX_SEED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A named look and the file it was read from."""

    name: str
    path: Path
    description: str | None
    look: Look
    keys_without_effect: tuple[tuple[str, str], ...]
    """Keys of the file that decide nothing here, each with the reason."""

    def look_for(
        self,
        *,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        fps: int | None = None,
    ) -> Look:
        """The look with what one prompt row asks for; ValueError names the number that would do."""
        asked = {"width": width, "height": height, "num_frames": num_frames, "fps": fps}
        changes = {field: value for field, value in asked.items() if value is not None}
        if not changes:
            return self.look
        try:
            return Look.model_validate(self.look.model_dump() | changes)
        except ValidationError as error:
            raise ValueError("; ".join(f"{f} {text}" for f, text in _messages(error))) from None


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenPreset:
    """A preset file that cannot be used, and why."""

    name: str
    path: Path
    reason: str


def frames_for_seconds(seconds: float, fps: int) -> int:
    """The 4n+1 frames nearest to this length, the longer at a tie: 5 s at 16 fps are 81 frames."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds must be above 0, got {seconds}: 5 would do")
    frames = max(math.floor((seconds * fps - 1) / FRAME_GRID + 0.5), 0) * FRAME_GRID + 1
    if frames > MAX_FRAMES:
        longest = math.floor(MAX_FRAMES * 10 / fps) / 10
        raise ValueError(
            f"seconds must be at most {longest:g} at {fps} fps ({MAX_FRAMES} frames), got {seconds}"
        )
    return frames


def _messages(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Field and our own sentence, for each thing that is wrong."""
    for detail in error.errors():
        cause = detail.get("ctx", {}).get("error")
        yield str(detail["loc"][0]), str(cause) if cause is not None else detail["msg"]


# The keys of a preset file. docs/presets.md names each of them; a test compares.

LOOK_KEYS: dict[str, str] = {
    "task": 'what is made: "t2v", text to video',
    "model_path": "folder of the weights, below the worker's models folder or absolute",
    "denoising_step_list": "the denoising steps; their number is the length of the list",
    "step_rule": 'how a step is made: "euler" or "renoise"',
    "sample_shift": "shift of the noise levels",
    "target_width": "width in pixels, a multiple of 16",
    "target_height": "height in pixels, a multiple of 16",
    "target_video_length": "number of frames, 4n+1",
    "num_frames": "newer name of target_video_length",
    "size": "[height, width]: newer form of target_height and target_width",
    "fps": "frames per second of the mp4",
    "description": "a line for people: shown in lists, decides nothing",
}

CHECKED_KEYS: dict[str, str] = {
    "infer_steps": "must be the length of denoising_step_list",
    "enable_cfg": "must be false: distilled models render without CFG",
}

_KERNEL = "which kernel runs is the worker's choice"
_OFFLOAD = "what stays in GPU memory is the worker's choice"
_PARALLEL = "one job runs on one GPU"
_IMAGE_ONLY = "text to video reads no image"
_NO_CFG = "distilled models render without CFG"
_NO_LORA = "no LoRA is applied"
_NO_QUANT = "the weights are not quantized"
_NO_TINY_VAE = "the full VAE is used"
_FROM_WEIGHTS = "read from the config.json beside the weights"
_NO_CACHING = "every step is computed"

KEYS_WITHOUT_EFFECT: dict[str, str] = {
    "seed": "each job has its own seed, fixed at submit",
    "sample_guide_scale": _NO_CFG,
    "cfg_scale": _NO_CFG,
    "cross_attn_2_type": _IMAGE_ONLY,
    "use_image_encoder": _IMAGE_ONLY,
    "resize_mode": _IMAGE_ONLY,
    "resolution": _IMAGE_ONLY,
    "max_area": _IMAGE_ONLY,
    "clip_cpu_offload": _IMAGE_ONLY,
    "clip_quantized": _IMAGE_ONLY,
    "clip_quant_scheme": _IMAGE_ONLY,
    "clip_original_ckpt": _IMAGE_ONLY,
    "clip_quantized_ckpt": _IMAGE_ONLY,
    "cpu_offload": _OFFLOAD,
    "offload_granularity": _OFFLOAD,
    "offload_ratio": _OFFLOAD,
    "t5_cpu_offload": _OFFLOAD,
    "t5_offload_granularity": _OFFLOAD,
    "vae_cpu_offload": _OFFLOAD,
    "lazy_load": _OFFLOAD,
    "t5_lazy_load": _OFFLOAD,
    "unload_modules": _OFFLOAD,
    "clean_cuda_cache": _OFFLOAD,
    "warmup": "networks stay warm between jobs",
    "parallel": _PARALLEL,
    "seq_parallel": _PARALLEL,
    "cfg_parallel": _PARALLEL,
    "parallel_attn_type": _PARALLEL,
    "parallel_vae": _PARALLEL,
    "use_tiling_vae": "the VAE decodes in chunks of frames, never in tiles",
    "vae_dtype": _KERNEL,
    "vae_weight_dtype": _KERNEL,
    "use_bfloat16": _KERNEL,
    "rope_type": _KERNEL,
    "rope_chunk": _KERNEL,
    "rope_chunk_size": _KERNEL,
    "rms_norm_type": _KERNEL,
    "layer_norm_type": _KERNEL,
    "modulate_type": _KERNEL,
    "vae_stride": _FROM_WEIGHTS,
    "patch_size": _FROM_WEIGHTS,
    "lora_dynamic_apply": _NO_LORA,
    "strength_model": _NO_LORA,
    "dit_quant_scheme": _NO_QUANT,
    "t5_quant_scheme": _NO_QUANT,
    "do_mm_calib": _NO_QUANT,
    "tae_path": _NO_TINY_VAE,
    "tiny_vae_path": _NO_TINY_VAE,
    "need_scaled": _NO_TINY_VAE,
    "teacache_thresh": _NO_CACHING,
    "use_ret_steps": _NO_CACHING,
    "sub_servers": "prompts are rendered as they are",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class LimitedKey:
    """A key that would change the picture in a way this version does not render."""

    harmless: tuple[object, ...]
    """Values with which it changes nothing."""
    while_harmless: str
    otherwise: str


def _off(otherwise: str, *also: object) -> LimitedKey:
    harmless = (False, None, "", [], {}, *also)
    return LimitedKey(harmless=harmless, while_harmless="off", otherwise=otherwise)


def _only(*harmless: object, why: str, otherwise: str) -> LimitedKey:
    return LimitedKey(harmless=harmless, while_harmless=why, otherwise=otherwise)


DENSE_ATTENTION = (
    "flash_attn2",
    "flash_attn3",
    "flash_attn4",
    "sage_attn2",
    "sage_attn3",
    "torch_sdpa",
)
_ATTENTION = _only(
    *DENSE_ATTENTION,
    why=_KERNEL,
    otherwise="this version computes full attention: sparse or unknown kinds are not supported; "
    f"remove the key or use one of {', '.join(DENSE_ATTENTION)}",
)
_LORA = _off("LoRA is not supported in this version: merge it into the weights, or remove the key")
_QUANTIZED = _off(
    "quantized weights are not supported in this version: "
    "use the bf16 weights and set the key to false"
)
_OTHER_WEIGHTS = _off(
    "other weights than those in model_path are not supported in this version: "
    "put the file into that folder and remove the key"
)
_TINY_VAE = _off("small VAEs are not supported in this version: set the key to false")
_TWO_EXPERTS = _off("Wan2.2's two-expert models are not supported: this version renders Wan2.1")
_POSTPROCESSING = _off("not supported in this version: remove the key")

LIMITED_KEYS: dict[str, LimitedKey] = {
    "model_cls": _only(
        "wan2.1_distill",
        why="every preset is rendered so",
        otherwise='this version renders step-distilled Wan2.1 only: use "wan2.1_distill"',
    ),
    "distill_method": _only(
        "dmd2",
        why="step_rule decides how a step is made",
        otherwise='only "dmd2" is supported in this version',
    ),
    "scheduler_type": _only(
        "WanStepDistillScheduler",
        why="step_rule decides how a step is made",
        otherwise='only "WanStepDistillScheduler" is supported: use step_rule to choose',
    ),
    "text_len": _only(
        512,
        why=_FROM_WEIGHTS,
        otherwise="only 512, what Wan2.1 was trained with, is supported: remove the key",
    ),
    "self_attn_1_type": _ATTENTION,
    "cross_attn_1_type": _ATTENTION,
    "attention_type": _ATTENTION,
    "feature_caching": _only(
        "NoCaching",
        None,
        why=_NO_CACHING,
        otherwise='with 4 steps there is nothing to cache: use "NoCaching" or remove the key',
    ),
    "mm_config": _off(
        "quantized weights are not supported in this version: remove the key",
        {"mm_type": "Default"},
    ),
    "enable_dynamic_cfg": _off("needs special weights, not supported in this version: use false"),
    "lora_path": _LORA,
    "lora_configs": _LORA,
    "dit_quantized": _QUANTIZED,
    "dit_quantized_ckpt": _QUANTIZED,
    "t5_quantized": _QUANTIZED,
    "t5_quantized_ckpt": _QUANTIZED,
    "dit_original_ckpt": _OTHER_WEIGHTS,
    "dit_distill_ckpt": _OTHER_WEIGHTS,
    "t5_original_ckpt": _OTHER_WEIGHTS,
    "t5_tokenizer_path": _OTHER_WEIGHTS,
    "vae_path": _OTHER_WEIGHTS,
    "vae_pth": _OTHER_WEIGHTS,
    "use_tae": _TINY_VAE,
    "use_lightvae": _TINY_VAE,
    "use_tiny_vae": _TINY_VAE,
    "boundary": _TWO_EXPERTS,
    "boundary_step_index": _TWO_EXPERTS,
    "high_noise_original_ckpt": _TWO_EXPERTS,
    "high_noise_quantized_ckpt": _TWO_EXPERTS,
    "low_noise_original_ckpt": _TWO_EXPERTS,
    "low_noise_quantized_ckpt": _TWO_EXPERTS,
    "video_frame_interpolation": _POSTPROCESSING,
    "video_super_resolution": _POSTPROCESSING,
    "use_prompt_enhancer": _off("prompts are rendered as they are: use false"),
    "prompt": _off("a preset has no prompt: it belongs in the prompt file"),
    "negative_prompt": _off("a preset has no negative prompt: it belongs in the prompt file"),
}

KEYS = frozenset(LOOK_KEYS) | set(CHECKED_KEYS) | set(KEYS_WITHOUT_EFFECT) | set(LIMITED_KEYS)

_FIELD_OF_KEY = {
    "target_width": "width",
    "target_height": "height",
    "target_video_length": "num_frames",
}
_KEY_OF_FIELD = {field: key for key, field in _FIELD_OF_KEY.items()}


# Finding presets.


def load(name_or_path: str, *, folder: Path | None = None, names_only: bool = False) -> Preset:
    """Read a preset by its name, with or without .json, or else by the path of its file.

    A preset in the person's own `folder` goes before a shipped one of the same name. What comes
    over the network is looked up with `names_only`: it must not read any file of this machine.
    """
    path = _path_of_name(name_or_path, folder)
    if path is None and not names_only and _is_file(name_or_path):
        path = Path(name_or_path)
    if path is None:
        raise errors.NotFound(_not_found(name_or_path, folder, names_only=names_only))
    return read(path)


def available(folder: Path | None = None) -> list[Preset | BrokenPreset]:
    """Every preset that `load` finds by its bare name, by name; files that cannot be used too."""
    found: dict[str, Preset | BrokenPreset] = {}
    for path in _files(folder):
        if path.stem not in found:
            found[path.stem] = _read_or_broken(path)
    return [found[name] for name in sorted(found)]


def _read_or_broken(path: Path) -> Preset | BrokenPreset:
    try:
        return read(path)
    except errors.PresetError as error:
        return BrokenPreset(name=path.stem, path=path, reason=str(error))


def _files(folder: Path | None) -> list[Path]:
    """All preset files in the order in which a name is looked up, none of a hidden folder."""
    folders = ([] if folder is None else [folder]) + [SHIPPED_FOLDER]
    return [
        path
        for root in folders
        for path in sorted(root.rglob("*.json"), key=_shallow_first)
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    ]


def _shallow_first(path: Path) -> tuple[int, str]:
    return len(path.parts), str(path)


def _path_of_name(name: str, folder: Path | None) -> Path | None:
    """The first file whose path, from its end and without .json, is the name: x or distill/x."""
    wanted = PurePosixPath(name.removesuffix(".json")).parts
    if not wanted or name.startswith((".", "/")):
        return None
    for path in _files(folder):
        if path.with_suffix("").parts[-len(wanted) :] == wanted:
            return path
    return None


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _not_found(name: str, folder: Path | None, *, names_only: bool) -> str:
    names = sorted({path.stem for path in _files(folder)})
    asked = PurePosixPath(name[:200]).name.removesuffix(".json")
    close = difflib.get_close_matches(asked, names, n=1)
    guess = f": did you mean {close[0]!r}?" if close else "."
    path_too = "" if names_only else " A path to a preset file would do too."
    return f"no preset {name[:200]!r}{guess} Presets: {', '.join(names) or 'none'}.{path_too}"


# Reading one file.


def read(path: Path) -> Preset:
    """Read one preset file; PresetError names the file, each wrong key and what would do."""
    fields = _parse(path)
    _refuse_image_to_video(path, fields)
    problems = [*_unknown_keys(fields), *_unsupported(fields), *_contradictions(fields)]
    try:
        look = Look.model_validate(_look_values(fields))
    except ValidationError as error:
        problems += [f"{_key_of(field, fields)} {text}" for field, text in _messages(error)]
    if problems:
        _refuse(path, problems)
    return Preset(
        name=path.stem,
        path=path,
        description=fields.get("description"),
        look=look,
        keys_without_effect=tuple(_without_effect(fields)),
    )


def _refuse(path: Path, problems: Iterable[str]) -> NoReturn:
    raise errors.PresetError(f"{path}: {'; '.join(problems)}") from None


def _parse(path: Path) -> dict[str, Any]:
    """The object in the file: JSON, or JSON with comments and trailing commas."""
    text = _text(path)
    try:
        fields = _loads(text)
    except RecursionError:
        _refuse(path, ["nested too deeply: a preset is one flat object"])
    except ValueError as error:
        _refuse(path, [_syntax_problem(str(error), text)])
    if not isinstance(fields, dict):
        _refuse(path, [f"must hold one object {{...}}, got {_shown(fields)}"])
    return fields


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        _refuse(path, [f"cannot be read: {error.strerror}"])
    if len(content) > MAX_FILE_BYTES:
        _refuse(path, [f"is larger than {MAX_FILE_BYTES} bytes: this is no preset"])
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        _refuse(path, [f"line {line}: byte 0x{byte:02x} is not UTF-8: save the file as UTF-8"])


def _loads(text: str) -> Any:
    hooks: dict[str, Any] = {
        "object_pairs_hook": _without_duplicates,
        "parse_constant": _refuse_constant,
        "parse_float": _finite,
    }
    try:
        return json.loads(
            text, **hooks
        )  # what json reads means the same to json5, 100 times faster
    except json.JSONDecodeError:
        return json5.loads(text, **hooks)


def _without_duplicates(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for key, value in pairs:
        if key in fields:
            raise ValueError(f"{key} is given twice: keep one")
        fields[key] = value
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number that a preset can have")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text} is not a number that a preset can have")
    return number


def _syntax_problem(message: str, text: str) -> str:
    """One sentence from what json5, Python or a hook of ours said."""
    if not text.strip():
        return "is empty: a preset is an object {...}"
    if place := re.match(r"<string>:(\d+) (.*)", message, re.DOTALL):
        return f"line {place[1]}: not JSON: {place[2]!s}".replace("\n", "\\n")
    if "int_max_str_digits" in message:
        return "holds a number with thousands of digits"
    if double := re.match(r"(\w+) is given twice", message):
        lines = [n for n, line in enumerate(text.split("\n"), 1) if double[1] in line]
        return f"line {lines[-1]}: {message}" if lines else message
    return message


def _refuse_image_to_video(path: Path, fields: dict[str, Any]) -> None:
    """LightX2V's own files say the task in their name only."""
    named_i2v = re.search(r"(^|[_-])i2v([_-]|$)", path.stem) is not None
    if fields.get("task", "i2v" if named_i2v else "t2v") == "i2v":
        _refuse(
            path,
            [
                "is an image-to-video preset (i2v): "
                "text-to-video presets (t2v) are what this version renders"
            ],
        )


def _unknown_keys(fields: dict[str, Any]) -> Iterator[str]:
    for key in sorted(fields.keys() - KEYS)[:5]:
        close = difflib.get_close_matches(key[:64], KEYS, n=1)
        guess = f", did you mean {close[0]}?" if close else ": remove it, see docs/presets.md"
        yield f"unknown key {_shown(key)}{guess}"


def _unsupported(fields: dict[str, Any]) -> Iterator[str]:
    for key, limited in LIMITED_KEYS.items():
        if key in fields and fields[key] not in limited.harmless:
            yield f"{key} is {_shown(fields[key])}: {limited.otherwise}"


def _contradictions(fields: dict[str, Any]) -> Iterator[str]:
    """What two keys say together, and the keys that are checked only."""
    if fields.get("enable_cfg", False) is not False:
        yield (
            f"enable_cfg must be false, got {_shown(fields['enable_cfg'])}: "
            "distilled models render without CFG, with it their videos blur"
        )
    steps = fields.get("denoising_step_list", list(DEFAULT_STEPS))
    num_steps = len(steps) if isinstance(steps, list) else None
    if "infer_steps" in fields and num_steps not in (None, fields["infer_steps"]):
        yield (
            f"infer_steps is {_shown(fields['infer_steps'])} but denoising_step_list has "
            f"{num_steps} entries: {num_steps} would do, or remove infer_steps"
        )
    if "num_frames" in fields and "target_video_length" in fields:
        yield "num_frames and target_video_length are the same thing: keep one"
    if "size" in fields and fields.keys() & {"target_width", "target_height"}:
        yield "size is [target_height, target_width]: keep one form"
    if "size" in fields and not _is_pair(fields["size"]):
        yield f"size must be [height, width] such as [480, 832], got {_shown(fields['size'])}"
    description = fields.get("description", "")
    if not isinstance(description, str) or not description.isprintable():
        yield f"description must be one line of text, got {_shown(description)}"


def _is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2


def _look_values(fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Look: what the file says over what a LightX2V file leaves to its caller."""
    height, width = fields["size"] if _is_pair(fields.get("size")) else (480, 832)
    values = {
        "task": "t2v",
        "model_path": DEFAULT_MODEL_PATH,
        "denoising_step_list": DEFAULT_STEPS,
        "step_rule": "euler",
        "sample_shift": 5.0,
        "width": width,
        "height": height,
        "num_frames": 81,
        "fps": 16,
    }
    given = {_FIELD_OF_KEY.get(key, key): value for key, value in fields.items()}
    return values | {field: given[field] for field in values.keys() & given.keys()}


def _key_of(field: str, fields: dict[str, Any]) -> str:
    """The key that the person wrote for this field of the look."""
    if field in ("width", "height") and "size" in fields:
        return f"size: the {field}"
    return field if field in fields else _KEY_OF_FIELD.get(field, field)


def _without_effect(fields: dict[str, Any]) -> Iterator[tuple[str, str]]:
    for key in fields:
        if key in KEYS_WITHOUT_EFFECT:
            yield key, KEYS_WITHOUT_EFFECT[key]
        elif key in LIMITED_KEYS:
            yield key, LIMITED_KEYS[key].while_harmless
