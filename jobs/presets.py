"""Presets: named looks, read from LightX2V's config files.

Which keys such a file may have stands in `preset_keys`, what they mean in `preset_values`.
"""

import difflib
import functools
import json
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import json5

from jobs import errors, looks, preset_values

SHIPPED_FOLDER = Path(__file__).resolve().parent.parent / "configs"
MAX_FILE_BYTES = 65_536  # json5 needs seconds for more, and a preset has 30 lines
MAX_KEPT = 1_000  # presets in memory, a few kB each
SETTLED_SECONDS = 2.0  # a file that changes twice in a tick of its disk's clock looks the same


@dataclass(frozen=True, kw_only=True, slots=True)
class Preset:
    """A named look and the file it was read from."""

    name: str
    """Its shortest name: `load` finds this file by it."""
    path: Path
    description: str | None
    look: looks.Look
    keys_without_effect: tuple[tuple[str, str], ...]
    """Keys of the file that decide nothing here, each with the reason."""

    def look_for(
        self,
        *,
        width: int | None = None,
        height: int | None = None,
        num_frames: int | None = None,
        fps: int | None = None,
        loras: Sequence[looks.LoraUse] = (),
    ) -> looks.Look:
        """The look with what one prompt row asks for; ValueError names the number that would do.

        The row's LoRAs come after the preset's own: the distillation first, then the style. With
        image to video, width and height are the area, and `Look.sized` says the size.
        """
        asked = {"width": width, "height": height, "num_frames": num_frames, "fps": fps}
        changes: dict[str, object] = {f: value for f, value in asked.items() if value is not None}
        if loras:
            _refuse_absolute(loras)
            changes["loras"] = (*self.look.loras, *loras)
        return self.look.with_changes(changes) if changes else self.look


