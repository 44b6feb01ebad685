"""One row of a prompt file: its keys, what each may hold, and what is told of a wrong one."""

import difflib
import functools
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs import looks, one_line

MAX_PROMPT_CHARS = 10_000  # the text encoder reads the first 512 tokens
MAX_CUSTOM_ID_CHARS = 512
MAX_IMAGE_CHARS = 1_048_576  # of a data URL; the longest prompt needs 60 kB
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_SECONDS = 3_600
MAX_SIDE_OR_COUNT = 100_000  # keeps numbers sane here; the preset decides what fits
MAX_PRIORITY = 100
MAX_SHOWN = 5  # faults told of one row: a line may hold a hundred thousand


@dataclass(frozen=True, kw_only=True, slots=True)
class Lora:
    """A LoRA that a row asks for, by name or by path."""

    name: str | None = None
    path: str | None = None
    strength: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptRow:
    """One video that a prompt file asks for. None: the preset or the submit decides."""

    line: int
    """Where its record begins, from 1."""
    prompt: str
    custom_id: str | None = None
    negative_prompt: str | None = None
    seed: int | None = None
    width: int | None = None
    height: int | None = None
    num_frames: int | None = None
    seconds: float | None = None
    fps: int | None = None
    image: str | None = None
    lora: tuple[Lora, ...] | None = None
    metadata: dict[str, str] | None = None
    priority: int | None = None


class Invalid(ValueError):
    """What is wrong with one record; becomes the Problem of its line."""


def checked(fields: dict[str, Any], line: int) -> PromptRow:
    """The row of a record that begins on this line. Invalid tells its first MAX_SHOWN faults."""
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for key, value in fields.items():
        check = _CHECKS.get(key)
        if len(wrong) == MAX_SHOWN:
            break
        if check is None:
            wrong.append(unknown(key, "key"))
        elif value is not None:
            try:
                values[key] = check(value)
            except Invalid as invalid:
                wrong.append(f"{key} {invalid}")
    if fields.get("prompt") is None:
        wrong.append("prompt is missing")
    if "size" in values:
        if "width" in values or "height" in values:
            wrong.append("size and width or height are both given: keep one form")
        values["width"], values["height"] = values.pop("size")
    if "seconds" in values and "num_frames" in values:
        wrong.append("seconds and num_frames are both given: keep one")
    if wrong:
        raise Invalid("; ".join(wrong))
    return PromptRow(line=line, **values)


def number(text: str) -> Any:
    """The number that the text is, else the text: the check of its key then says what is wrong."""
    text = text.strip()
    if re.fullmatch(r"[+-]?[0-9]{1,20}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[+-]?[0-9]{1,20}\.[0-9]{1,20}", text) else text


