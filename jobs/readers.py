"""Prompt files: JSON Lines, CSV or plain text become rows; what is wrong is told by line."""

import csv
import itertools
import json
import re
import sqlite3
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import PurePath
from typing import Any, BinaryIO, Literal, NoReturn, Self

from jobs import errors, one_line, prompt_row

Format = Literal["jsonl", "csv", "text"]

MAX_LINE_BYTES = prompt_row.MAX_IMAGE_CHARS  # a data URL may fill a line, held in memory whole
MAX_COLUMNS = 100  # every key and all metadata are 30
VIDEOS_URL = "/v1/videos"
REFERENCE = "input_reference"
BOTH_GIVEN = "and image are both given: keep one"
UPLOADED = "has a file_id, which only /v1/batches knows: give its image_url, or a path as image"


# Which format a file is.

HEAD_BYTES = 4096  # enough to tell the format of a stream without a name
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
        raise errors.invalid(name, hint)
    if suffix in _FORMAT_OF_SUFFIX:
        return _FORMAT_OF_SUFFIX[suffix]
    start = head.removeprefix(_BOM).lstrip()
    if start.startswith(b"#!"):
        problem = "is a script: give a file of prompts"
        raise errors.invalid(name, problem)
    return "jsonl" if start.startswith((b"{", b"[{", b"[\n", b"[\r")) else "text"


# Reading a whole file.


def read(
    stream: BinaryIO, *, format: Format, max_problems: int | None = None
) -> Iterator[prompt_row.PromptRow | errors.Problem]:
    """Rows and problems in the order of the file, one line in memory at a time.

    A bad line is a Problem and reading goes on. After `max_problems` of them, one more says that
    reading stopped there. A file without prompts is a Problem too.
    """
    num_rows = num_problems = 0
    for item in _items(stream, format):
        yield item
        if isinstance(item, prompt_row.PromptRow):
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
    items: Iterable[prompt_row.PromptRow | errors.Problem],
) -> Generator[prompt_row.PromptRow | errors.Problem]:
    """The same items, but a row whose custom_id an earlier row has is a Problem."""
    with DuplicateFinder() as finder:
        for item in items:
            yield finder.checked(item) if isinstance(item, prompt_row.PromptRow) else item


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

    def checked(self, row: prompt_row.PromptRow) -> prompt_row.PromptRow | errors.Problem:
        """The row, or the Problem that names both lines."""
        if row.custom_id is None:
            return row
        first = self.first_line(row.custom_id, row.line)
        if first is None:
            return row
        return errors.Problem(
            line=row.line,
            message=f"custom_id {prompt_row.shown(row.custom_id)} is already on line {first}: "
            "each must be unique",
        )


# Lines.

_Lines = Iterator[tuple[int, bytes | None]]
"""Number and bytes of each line, its end included; None for a line that is too long."""

_TOO_LONG = f"longer than {MAX_LINE_BYTES:,} bytes"


def _items(stream: BinaryIO, format: Format) -> Iterator[prompt_row.PromptRow | errors.Problem]:
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
        raise prompt_row.Invalid(_not_utf8(error)) from None


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8: byte 0x{byte:02x} at byte {error.start} of the line; save the file as UTF-8"


LONE_RETURN = "a carriage return stands alone: save with Unix or Windows line ends"


# Plain text.


def _read_text(lines: _Lines) -> Iterator[prompt_row.PromptRow | errors.Problem]:
    for number, line in lines:
        if line is not None and line.isspace():
            continue
        try:
            item: prompt_row.PromptRow | errors.Problem | None = _text_row(number, line)
        except prompt_row.Invalid as invalid:
            item = errors.Problem(line=number, message=str(invalid))
        if item is not None:
            yield item


def _text_row(number: int, line: bytes | None) -> prompt_row.PromptRow | None:
    if line is None:
        raise prompt_row.Invalid(_TOO_LONG)
    text = _decoded(line).strip()
    if one_line.is_blank(text):  # also what only Unicode knows
        return None
    if text.startswith(('{"', "{'")):
        raise prompt_row.Invalid("looks like JSON, not like a prompt: name the file .jsonl")
    if "\r" in text:
        raise prompt_row.Invalid(LONE_RETURN)
    return prompt_row.checked({"prompt": text}, number)


# JSON Lines.


