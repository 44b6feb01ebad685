"""A training as a person writes it down: what is distilled, from which prompts, into which folder.

The file is JSON, comments allowed. Keys of `Method` and of `Course` stand side by side; those of
the two trained networks in the objects `student` and `critic`.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import json5

from models import sampling
from models.distillation import method

MAX_NUMBER = 2**63 - 1  # more fits no counter
MAX_FILE_BYTES = 65_536  # json5 needs seconds for more
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，"
    "形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""Wan2.1's own, in the words of its repository."""

Task = Literal["t2v", "i2v"]
Precision = Literal["bf16", "fp32"]


class CourseError(ValueError):
    """A training's file cannot be used: the message names the key and what would do."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


@dataclass(frozen=True, kw_only=True)
class Course:
    """One training. Paths are as written."""

    model: str
    """The folder of the undistilled model, which becomes the teacher, or its name among models."""
    prompts: Path
    output: Path
    how: method.Method
    task: Task = "t2v"
    student_start: Path | None = None
    """A transformer to begin with instead of the teacher's; full weights only."""
    regression_pairs: int = 0
    """How many of the teacher's answers `regression` takes; they are made first, and kept."""
    regression_steps: int = 50
    """Of each answer."""
    negative_prompt: str = NEGATIVE_PROMPT
    target_width: int = 832
    target_height: int = 480
    target_video_length: int = 81
    fps: int = 16
    student_updates: int = 600
    save_every: int = 50
    keep: int = 2
    """Checkpoints."""
    probe_every: int = 0
    """Student updates between probe videos; 0: none."""
    probes: int = 2
    """How many of the prompts, from the first, are rendered as probes."""
    precision: Precision = "bf16"
    """What the networks compute in; weights that are trained are always fp32."""
    description: str = ""

    def __post_init__(self) -> None:
        for name in ("target_width", "target_height"):
            side = getattr(self, name)
            if side < 16 or side % 16:
                raise ValueError(f"{name} must be a positive multiple of 16, got {side}")
        frames = self.target_video_length
        if frames < 1 or frames % 4 != 1:
            raise ValueError(f"target_video_length must be 4n+1, such as 81, got {frames}")
        for name, least in (
            ("fps", 1), ("student_updates", 1), ("save_every", 1), ("keep", 1), ("probe_every", 0),
            ("probes", 1), ("regression_pairs", 0), ("regression_steps", 1),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if (self.how.regression is None) != (self.regression_pairs == 0):
            raise ValueError(
                "regression, a weight such as 1, and regression_pairs, such as 1000, go together"
            )
        if self.regression_steps > sampling.TABLE_LENGTH:
            most = sampling.TABLE_LENGTH
            raise ValueError(
                f"regression_steps must be at most {most}, got {self.regression_steps}"
            )
        if self.student_start is not None and self.how.student.weights != "full":
            raise ValueError("student_start is for full weights: a LoRA starts from the teacher")


def read(path: Path) -> Course:
    """Read a training's file; relative paths in it start from its folder.

    So does `model`, which stays a name where there is no such folder.
    Raises CourseError for a file that is missing, broken, has unknown keys or bad values.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise CourseError(path, f"is larger than {MAX_FILE_BYTES:,} bytes")
        values = json5.loads(path.read_text(encoding="utf-8"), allow_duplicate_keys=False)
    except OSError as error:
        raise CourseError(path, error.strerror or str(error)) from error
    except (ValueError, RecursionError) as error:
        raise CourseError(path, f"is not JSON: {str(error).splitlines()[0]}") from error
    if not isinstance(values, dict):
        raise CourseError(path, "must hold one object: {...}")
    try:
        course = from_values(values)
    except ValueError as error:
        raise CourseError(path, str(error)) from error
    folder = path.parent
    start, model = course.student_start, folder / course.model
    return dataclasses.replace(
        course,
        model=str(model.resolve()) if model.is_dir() else course.model,
        prompts=folder / course.prompts,
        output=folder / course.output,
        student_start=None if start is None else folder / start,
    )


def from_values(values: Mapping[str, Any]) -> Course:
    """A course from the keys of its file. Raises ValueError for the first that is wrong."""
    of_course, of_method = _fields(Course), _fields(method.Method)
    del of_course["how"]
    known = [*of_course, *of_method]
    _refuse_unknown(values, known, "")
    for name in ("model", "prompts", "output"):
        if name not in values:
            raise ValueError(f"{name} is missing")
    given = {name: value for name, value in values.items() if name not in ("student", "critic")}
    taken = {
        name: _converted(value, (of_course | of_method)[name], name)
        for name, value in given.items()
    }
    if not taken["model"].strip():
        raise ValueError("model must name a model or its folder")
    taken_of_method: dict[str, Any] = {
        "student": _tuning(values.get("student", {}), "student", method.student_tuning),
        "critic": _tuning(values.get("critic", {}), "critic", method.critic_tuning),
    }
    taken_of_method |= {name: value for name, value in taken.items() if name in of_method}
    how = method.Method(**taken_of_method)
    return Course(how=how, **{name: value for name, value in taken.items() if name in of_course})


def _tuning(values: object, who: str, build: Any) -> method.Tuning:
    if not isinstance(values, dict):
        raise ValueError(f'{who} must be an object such as {{"weights": "lora"}}, got {values!r}')
    kinds = _fields(method.Tuning)
    _refuse_unknown(values, list(kinds), f"{who}.")
    taken = {
        name: _converted(value, kinds[name], f"{who}.{name}") for name, value in values.items()
    }
    try:
        tuning: method.Tuning = build(**taken)
    except ValueError as error:
        raise ValueError(f"{who}.{error}") from error
    return tuning


def _fields(of: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(of)
    return {field.name: hints[field.name] for field in dataclasses.fields(of)}


def _refuse_unknown(values: Mapping[str, Any], known: list[str], where: str) -> None:
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            guess = f": did you mean {where}{near[0]}?" if near else ""
            raise ValueError(f"unknown key {where}{name}{guess}")


def _converted(value: Any, kind: Any, name: str) -> Any:
    """The value as its field wants it: whole numbers do for numbers, lists for tuples."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if type(value) is int and abs(value) > MAX_NUMBER:
        raise ValueError(f"{name} must be a number from {-MAX_NUMBER} to {MAX_NUMBER}")
    if origin is types.UnionType:
        if value is None and type(None) in arguments:
            return None
        return _converted(value, arguments[0], name)
    if origin is Literal:
        if value not in arguments:
            raise ValueError(f"{name} must be {' or '.join(arguments)}, got {value!r}")
        return value
    if origin is tuple:
        return _sequence(value, arguments, name)
    if kind is float and type(value) is int:
        return float(value)
    if kind is Path and isinstance(value, str) and value.strip():
        return Path(value)
    if type(value) is not kind:
        raise ValueError(f"{name} must be {_WORDS[kind]}, got {value!r}")
    return value


def _sequence(value: Any, kinds: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {value!r}")
    is_open = kinds[-1] is Ellipsis
    if not is_open and len(value) != len(kinds):
        raise ValueError(f"{name} must be a list of {len(kinds)}, got {value!r}")
    return tuple(_converted(item, kinds[0], name) for item in value)


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "a text",
    bool: "true or false",
    Path: "a path",
}
