"""Prompt files: JSON Lines, CSV or plain text become rows; what is wrong is told by line."""

import csv
import difflib
import functools
import itertools
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, BinaryIO, Literal, NoReturn, Self

from jobs import errors

Format = Literal["jsonl", "csv", "text"]

MAX_LINE_BYTES = 1_048_576  # a line is held in memory whole; the longest prompt needs 60 kB
MAX_PROMPT_CHARS = 10_000  # the text encoder reads the first 512 tokens
MAX_CUSTOM_ID_CHARS = 512
MAX_IMAGE_CHARS = MAX_LINE_BYTES  # a data URL may fill the line
MAX_LORAS = 8
MAX_METADATA_PAIRS = 16
MAX_METADATA_KEY_CHARS = 64
MAX_METADATA_VALUE_CHARS = 512
MAX_SEED = 2**63 - 1  # the widest signed integer of both databases
MAX_SECONDS = 3_600
MAX_SIDE_OR_COUNT = 100_000  # keeps numbers sane here; the preset decides what fits
MAX_PRIORITY = 100
MAX_COLUMNS = 100  # every key and all metadata are 30
MAX_SHOWN = 5  # faults told of one row: a line may hold a hundred thousand
VIDEOS_URL = "/v1/videos"


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


class _Invalid(ValueError):
    """What is wrong with one record; becomes the Problem of its line."""


# Which format a file is.

_FORMAT_OF_SUFFIX: dict[str, Format] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".txt": "text",
    ".text": "text",
}
_UNREADABLE_SUFFIXES = {
    ".gz": "unpack it first",
    ".zip": "unpack it first",
    ".zst": "unpack it first",
    ".parquet": "export it as .jsonl or .csv",
    ".tsv": "export it as .csv, with commas",
    ".xls": "export it as .csv",
    ".xlsx": "export it as .csv",
    ".yaml": "write it as .jsonl",
    ".yml": "write it as .jsonl",
}
_BOM = b"\xef\xbb\xbf"
_OTHER_MAGIC = {
    b"\xff\xfe": "is UTF-16: save it as UTF-8",
    b"\xfe\xff": "is UTF-16: save it as UTF-8",
    b"PK\x03\x04": "is a zip or Excel file: export it as .csv or unpack it",
    b"\x1f\x8b": "is gzip-compressed: unpack it first",
}


def detect_format(name: str, head: bytes) -> Format:
    """By the name's suffix, else by how the content begins: `{` is JSON Lines, else text.

    InvalidInput for a kind of file that would otherwise be rendered as if it were prompts.
    """
    suffix = PurePath(name).suffix.lower()
    if suffix in _UNREADABLE_SUFFIXES:
        hint = f"{suffix} files are not read: {_UNREADABLE_SUFFIXES[suffix]}"
        raise errors.InvalidInput(name, [errors.Problem(line=None, message=hint)])
    if suffix in _FORMAT_OF_SUFFIX:
        return _FORMAT_OF_SUFFIX[suffix]
    start = head.removeprefix(_BOM).lstrip()
    if start.startswith(b"#!"):
        problem = "is a script: give a file of prompts"
        raise errors.InvalidInput(name, [errors.Problem(line=None, message=problem)])
    return "jsonl" if start.startswith((b"{", b"[{", b"[\n", b"[\r")) else "text"


# Reading a whole file.


def read(
    stream: BinaryIO, *, format: Format, max_problems: int | None = None
) -> Iterator[PromptRow | errors.Problem]:
    """Rows and problems in the order of the file, one line in memory at a time.

    A bad line is a Problem and reading goes on. After `max_problems` of them, one more says that
    reading stopped there. A file without prompts is a Problem too.
    """
    num_rows = num_problems = 0
    for item in _items(stream, format):
        yield item
        if isinstance(item, PromptRow):
            num_rows += 1
            continue
        num_problems += 1
        if num_problems == max_problems:
            yield errors.Problem(
                line=None, message=f"reading stopped after {num_problems} problems: fix these first"
            )
            return
    if not num_rows and not num_problems:
        yield errors.Problem(line=None, message="no prompts: the file is empty or blank")


def without_duplicates(
    items: Iterable[PromptRow | errors.Problem],
) -> Generator[PromptRow | errors.Problem]:
    """The same items, but a row whose custom_id an earlier row has is a Problem."""
    with DuplicateFinder() as finder:
        for item in items:
            yield finder.checked(item) if isinstance(item, PromptRow) else item