def _read_jsonl(lines: _Lines) -> Iterator[prompt_row.PromptRow | errors.Problem]:
    for number, line in lines:
        if line is not None and line.isspace():
            continue
        try:
            item: prompt_row.PromptRow | errors.Problem = _jsonl_row(number, line)
        except prompt_row.Invalid as invalid:
            item = errors.Problem(line=number, message=str(invalid))
        yield item


def _jsonl_row(number: int, line: bytes | None) -> prompt_row.PromptRow:
    if line is None:
        raise prompt_row.Invalid(
            f"{_TOO_LONG}: name a large image by its address, or upload it and name that"
        )
    fields = json_value(_decoded(line))
    if type(fields) is not dict:
        raise prompt_row.Invalid(
            f'must be an object such as {{"prompt": "..."}}, got {prompt_row.shown(fields)}'
        )
    if "body" in fields:
        fields = _unwrapped(fields)
    return prompt_row.checked(fields, number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key, count in counts.items() if count > 1)
        raise prompt_row.Invalid(f"key {prompt_row.shown(twice)} is given twice: keep one")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise prompt_row.Invalid(f"{name} is not a number that JSON has")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)


def json_value(text: str) -> Any:
    """Raises prompt_row.Invalid, also for a key that is given twice."""
    try:
        return _DECODER.decode(text)
    except prompt_row.Invalid:
        raise
    except json.JSONDecodeError as error:
        column = min(error.pos, len(text.rstrip())) + 1
        what = f"{error.msg[:1].lower()}{error.msg[1:]} at column {column}"
        raise prompt_row.Invalid(
            f'not JSON: {what}; a line must be one object such as {{"prompt": "..."}}'
        ) from None
    except RecursionError:
        raise prompt_row.Invalid("nested too deeply: no key needs more than three levels") from None
    except ValueError:  # Python refuses to convert thousands of digits
        raise prompt_row.Invalid("holds a number with thousands of digits") from None


def _unwrapped(envelope: dict[str, Any]) -> dict[str, Any]:
    """A row from a line of an OpenAI batch file: the keys of its body, and its custom_id."""
    wrong = [
        f"{key} must be {prompt_row.shown(wanted)}, got {prompt_row.shown(envelope.get(key))}"
        for key, wanted in (("method", "POST"), ("url", VIDEOS_URL))
        if envelope.get(key) != wanted
    ]
    body = envelope["body"]
    if type(body) is not dict:
        raise prompt_row.Invalid(
            "; ".join([*wrong, f"body must be an object, got {prompt_row.shown(body)}"])
        )
    if "custom_id" in body:
        wrong.append("custom_id belongs beside body, not into it")
    if not isinstance(body.get("model"), str | None):
        wrong.append(f"model must be a text, got {prompt_row.shown(body['model'])}")
    first_frame = {}
    if body.get(REFERENCE) is not None:
        try:
            kind, value = referred(body[REFERENCE])
            first_frame = {"image": value}
            if kind == "file_id":  # the service, which knows them, has put an image in its place
                wrong.append(f"{REFERENCE} {UPLOADED}")
        except prompt_row.Invalid as invalid:
            wrong.append(f"{REFERENCE} {invalid}")
        if body.get("image") is not None:
            wrong.append(f"{REFERENCE} {BOTH_GIVEN}")
    beside = [key for key in envelope if key not in ("custom_id", "method", "url", "body")]
    wrong += [f"key {prompt_row.shown(key)} does not belong beside body" for key in beside[:3]]
    if wrong:
        raise prompt_row.Invalid("; ".join(wrong))
    left_out = ("model", REFERENCE)  # the preset decides the first
    fields = {key: value for key, value in body.items() if key not in left_out} | first_frame
    if isinstance(fields.get("seconds"), str):
        fields["seconds"] = prompt_row.number(fields["seconds"])
    return {"custom_id": envelope.get("custom_id"), **fields}


def referred(reference: Any) -> tuple[str, str]:
    """What OpenAI's `input_reference` names, `file_id` or `image_url`, and its value.

    Raises prompt_row.Invalid.
    """
    if type(reference) is dict and len(reference) == 1:
        ((kind, value),) = reference.items()
        if kind in ("file_id", "image_url") and type(value) is str:
            return kind, value
    raise prompt_row.Invalid(
        f"must be an object with file_id or image_url only, got {prompt_row.shown(reference)}"
    )