def shown(value: object) -> str:
    """The value as a person wrote it, shortened, and safe to print."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    if not isinstance(value, str):
        return _shortened(json.dumps(value))
    # Lone surrogates and control characters are escaped: a terminal cannot show them.
    return _shortened(json.dumps(value[:60], ensure_ascii=not value[:60].isprintable()))


def _shortened(text: str) -> str:
    return text if len(text) <= 50 else f"{text[:47]}..."


def _refuse_unstorable(text: str) -> None:
    """PostgreSQL stores no NUL, and UTF-8 has no half of a surrogate pair."""
    if "\0" in text:
        raise Invalid("holds a NUL character: remove it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise Invalid(
                "holds half of a surrogate pair, which is no character: remove it"
            ) from None


def _why_blank(text: str) -> str:
    return "is empty" if not text or text.isspace() else "has no character that can be seen"


def _text_check(max_chars: int) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if type(value) is not str:
            raise Invalid(f"must be a text, got {shown(value)}")
        if one_line.is_blank(value):
            raise Invalid(f"{_why_blank(value)}: write some text")
        if len(value) > max_chars:
            raise Invalid(f"has {len(value):,} characters: at most {max_chars:,} would do")
        _refuse_unstorable(value)
        return value

    return check


def _whole_check(low: int, high: int, *, told: str = "") -> Callable[[Any], int]:
    told = told or f"from {low} to {high}"

    def check(value: Any) -> int:
        if type(value) is int and low <= value <= high:
            return value
        quoted = isinstance(value, str) and type(number(value)) is int
        hint = f": write {_shortened(value.strip())} without quotes" if quoted else ""
        raise Invalid(f"must be a whole number {told}, got {shown(value)}{hint}")

    return check


_check_id_text = _text_check(MAX_CUSTOM_ID_CHARS)
_check_optional_text = _text_check(MAX_PROMPT_CHARS)


def _check_custom_id(value: Any) -> str:
    if type(value) is int:
        raise Invalid(f'must be a text, got {shown(value)}: write "{shown(value)}"')
    text = _check_id_text(value)
    if wrong := one_line.first_wrong(text):
        raise Invalid(f"must be on one line, got {shown(text)}: remove {wrong!a}")
    return text


def _check_negative_prompt(value: Any) -> str:
    return "" if value == "" else _check_optional_text(value)


def _check_size(value: Any) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value) if isinstance(value, str) else None
    if match is None or not int(match[1]) or not int(match[2]):
        raise Invalid(f'must be width x height such as "832x480", got {shown(value)}')
    return int(match[1]), int(match[2])


def _check_seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= MAX_SECONDS:
        raise Invalid(
            f"must be a number above 0, up to {MAX_SECONDS}, such as 5, got {shown(value)}"
        )
    return float(value)


def check_metadata(value: Any) -> dict[str, str]:
    """Of a row, or of a batch: Invalid says what would do."""
    if type(value) is not dict:
        raise Invalid(f'must be an object such as {{"scene": "12"}}, got {shown(value)}')
    if len(value) > MAX_METADATA_PAIRS:
        raise Invalid(f"has {len(value)} pairs: at most {MAX_METADATA_PAIRS} would do")
    for key, text in value.items():
        if not key or len(key) > MAX_METADATA_KEY_CHARS:
            raise Invalid(f"key {shown(key)} must have 1 to {MAX_METADATA_KEY_CHARS} characters")
        if type(text) is not str or len(text) > MAX_METADATA_VALUE_CHARS:
            raise Invalid(
                f"value of {shown(key)} must be a text of at most {MAX_METADATA_VALUE_CHARS} "
                f"characters, got {shown(text)}"
            )
        _refuse_unstorable(key)
        _refuse_unstorable(text)
    return value


def _check_lora(value: Any) -> tuple[Lora, ...]:
    if type(value) is not list or not 1 <= len(value) <= looks.MAX_LORAS:
        raise Invalid(
            f'must be a list of 1 to {looks.MAX_LORAS} objects such as [{{"name": "film", '
            f'"strength": 0.8}}], got {shown(value)}'
        )
    return tuple(_check_one_lora(entry) for entry in value)


def _check_one_lora(entry: Any) -> Lora:
    if type(entry) is not dict or not entry.keys() <= {"name", "path", "strength"}:
        raise Invalid(f"entries must have name or path, and strength, only; got {shown(entry)}")
    if ("name" in entry) == ("path" in entry):
        raise Invalid("entries must have either a name or a path")
    strength = entry.get("strength", 1.0)
    if type(strength) not in (int, float) or not -10 <= strength <= 10:
        raise Invalid(f"strength must be a number from -10 to 10, got {shown(strength)}")
    where = {key: _check_source(entry[key]) for key in ("name", "path") if key in entry}
    return Lora(**where, strength=float(strength))


_check_source = _text_check(MAX_IMAGE_CHARS)
_check_above_0 = _whole_check(1, MAX_SIDE_OR_COUNT, told="above 0")


def _check_count(value: Any) -> int:
    if type(value) is int and value > MAX_SIDE_OR_COUNT:
        raise Invalid(f"is {shown(value)}, more than any preset takes")
    return _check_above_0(value)


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "custom_id": _check_custom_id,
    "prompt": _text_check(MAX_PROMPT_CHARS),
    "negative_prompt": _check_negative_prompt,
    "seed": _whole_check(0, looks.MAX_SEED),
    "size": _check_size,
    "width": _check_count,
    "height": _check_count,
    "num_frames": _check_count,
    "seconds": _check_seconds,
    "fps": _check_count,
    "image": _check_source,
    "lora": _check_lora,
    "metadata": check_metadata,
    "priority": _whole_check(-MAX_PRIORITY, MAX_PRIORITY),
}
KEYS = frozenset(_CHECKS)
"""Every key that a row may have; docs/prompt-files.md names each of them."""

_MEANT = {
    "id": "custom_id",
    "recordId": "custom_id",
    "text": "prompt",
    "caption": "prompt",
    "input": "prompt",
    "duration": "seconds",
    "frames": "num_frames",
    "target_video_length": "num_frames",
    "target_fps": "fps",
    "target_width": "width",
    "target_height": "height",
    "resolution": "size",
    "image_path": "image",
    "input_reference": "image",
    "lora_configs": "lora",
    "metadata": "metadata.<name>",  # as a CSV column
}
_PRESET_DECIDES = frozenset(
    {"model", "preset", "steps", "infer_steps", "denoising_step_list", "sample_shift", "enable_cfg"}
)


@functools.lru_cache(maxsize=256)  # a whole file may have the same mistake on every line
def unknown(name: str, kind: str) -> str:
    """What is told of a key or column that no row has."""
    if name in _PRESET_DECIDES:
        return f"{kind} {shown(name)} is not for rows: the preset decides it, remove it"
    close = difflib.get_close_matches(name[:64], KEYS, n=1)
    meant = _MEANT.get(name) or (close[0] if close else None)
    hint = f"did you mean {meant}?" if meant else f"use {', '.join(_CHECKS)}"
    return f"unknown {kind} {shown(name)}: {hint}"