class DuplicateFinder:
    """Remembers on disk which line had which custom_id: a million rows need no memory."""

    def __init__(self) -> None:
        # An empty name is a temporary file. A web server may go on with it in another thread.
        self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
        self._database.executescript(
            # The file is thrown away at close: nothing in it is worth a journal or a sync.
            "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; PRAGMA cache_size = -16384;"
            "CREATE TABLE seen (custom_id TEXT PRIMARY KEY, line INTEGER) WITHOUT ROWID; BEGIN"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._database.close()

    def first_line(self, custom_id: str, line: int) -> int | None:
        """The earlier line with this custom_id; None, and remembered, for the first of them."""
        added = self._database.execute(
            "INSERT OR IGNORE INTO seen VALUES (?, ?)", (custom_id, line)
        )
        if added.rowcount:
            return None
        found = self._database.execute("SELECT line FROM seen WHERE custom_id = ?", (custom_id,))
        return int(found.fetchone()[0])

    def checked(self, row: PromptRow) -> PromptRow | errors.Problem:
        """The row, or the Problem that names both lines."""
        if row.custom_id is None:
            return row
        first = self.first_line(row.custom_id, row.line)
        if first is None:
            return row
        shown = _shown(row.custom_id)
        return errors.Problem(
            line=row.line,
            message=f"custom_id {shown} is already on line {first}: each must be unique",
        )


# Lines.

_Lines = Iterator[tuple[int, bytes | None]]
"""Number and bytes of each line, its end included; None for a line that is too long."""

_TOO_LONG = f"longer than {MAX_LINE_BYTES:,} bytes"


def _items(stream: BinaryIO, format: Format) -> Iterator[PromptRow | errors.Problem]:
    lines = _numbered_lines(stream)
    first = next(lines, None)
    if first is None:
        return
    if problem := _not_a_prompt_file(first[1] or b"", format):
        yield errors.Problem(line=None, message=problem)
        return
    yield from _READERS[format](itertools.chain([first], lines))


def _numbered_lines(stream: BinaryIO) -> _Lines:
    for number in itertools.count(1):
        line = stream.readline(MAX_LINE_BYTES + 2)  # room for \r\n
        if not line:
            return
        if number == 1:
            line = line.removeprefix(_BOM) or b"\n"
        if len(line) > MAX_LINE_BYTES and len(line.rstrip(b"\r\n")) > MAX_LINE_BYTES:
            _skip_rest_of_line(stream, line)
            yield number, None
        else:
            yield number, line


def _skip_rest_of_line(stream: BinaryIO, line: bytes) -> None:
    while line and not line.endswith(b"\n"):
        line = stream.readline(MAX_LINE_BYTES)


def _not_a_prompt_file(first_line: bytes, format: Format) -> str | None:
    """Why no line of this file can be read, where the first line tells."""
    for magic, problem in _OTHER_MAGIC.items():
        if first_line.startswith(magic):
            return problem
    start = first_line.strip()
    if format == "jsonl" and (start in (b"[", b"{") or start.startswith(b"[{")):
        return (
            "is one JSON document over many lines: write one object per line "
            "(for an array: jq -c '.[]' prompts.json > prompts.jsonl)"
        )
    return None


def _decoded(line: bytes) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise _Invalid(_not_utf8(error)) from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8: byte 0x{byte:02x} at byte {error.start} of the line; save the file as UTF-8"


# Plain text.


def _read_text(lines: _Lines) -> Iterator[PromptRow | errors.Problem]:
    for number, line in lines:
        if line is not None and line.isspace():
            continue
        try:
            item: PromptRow | errors.Problem | None = _text_row(number, line)
        except _Invalid as invalid:
            item = errors.Problem(line=number, message=str(invalid))
        if item is not None:
            yield item


def _text_row(number: int, line: bytes | None) -> PromptRow | None:
    if line is None:
        raise _Invalid(_TOO_LONG)
    text = _decoded(line).strip()
    if not text:  # blanks that only Unicode knows
        return None
    if text.startswith(('{"', "{'")):
        raise _Invalid("looks like JSON, not like a prompt: name the file .jsonl")
    return _row({"prompt": text}, number)


# JSON Lines.


def _read_jsonl(lines: _Lines) -> Iterator[PromptRow | errors.Problem]:
    for number, line in lines:
        if line is not None and line.isspace():
            continue
        try:
            item: PromptRow | errors.Problem = _jsonl_row(number, line)
        except _Invalid as invalid:
            item = errors.Problem(line=number, message=str(invalid))
        yield item


def _jsonl_row(number: int, line: bytes | None) -> PromptRow:
    if line is None:
        raise _Invalid(_TOO_LONG)
    fields = _json_value(_decoded(line))
    if type(fields) is not dict:
        raise _Invalid(f'must be an object such as {{"prompt": "..."}}, got {_shown(fields)}')
    if "body" in fields:
        fields = _unwrapped(fields)
    return _row(fields, number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise _Invalid(f"key {_shown(twice)} is given twice: keep one")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise _Invalid(f"{name} is not a number that JSON has")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def _json_value(text: str) -> Any:
    try:
        return _DECODER.decode(text)
    except _Invalid:
        raise
    except json.JSONDecodeError as error:
        column = min(error.pos, len(text.rstrip())) + 1
        what = f"{error.msg[:1].lower()}{error.msg[1:]} at column {column}"
        raise _Invalid(
            f'not JSON: {what}; a line must be one object such as {{"prompt": "..."}}'
        ) from None
    except RecursionError:
        raise _Invalid("nested too deeply: no key needs more than three levels") from None
    except ValueError:  # Python refuses to convert thousands of digits
        raise _Invalid("holds a number with thousands of digits") from None


def _unwrapped(envelope: dict[str, Any]) -> dict[str, Any]:
    """A row from a line of an OpenAI batch file: the keys of its body, and its custom_id."""
    wrong = [
        f"{key} must be {_shown(wanted)}, got {_shown(envelope.get(key))}"
        for key, wanted in (("method", "POST"), ("url", VIDEOS_URL))
        if envelope.get(key) != wanted
    ]
    body = envelope["body"]
    if type(body) is not dict:
        raise _Invalid("; ".join([*wrong, f"body must be an object, got {_shown(body)}"]))
    if "custom_id" in body:
        wrong.append("custom_id belongs beside body, not into it")
    beside = [key for key in envelope if key not in ("custom_id", "method", "url", "body")]
    wrong += [f"key {_shown(key)} does not belong beside body" for key in beside[:3]]
    if wrong:
        raise _Invalid("; ".join(wrong))
    fields = {key: value for key, value in body.items() if key != "model"}  # the preset decides
    if isinstance(fields.get("seconds"), str):
        fields["seconds"] = _number(fields["seconds"])
    return {"custom_id": envelope.get("custom_id"), **fields}


# CSV.

_METADATA_PREFIX = "metadata."
_CSV_ERRORS = {
    "unexpected end of data": "a quote is opened and never closed",
    "expected after": 'a quote inside a quoted cell must be doubled: ""',
    "field larger than": f"a cell is longer than {csv.field_size_limit():,} characters: "
    "is a quote opened and never closed?",
    "new-line character": "a carriage return stands alone: save with Unix or Windows line ends",
}


class _CsvLines:
    """What csv.reader reads from; knows how far it is and what it could not decode."""

    def __init__(self, lines: _Lines) -> None:
        self._lines = lines
        self.number = 0
        self.record_bytes = 0
        self.undecodable: errors.Problem | None = None

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        self.number, line = next(self._lines)
        if line is None:
            raise _Invalid(_TOO_LONG)
        self.record_bytes += len(line)
        if self.record_bytes > MAX_LINE_BYTES:
            raise _Invalid(f"a row {_TOO_LONG}: is a quote opened and never closed?")
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            self.undecodable = errors.Problem(line=self.number, message=_not_utf8(error))
            # The rest of the record is still found: the bad bytes are kept out of its structure.
            return line.decode(errors="replace")

    def begin_record(self) -> int:
        """The number of the line on which the next record starts."""
        self.record_bytes = 0
        self.undecodable = None
        return self.number + 1


def _read_csv(lines: _Lines) -> Iterator[PromptRow | errors.Problem]:
    records = _csv_records(lines)
    header = next((record for record in records), None)
    if header is None:
        return
    line, names = header if isinstance(header, tuple) else (header.line or 1, [])
    wrong = [header.message] if isinstance(header, errors.Problem) else _wrong_header(names)
    if wrong:
        yield from (errors.Problem(line=line, message=f"header: {message}") for message in wrong)
        return
    columns = [name.strip() for name in names]
    for record in records:
        yield record if isinstance(record, errors.Problem) else _csv_item(*record, columns)


def _csv_records(lines: _Lines) -> Iterator[tuple[int, list[str]] | errors.Problem]:
    """Each record that is not blank, with the line on which it starts."""
    feed = _CsvLines(lines)
    reader = csv.reader(feed, strict=True)
    while True:
        start = feed.begin_record()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, _Invalid) as error:
            yield _csv_problem(str(error), start, feed.number)
            continue
        if feed.undecodable:
            yield feed.undecodable
        elif any(cell.strip() for cell in cells):
            yield start, cells


def _csv_problem(error: str, start: int, end: int) -> errors.Problem:
    message = next((ours for theirs, ours in _CSV_ERRORS.items() if theirs in error), error)
    skipped = f" (lines {start} to {end} are skipped)" if end > start else ""
    return errors.Problem(line=start, message=message + skipped)


def _wrong_header(names: list[str]) -> list[str]:
    columns = [name.strip() for name in names]
    if len(columns) == 1 and columns[0] not in _CHECKS and re.search(r"[;\t|]", columns[0]):
        return [f"columns must be separated by commas, got {_shown(columns[0])}"]
    if len(columns) > MAX_COLUMNS:
        return [f"has {len(columns)} columns: at most {MAX_COLUMNS} would do"]
    wrong = [
        _unknown(name, "column") if name else "a column has no name"
        for name in columns
        if name == "metadata" or (name not in _CHECKS and not _is_metadata(name))
    ]
    wrong += [
        f"column {_shown(name)} is given twice"
        for name, count in Counter(columns).items()
        if name and count > 1
    ]
    if "prompt" not in columns:
        wrong.append(f"a column named prompt is missing, got {_shown(', '.join(columns))}")
    return wrong


def _is_metadata(name: str) -> bool:
    return name.startswith(_METADATA_PREFIX) and name != _METADATA_PREFIX


def _csv_item(line: int, cells: list[str], columns: list[str]) -> PromptRow | errors.Problem:
    try:
        if len(cells) != len(columns):
            raise _Invalid(
                f"has {len(cells)} cells but the header has {len(columns)}: "
                "put a cell that holds a comma in quotes"
            )
        return _row(_csv_fields(cells, columns), line)
    except _Invalid as invalid:
        return errors.Problem(line=line, message=str(invalid))


def _csv_fields(cells: list[str], columns: list[str]) -> dict[str, Any]:
    """Typed as JSON would have them; an empty cell is a key that is not given."""
    fields: dict[str, Any] = {}
    metadata: dict[str, str] = {}
    for name, cell in zip(columns, cells, strict=True):
        if name == "prompt":
            fields[name] = cell
        elif not cell:
            continue
        elif name.startswith(_METADATA_PREFIX):
            metadata[name.removeprefix(_METADATA_PREFIX)] = cell
        else:
            convert = _CELLS.get(name)
            fields[name] = cell if convert is None else convert(cell)
    if metadata:
        fields["metadata"] = metadata
    return fields


def _number(text: str) -> Any:
    """The number that the text is, else the text: the check of its key then says what is wrong."""
    text = text.strip()
    if re.fullmatch(r"[+-]?[0-9]{1,20}", text):
        return int(text)
    return float(text) if re.fullmatch(r"[+-]?[0-9]{1,20}\.[0-9]{1,20}", text) else text


def _lora_cell(text: str) -> Any:
    """A list as in JSON Lines, or the name of one LoRA."""
    if not text.lstrip().startswith("["):
        return [{"name": text.strip()}]
    try:
        return _json_value(text)
    except _Invalid:
        return text


_CELLS: dict[str, Callable[[str], Any]] = {
    "seed": _number,
    "width": _number,
    "height": _number,
    "num_frames": _number,
    "seconds": _number,
    "fps": _number,
    "priority": _number,
    "size": str.strip,
    "lora": _lora_cell,
}


# One row. A check returns the value or raises _Invalid("must ..."); the key is put in front.


def _row(fields: dict[str, Any], line: int) -> PromptRow:
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for key, value in fields.items():
        check = _CHECKS.get(key)
        if len(wrong) == MAX_SHOWN:
            break
        if check is None:
            wrong.append(_unknown(key, "key"))
        elif value is not None:
            try:
                values[key] = check(value)
            except _Invalid as invalid:
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
        raise _Invalid("; ".join(wrong))
    return PromptRow(line=line, **values)


def _shown(value: object) -> str:
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
        raise _Invalid("holds a NUL character: remove it")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise _Invalid(
                "holds half of a surrogate pair, which is no character: remove it"
            ) from None


def _text_check(max_chars: int) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if type(value) is not str:
            raise _Invalid(f"must be a text, got {_shown(value)}")
        if not value or value.isspace():
            raise _Invalid("is empty: write some text")
        if len(value) > max_chars:
            raise _Invalid(f"has {len(value):,} characters: at most {max_chars:,} would do")
        _refuse_unstorable(value)
        return value

    return check


def _whole_check(low: int, high: int) -> Callable[[Any], int]:
    def check(value: Any) -> int:
        if type(value) is int and low <= value <= high:
            return value
        quoted = isinstance(value, str) and type(_number(value)) is int
        hint = f": write {_shortened(value.strip())} without quotes" if quoted else ""
        raise _Invalid(f"must be a whole number from {low} to {high}, got {_shown(value)}{hint}")

    return check


_check_id_text = _text_check(MAX_CUSTOM_ID_CHARS)
_check_optional_text = _text_check(MAX_PROMPT_CHARS)


def _check_custom_id(value: Any) -> str:
    if type(value) is int:
        raise _Invalid(f'must be a text, got {_shown(value)}: write "{_shown(value)}"')
    text = _check_id_text(value)
    if not text.isprintable():
        raise _Invalid(f"must be printable, got {_shown(text)}: remove control characters")
    return text


def _check_negative_prompt(value: Any) -> str:
    return "" if value == "" else _check_optional_text(value)


def _check_size(value: Any) -> tuple[int, int]:
    match = re.fullmatch(r"([0-9]{1,5})x([0-9]{1,5})", value) if isinstance(value, str) else None
    if match is None or not int(match[1]) or not int(match[2]):
        raise _Invalid(f'must be width x height such as "832x480", got {_shown(value)}')
    return int(match[1]), int(match[2])


def _check_seconds(value: Any) -> float:
    if type(value) not in (int, float) or not 0 < value <= MAX_SECONDS:
        raise _Invalid(
            f"must be a number above 0, up to {MAX_SECONDS}, such as 5, got {_shown(value)}"
        )
    return float(value)


def _check_metadata(value: Any) -> dict[str, str]:
    if type(value) is not dict:
        raise _Invalid(f'must be an object such as {{"scene": "12"}}, got {_shown(value)}')
    if len(value) > MAX_METADATA_PAIRS:
        raise _Invalid(f"has {len(value)} pairs: at most {MAX_METADATA_PAIRS} would do")
    for key, text in value.items():
        if not key or len(key) > MAX_METADATA_KEY_CHARS:
            raise _Invalid(f"key {_shown(key)} must have 1 to {MAX_METADATA_KEY_CHARS} characters")
        if type(text) is not str or len(text) > MAX_METADATA_VALUE_CHARS:
            raise _Invalid(
                f"value of {_shown(key)} must be a text of at most {MAX_METADATA_VALUE_CHARS} "
                f"characters, got {_shown(text)}"
            )
        _refuse_unstorable(key)
        _refuse_unstorable(text)
    return value


def _check_lora(value: Any) -> tuple[Lora, ...]:
    if type(value) is not list or not 1 <= len(value) <= MAX_LORAS:
        raise _Invalid(
            f'must be a list of 1 to {MAX_LORAS} objects such as [{{"name": "film", '
            f'"strength": 0.8}}], got {_shown(value)}'
        )
    return tuple(_check_one_lora(entry) for entry in value)


def _check_one_lora(entry: Any) -> Lora:
    if type(entry) is not dict or not entry.keys() <= {"name", "path", "strength"}:
        raise _Invalid(f"entries must have name or path, and strength, only; got {_shown(entry)}")
    if ("name" in entry) == ("path" in entry):
        raise _Invalid("entries must have either a name or a path")
    strength = entry.get("strength", 1.0)
    if type(strength) not in (int, float) or not -10 <= strength <= 10:
        raise _Invalid(f"strength must be a number from -10 to 10, got {_shown(strength)}")
    where = {key: _check_image(entry[key]) for key in ("name", "path") if key in entry}
    return Lora(**where, strength=float(strength))


_check_image = _text_check(MAX_IMAGE_CHARS)
_check_count = _whole_check(1, MAX_SIDE_OR_COUNT)

_CHECKS: dict[str, Callable[[Any], Any]] = {
    "custom_id": _check_custom_id,
    "prompt": _text_check(MAX_PROMPT_CHARS),
    "negative_prompt": _check_negative_prompt,
    "seed": _whole_check(0, MAX_SEED),
    "size": _check_size,
    "width": _check_count,
    "height": _check_count,
    "num_frames": _check_count,
    "seconds": _check_seconds,
    "fps": _check_count,
    "image": _check_image,
    "lora": _check_lora,
    "metadata": _check_metadata,
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
def _unknown(name: str, kind: str) -> str:
    if name in _PRESET_DECIDES:
        return f"{kind} {_shown(name)} is not for rows: the preset decides it, remove it"
    close = difflib.get_close_matches(name[:64], KEYS, n=1)
    meant = _MEANT.get(name) or (close[0] if close else None)
    hint = f"did you mean {meant}?" if meant else f"use {', '.join(_CHECKS)}"
    return f"unknown {kind} {_shown(name)}: {hint}"


_READERS: dict[Format, Callable[[_Lines], Iterator[PromptRow | errors.Problem]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "text": _read_text,
}