# CSV.

_METADATA_PREFIX = "metadata."
_CSV_ERRORS = {
    "unexpected end of data": "a quote is opened and never closed",
    "expected after": 'a quote inside a quoted cell must be doubled: ""',
    "new-line character": LONE_RETURN,
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
            raise prompt_row.Invalid(_TOO_LONG)
        self.record_bytes += len(line)
        if self.record_bytes > MAX_LINE_BYTES:
            raise prompt_row.Invalid(f"a row {_TOO_LONG}: is a quote opened and never closed?")
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


def _read_csv(lines: _Lines) -> Iterator[prompt_row.PromptRow | errors.Problem]:
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
    csv.field_size_limit(MAX_LINE_BYTES)  # of all readers; `feed` ends a record there
    reader = csv.reader(feed, strict=True)
    while True:
        start = feed.begin_record()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except (csv.Error, prompt_row.Invalid) as error:
            yield _csv_problem(str(error), start, feed.number)
            continue
        if feed.undecodable:
            yield feed.undecodable
        elif not all(map(one_line.is_blank, cells)):
            yield start, cells


def _csv_problem(error: str, start: int, end: int) -> errors.Problem:
    message = next((ours for theirs, ours in _CSV_ERRORS.items() if theirs in error), error)
    skipped = f" (lines {start} to {end} are skipped)" if end > start else ""
    return errors.Problem(line=start, message=message + skipped)


def _wrong_header(names: list[str]) -> list[str]:
    columns = [name.strip() for name in names]
    if len(columns) == 1 and columns[0] not in prompt_row.KEYS and re.search(r"[;\t|]", columns[0]):
        return [f"columns must be separated by commas, got {prompt_row.shown(columns[0])}"]
    if len(columns) > MAX_COLUMNS:
        return [f"has {len(columns)} columns: at most {MAX_COLUMNS} would do"]
    wrong = [
        prompt_row.unknown(name, "column") if name else "a column has no name"
        for name in columns
        if name == "metadata" or (name not in prompt_row.KEYS and not _is_metadata(name))
    ]
    wrong += [
        f"column {prompt_row.shown(name)} is given twice"
        for name, count in Counter(columns).items()
        if name and count > 1
    ]
    if "prompt" not in columns:
        wrong.append(
            f"a column named prompt is missing, got {prompt_row.shown(', '.join(columns))}"
        )
    return wrong


def _is_metadata(name: str) -> bool:
    return name.startswith(_METADATA_PREFIX) and name != _METADATA_PREFIX


def _csv_item(
    line: int, cells: list[str], columns: list[str]
) -> prompt_row.PromptRow | errors.Problem:
    try:
        if len(cells) != len(columns):
            raise prompt_row.Invalid(
                f"has {len(cells)} cells but the header has {len(columns)}: "
                "put a cell that holds a comma in quotes"
            )
        return prompt_row.checked(_csv_fields(cells, columns), line)
    except prompt_row.Invalid as invalid:
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
            fields[name] = typed(name, cell)
    if metadata:
        fields["metadata"] = metadata
    return fields


def typed(name: str, text: str) -> Any:
    """The value of a CSV cell, or of a form's field, as JSON would have it."""
    convert = _CELLS.get(name)
    return text if convert is None else convert(text)


def _lora_cell(text: str) -> Any:
    """A list as in JSON Lines, or the name of one LoRA."""
    return _json_cell(text) if text.lstrip().startswith("[") else [{"name": text.strip()}]


def _json_cell(text: str) -> Any:
    """What is no JSON stays a text, of which the check of its key tells."""
    try:
        return json_value(text)
    except prompt_row.Invalid:
        return text


_CELLS: dict[str, Callable[[str], Any]] = {
    "seed": prompt_row.number,
    "width": prompt_row.number,
    "height": prompt_row.number,
    "num_frames": prompt_row.number,
    "seconds": prompt_row.number,
    "fps": prompt_row.number,
    "priority": prompt_row.number,
    "size": str.strip,
    "lora": _lora_cell,
    "metadata": _json_cell,  # of forms: a CSV has a column per pair
}


_READERS: dict[Format, Callable[[_Lines], Iterator[prompt_row.PromptRow | errors.Problem]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "text": _read_text,
}