def _refuse_absolute(loras: Iterable[looks.LoraUse]) -> None:
    """Prompts may come over the network: they must not make a worker open any file."""
    for lora in loras:
        if PurePosixPath(lora.path).is_absolute():
            raise ValueError(
                f"loras must lie below the models folder, got {looks.shown(lora.path)}: "
                "only a preset may name another place"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class BrokenPreset:
    """A preset file that cannot be used, and why."""

    name: str
    path: Path
    reason: str


class FolderMissing(errors.FileUnusable):
    """The person's own presets are away: a shipped one would be taken for theirs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(f"RUSHES_PRESETS_DIR: there is no folder {folder}")


def frames_for_seconds(seconds: float, fps: int) -> int:
    """The 4n+1 frames nearest to this length, the longer at a tie: 5 s at 16 fps are 81 frames."""
    if not (math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"seconds must be above 0, got {seconds}: 5 would do")
    grid = looks.FRAME_GRID
    frames = max(math.floor((seconds * fps - 1) / grid + 0.5), 0) * grid + 1
    if frames > looks.MAX_FRAMES:
        longest = math.floor(looks.MAX_FRAMES * 10 / fps) / 10
        raise ValueError(
            f"seconds must be at most {longest:g} at {fps} fps ({looks.MAX_FRAMES} frames), "
            f"got {seconds}"
        )
    return frames


# Finding presets.


def load(name_or_path: str, *, folder: Path | None = None, names_only: bool = False) -> Preset:
    """Read a preset by its name, with or without .json, or else by the path of its file.

    A preset in the person's own `folder` goes before a shipped one of the same name. What comes
    over the network is looked up with `names_only`: it must not read any file of this machine.
    """
    check_folder(folder)
    files = _Files(folder)
    path = files.named(name_or_path)
    if path is not None:
        return read(path, name=files.name_of(path))
    if not names_only and _is_file(name_or_path):
        return read(Path(name_or_path))
    raise errors.NotFound(_not_found(name_or_path, files, names_only=names_only))


def problems_of(
    named: Mapping[str, str | None], *, folder: Path | None = None
) -> list[errors.Problem]:
    """Of settings that name a preset: by setting, the name. None while the folder is missing."""
    problems = []
    for setting, name in named.items():
        try:
            if name is not None:
                load(name, folder=folder)
        except FolderMissing:  # it may come back
            pass
        except errors.RushesError as error:
            problems.append(errors.Problem(line=None, message=f"{setting}: {error}"))
    return problems


def check_folder(folder: Path | None) -> None:
    """FolderMissing where it is."""
    if folder is not None and not folder.is_dir():
        raise FolderMissing(folder)


def available(folder: Path | None = None) -> list[Preset | BrokenPreset]:
    """Every preset that `load` finds by a name, by name; files that cannot be used too."""
    return [_read_or_broken(path, name) for name, path in sorted(_Files(folder).names().items())]


def _read_or_broken(path: Path, name: str) -> Preset | BrokenPreset:
    try:
        return read(path, name=name)
    except errors.PresetError as error:
        return BrokenPreset(name=_shown(name), path=path, reason=str(error))


class _Files:
    """The preset files of the person's own folder, then the shipped ones; no hidden folders.

    A name is the end of a file's path without .json: `x`, or `wan21/x`. Of several files that end
    so, the person's own goes first, then the one in the outermost folder.
    """

    def __init__(self, folder: Path | None) -> None:
        self._by_end: dict[tuple[str, ...], list[Path]] = {}
        """By each end of a path: the files that it means, more than one if it is ambiguous."""
        for root in ([] if folder is None else [folder]) + [SHIPPED_FOLDER]:
            self._add(root)

    def named(self, name: str) -> Path | None:
        whole, end = PurePosixPath(name).parts, PurePosixPath(name.removesuffix(".json")).parts
        found = self._by_end.get(whole) or self._by_end.get(end, [])  # of x.json.json: x.json
        if name.startswith((".", "/")):
            found = []
        if len(found) > 1:
            names = " or ".join(repr(self.name_of(path)) for path in found)
            raise errors.NotFound(f"preset {name!r} may be {names}: say which")
        return found[0] if found else None

    def name_of(self, path: Path) -> str:
        """The shortest name of a file that `named` finds."""
        return next(name for name, known in self.names().items() if known == path)

    def names(self) -> dict[str, Path]:
        """Of the files that have a name, each one's shortest."""
        shortest: dict[Path, tuple[str, ...]] = {}
        for end, paths in self._by_end.items():
            if len(paths) == 1 and len(end) < len(shortest.get(paths[0], (*end, ""))):
                shortest[paths[0]] = end
        return {"/".join(end): path for path, end in shortest.items()}

    def _add(self, root: Path) -> None:
        mine: dict[tuple[str, ...], list[Path]] = {}
        for path in sorted(root.rglob("*.json"), key=_shallow_first):
            inside = path.relative_to(root).with_suffix("").parts
            if any(part.startswith(".") for part in inside):
                continue
            parts = path.with_suffix("").parts
            for start in range(len(parts)):
                same = mine.setdefault(parts[start:], [])
                if not same or len(same[0].parts) == len(path.parts):
                    same.append(path)
        for end, paths in mine.items():
            self._by_end.setdefault(end, paths)


def _shallow_first(path: Path) -> tuple[int, str]:
    return len(path.parts), str(path)


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except (OSError, ValueError):  # a name that is too long, or holds a NUL
        return False


def _not_found(name: str, files: _Files, *, names_only: bool) -> str:
    names = sorted(files.names())
    asked = name[:200].removesuffix(".json")
    close = difflib.get_close_matches(asked, names, n=1)
    close = close or difflib.get_close_matches(PurePosixPath(asked).name, names, n=1)
    guess = f": did you mean {close[0]!r}?" if close else "."
    path_too = "" if names_only else " A path to a preset file would do too."
    return f"no preset {name[:200]!r}{guess} `rushes presets` lists all {len(names)}.{path_too}"


# Reading one file.


def read(path: Path, *, name: str | None = None) -> Preset:
    """Read one preset file; PresetError names the file, each wrong key and what would do."""
    if name is not None and name != _shown(name):
        _refuse(path, ["its name is not UTF-8: rename it"])
    try:
        found = path.stat()
    except OSError as error:
        _refuse(path, [f"cannot be read: {error.strerror}"])
    if time.time() - found.st_mtime < SETTLED_SECONDS:
        return _read(path, name)
    return _kept(path, name, (found.st_ino, found.st_size, found.st_mtime_ns))


@functools.lru_cache(maxsize=MAX_KEPT)
def _kept(path: Path, name: str | None, _stamp: tuple[int, int, int]) -> Preset:
    """A page that lists all presets would read each file each time it is shown."""
    return _read(path, name)


def _read(path: Path, name: str | None) -> Preset:
    fields = _parse(path)
    reading = preset_values.read(fields, name=path.stem)
    if reading.look is None or reading.problems:
        _refuse(path, reading.problems)
    return Preset(
        name=name or path.stem,
        path=path,
        description=fields.get("description"),
        look=reading.look,
        keys_without_effect=tuple(reading.keys_without_effect),
    )


def _refuse(path: Path, problems: Iterable[str]) -> NoReturn:
    raise errors.PresetError(f"{_shown(str(path))}: {'; '.join(problems)}") from None


def _shown(name: str) -> str:
    """What is not UTF-8 in a file's name, as \\xff: no answer and no database takes it."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


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
        _refuse(path, [f"must hold one object {{...}}, got {looks.shown(fields)}"])
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
