"""Prompt files become rows, and what is wrong with them is told by line."""

import csv
import dataclasses
import io
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from jobs import errors, looks, one_line, prompt_row, readers

ROOT = Path(__file__).resolve().parents[3]
FORMATS: tuple[readers.Format, ...] = ("jsonl", "csv", "text")


def read_all(content: bytes | str, format: readers.Format = "jsonl", **options: Any) -> list[Any]:
    data = content.encode() if isinstance(content, str) else content
    return list(readers.read(io.BytesIO(data), format=format, **options))


def rows_of(content: bytes | str, format: readers.Format = "jsonl") -> list[prompt_row.PromptRow]:
    items = read_all(content, format)
    assert all(isinstance(item, prompt_row.PromptRow) for item in items), items
    return items


def only_problem(content: bytes | str, format: readers.Format = "jsonl") -> errors.Problem:
    (problem,) = read_all(content, format)
    assert isinstance(problem, errors.Problem), problem
    return problem


def row(**fields: Any) -> prompt_row.PromptRow:
    (found,) = rows_of(json.dumps({"prompt": "a cat"} | fields))
    return found


def fault(**fields: Any) -> str:
    return only_problem(json.dumps({"prompt": "a cat"} | fields)).message


class TestDetectFormat:
    @pytest.mark.parametrize(
        ("name", "format"),
        [
            ("a.jsonl", "jsonl"),
            ("A.NDJSON", "jsonl"),
            ("x/a.json", "jsonl"),
            ("a.csv", "csv"),
            ("a.b.TXT", "text"),
        ],
    )
    def test_the_suffix_decides_whatever_the_content(self, name, format):
        assert readers.detect_format(name, b"{") == format

    @pytest.mark.parametrize(
        ("head", "format"),
        [
            (b'{"prompt": "a"}', "jsonl"),
            (b'\xef\xbb\xbf\r\n  {"prompt"', "jsonl"),
            (b'[{"prompt"', "jsonl"),
            (b"a cat walks", "text"),
            (b"[wide shot] a cat", "text"),
            (b"", "text"),
        ],
    )
    def test_what_has_no_suffix_is_told_by_its_beginning(self, head, format):
        assert readers.detect_format("-", head) == format

    @pytest.mark.parametrize("name", ["a.tsv", "a.xlsx", "prompts.jsonl.gz"])
    def test_a_file_that_would_be_rendered_as_garbage_is_refused(self, name):
        with pytest.raises(errors.InvalidInput, match=r"export it as \.csv|unpack it"):
            readers.detect_format(name, b"")


class TestJsonLines:
    def test_every_key_arrives(self):
        assert row(
            custom_id="a-1",
            negative_prompt="blur",
            seed=7,
            size="832x480",
            seconds=5,
            fps=16,
            image="s3://bucket/cat.png",
            lora=[{"name": "film"}, {"path": "a.safetensors", "strength": 0.5}],
            metadata={"scene": "12"},
            priority=-3,
        ) == prompt_row.PromptRow(
            line=1,
            prompt="a cat",
            custom_id="a-1",
            negative_prompt="blur",
            seed=7,
            width=832,
            height=480,
            seconds=5.0,
            fps=16,
            image="s3://bucket/cat.png",
            lora=(
                prompt_row.Lora(name="film"),
                prompt_row.Lora(path="a.safetensors", strength=0.5),
            ),
            metadata={"scene": "12"},
            priority=-3,
        )

    def test_width_height_and_num_frames_are_taken_as_they_are(self):
        found = row(width=830, height=1, num_frames=80)
        assert (found.width, found.height, found.num_frames) == (830, 1, 80)

    def test_null_is_a_key_that_is_not_given(self):
        assert row(seed=None, custom_id=None, lora=None) == row()

    def test_a_null_prompt_is_missing(self):
        assert fault(prompt=None) == "prompt is missing"

    def test_bom_crlf_and_blank_lines_are_tolerated_and_counted(self):
        content = b'\xef\xbb\xbf\r\n{"prompt": "a"}\r\n \t\r\n{"prompt": "b"}'
        assert [(r.line, r.prompt) for r in rows_of(content)] == [(2, "a"), (4, "b")]

    def test_a_file_of_a_bom_only_has_no_prompts(self):
        assert only_problem(b"\xef\xbb\xbf").line is None

    @pytest.mark.parametrize(("format", "head"), [("text", ""), ("csv", "prompt,seed\n")])
    def test_a_line_on_which_nothing_can_be_seen_is_blank(self, format, head):
        seed = "" if format == "text" else ","
        content = f"{head}\u200b \ufeff{seed}\na cat{seed}\n"
        assert [row.prompt for row in rows_of(content, format)] == ["a cat"]

    def test_a_prompt_in_any_script_arrives_as_written(self):
        assert row(prompt="кот \U0001f408 猫\n  runs ").prompt == "кот \U0001f408 猫\n  runs "

    @pytest.mark.parametrize("format", FORMATS)
    @pytest.mark.parametrize("content", [b"", b"\n", b" \r\n\t\n", b"\xef\xbb\xbf\n"])
    def test_an_empty_file_is_a_problem_of_the_whole_file(self, format, content):
        problem = only_problem(content, format)
        assert problem.line is None
        assert "no prompts" in problem.message

    def test_a_bad_line_does_not_stop_the_others(self):
        items = read_all('{"prompt": "a"}\nnonsense\n{"prompt": "c"}\n')
        assert [item.line for item in items] == [1, 2, 3]
        assert [isinstance(item, errors.Problem) for item in items] == [False, True, False]

    def test_all_faults_of_a_line_are_told_at_once(self):
        message = fault(seed=-1, fps="x", sed=3)
        assert "seed must" in message
        assert "fps must" in message
        assert 'unknown key "sed": did you mean seed?' in message

    @pytest.mark.parametrize(
        ("key", "meant"),
        [
            ("id", "custom_id"),
            ("recordId", "custom_id"),
            ("custom-id", "custom_id"),
            ("Prompt", "prompt"),
            ("negativ_prompt", "negative_prompt"),
            ("frames", "num_frames"),
            ("input_reference", "image"),
        ],
    )
    def test_an_unknown_key_is_refused_with_the_one_that_was_meant(self, key, meant):
        assert fault(**{key: "x"}) == f'unknown key "{key}": did you mean {meant}?'

    def test_an_unknown_key_like_no_other_gets_the_list(self):
        assert "use custom_id, prompt" in fault(zzzzzz=1)

    @pytest.mark.parametrize("key", ["model", "infer_steps"])
    def test_what_the_preset_decides_is_not_for_rows(self, key):
        assert "the preset decides" in fault(**{key: "x"})

    @pytest.mark.parametrize(
        ("fields", "part"),
        [
            ({"prompt": ""}, "prompt is empty"),
            ({"prompt": " \u3000\n"}, "prompt is empty"),
            ({"prompt": "\u200b\u2060"}, "prompt has no character that can be seen: write some"),
            ({"custom_id": "\u200b"}, "custom_id has no character that can be seen"),
            ({"prompt": 5}, "prompt must be a text, got 5"),
            ({"prompt": "x" * 10_001}, "prompt has 10,001 characters: at most 10,000"),
            ({"prompt": "a\0b"}, "prompt holds a NUL"),
            ({"prompt": "a\ud800"}, "prompt holds half of a surrogate pair"),
            ({"negative_prompt": "a\udfff"}, "negative_prompt holds half"),
            ({"custom_id": ""}, "custom_id is empty"),
            ({"custom_id": "a\tb"}, "custom_id must be on one line, got \"a\\tb\": remove '\\t'"),
            ({"custom_id": "a\u202eb"}, "custom_id must be on one line"),
            ({"custom_id": "x" * 513}, "custom_id has 513 characters"),
            ({"custom_id": 12}, 'custom_id must be a text, got 12: write "12"'),
            ({"seed": True}, "seed must be a whole number from 0 to 9223372036854775807, got true"),
            ({"seed": 1.0}, "seed must be a whole number"),
            ({"seed": "12"}, 'got "12": write 12 without quotes'),
            ({"seed": -1}, "got -1"),
            ({"seed": 2**63}, "got 9223372036854775808"),
            ({"priority": 101}, "priority must be a whole number from -100 to 100, got 101"),
            ({"fps": 0}, "fps must be a whole number above 0, got 0"),
            ({"width": -16}, "width must be a whole number above 0, got -16"),
            ({"fps": None, "height": "480"}, 'above 0, got "480": write 480 without quotes'),
            ({"num_frames": 100_001}, "num_frames is 100001, more than any preset takes"),
            ({"num_frames": 10**4000}, "more than any preset takes"),
            ({"size": "832*480"}, 'size must be width x height such as "832x480"'),
            ({"size": "0x480"}, "size must be"),
            ({"size": [832, 480]}, "size must be width x height"),
            ({"size": "832x480", "width": 832}, "size and width or height are both given"),
            ({"seconds": 0}, "seconds must be a number above 0"),
            ({"seconds": "5"}, 'seconds must be a number above 0, up to 3600, such as 5, got "5"'),
            ({"seconds": 5, "num_frames": 81}, "seconds and num_frames are both given"),
            ({"image": ""}, "image is empty"),
            ({"lora": "film"}, "lora must be a list of 1 to 8 objects"),
            ({"lora": []}, "lora must be a list of 1 to 8"),
            ({"lora": [{"name": "a", "path": "b"}]}, "either a name or a path"),
            ({"lora": [{"strength": 1}]}, "either a name or a path"),
            ({"lora": [{"name": "a", "weight": 1}]}, "lora entries must have name or path"),
            ({"lora": [{"name": "a", "strength": True}]}, "strength must be a number"),
            ({"metadata": {"a": 1}}, 'metadata value of "a" must be a text'),
            ({"metadata": {"": "1"}}, 'metadata key "" must have 1 to 64 characters'),
            ({"metadata": {"a" * 65: "1"}}, "must have 1 to 64 characters"),
            ({"metadata": {"a": "x" * 513}}, "at most 512 characters"),
            ({"metadata": {"a": "\0"}}, "metadata holds a NUL"),
            ({"metadata": {str(n): "" for n in range(17)}}, "metadata has 17 pairs: at most 16"),
            ({"metadata": []}, "metadata must be an object"),
        ],
    )
    def test_a_wrong_value_is_told_with_what_would_do(self, fields, part):
        assert part in fault(**fields)

    def test_the_limits_themselves_are_allowed(self):
        row(prompt="x" * 10_000, custom_id="x" * 512, seed=2**63 - 1, priority=-100)
        row(seed=0, priority=100, metadata={str(n) * 32: "v" * 512 for n in range(10, 26)})

    @pytest.mark.parametrize(
        ("line", "part"),
        [
            ("a red circle", "not JSON: expecting value at column 1"),
            ('{"prompt": "a"', "not JSON: expecting ',' delimiter at column 15"),
            ('{"prompt": "a"} x', "not JSON: extra data at column 17"),
            ("{'prompt': 'a'}", "double quotes"),
            ('{"prompt": "a", "seed": NaN}', "NaN is not a number that JSON has"),
            ('{"prompt": "a", "seconds": -Infinity}', "-Infinity is not a number"),
            ('{"prompt": "a", "seconds": 1e999}', "seconds must be a number"),
            ('{"prompt": "a", "prompt": "b"}', 'key "prompt" is given twice'),
            ('{"prompt": "a", "metadata": {"k": "1", "k": "2"}}', 'key "k" is given twice'),
            ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "thousands of digits"),
            ('{"prompt": ' + "[" * 100_000 + "}", "nested too deeply"),
            ('["a"]', 'must be an object such as {"prompt": "..."}, got a list'),
            ('"a"', 'got "a"'),
            ("null", "got null"),
        ],
    )
    def test_a_line_that_is_no_row_is_told_with_its_number(self, line, part):
        first, problem, last = read_all('{"prompt": "a"}\n' + line + '\n{"prompt": "b"}\n')
        assert problem.line == 2
        assert part in problem.message
        assert (first.line, last.line) == (1, 3)

    def test_bytes_that_are_not_utf8_are_told_with_their_place(self):
        problem = only_problem(b'{"prompt": "caf\xe9"}')
        assert problem.message.startswith("not UTF-8: byte 0xe9 at byte 15 of the line")

    @pytest.mark.parametrize(
        ("content", "part"),
        [
            ('[{"prompt": "a"},\n {"prompt": "b"}]', "one JSON document"),
            ('{\n  "prompt": "a"\n}\n', "one JSON document"),
            ('{"prompt": "a"}'.encode("utf-16"), "UTF-16"),
            (b"PK\x03\x04...", "Excel"),
            (b"\x1f\x8b...", "gzip"),
        ],
    )
    def test_a_file_of_another_kind_is_one_problem_and_not_one_per_line(self, content, part):
        problem = only_problem(content)
        assert problem.line is None
        assert part in problem.message

    def test_a_message_can_always_be_printed(self):
        for value in ("\ud800", "\x1b[31m", "x" * 9999, {"\ud800": 1}, [["\0"]], 10**999):
            message = fault(seed=value, **{"\udcff\x1b": 1})
            assert message.encode().decode().isprintable()
            assert len(message) < 500

    def test_a_hundred_thousand_faults_in_one_line_are_told_shortly(self):
        assert len(fault(**{f"k{n}": 1 for n in range(50_000)})) < 2000

    def test_reading_stops_after_the_problems_that_were_asked_for(self):
        items = read_all("x\n" * 50, max_problems=3)
        assert [item.line for item in items] == [1, 2, 3, None]
        assert "stopped after 3 problems" in items[-1].message


ENVELOPE = {
    "custom_id": "a",
    "method": "POST",
    "url": "/v1/videos",
    "body": {"model": "sora-2", "prompt": "a cat", "size": "832x480", "seconds": "5"},
}


class TestOpenAiEnvelope:
    def test_a_line_of_a_batch_file_is_accepted_as_it_is(self):
        (found,) = rows_of(json.dumps(ENVELOPE))
        assert found == prompt_row.PromptRow(
            line=1, custom_id="a", prompt="a cat", width=832, height=480, seconds=5.0
        )

    @pytest.mark.parametrize(
        ("reference", "image"), [({"image_url": "https://x/a"}, "https://x/a"), (None, None)]
    )
    def test_an_input_reference_is_the_first_frame(self, reference, image):
        body = {"prompt": "a cat", "input_reference": reference}
        (found,) = rows_of(json.dumps(ENVELOPE | {"body": body}))
        assert found.image == image

    @pytest.mark.parametrize(
        ("changes", "part"),
        [
            ({"method": "GET"}, 'method must be "POST", got "GET"'),
            ({"url": "/v1/chat/completions"}, 'url must be "/v1/videos"'),
            ({"url": None}, 'url must be "/v1/videos", got null'),
            ({"body": "a cat"}, 'body must be an object, got "a cat"'),
            ({"seed": 1}, 'key "seed" does not belong beside body'),
            ({"body": {"prompt": "a", "custom_id": "b"}}, "custom_id belongs beside body"),
            ({"body": {"prompt": "a", "seconds": "five"}}, "seconds must be a number"),
            ({"body": {"prompt": "a", "seed": "5"}}, "without quotes"),
            ({"body": {}}, "prompt is missing"),
            (
                {"body": {"prompt": "a", "input_reference": "a.png"}},
                'input_reference must be an object with file_id or image_url only, got "a.png"',
            ),
            (
                {"body": {"prompt": "a", "input_reference": {"file_id": "file-1"}}},
                "input_reference has a file_id, which only /v1/batches knows",
            ),
            (
                {
                    "body": {
                        "prompt": "a",
                        "image": "a.png",
                        "input_reference": {"image_url": "https://x/b.png"},
                    }
                },
                "input_reference and image are both given: keep one",
            ),
            ({"body": {"prompt": "a", "model": 5}}, "model must be a text, got 5"),
            ({"body": {"prompt": "a", "body": {}}}, 'unknown key "body"'),
        ],
    )
    def test_what_is_wrong_with_an_envelope_is_told(self, changes, part):
        assert part in only_problem(json.dumps(ENVELOPE | changes)).message


class TestCsv:
    def test_a_row_is_typed_as_in_json_lines(self):
        content = (
            "custom_id,prompt,seed,size,seconds,fps,priority,lora,metadata.scene,metadata.b\r\n"
            'a,"a cat, running",12,832x480,2.5,16,-3,film,12,\r\n'
        )
        assert rows_of(content, "csv") == [
            prompt_row.PromptRow(
                line=2,
                custom_id="a",
                prompt="a cat, running",
                seed=12,
                width=832,
                height=480,
                seconds=2.5,
                fps=16,
                priority=-3,
                lora=(prompt_row.Lora(name="film"),),
                metadata={"scene": "12"},
            )
        ]

    def test_a_cell_may_be_as_long_as_a_line(self):
        image = "data:image/png;base64," + "A" * 1_000_000
        assert rows_of(f'prompt,image\na,"{image}"\n', "csv")[0].image == image

    def test_an_empty_cell_is_a_key_that_is_not_given(self):
        assert rows_of("prompt,seed,custom_id\na,,\n", "csv") == [
            prompt_row.PromptRow(line=2, prompt="a")
        ]

    def test_a_record_over_many_lines_has_the_number_of_its_first(self):
        content = 'prompt,seed\n"one\ntwo ""three""",1\n\n"four\r\n",x\nfive,5\n'
        first, problem, last = read_all(content, "csv")
        assert (first.line, first.prompt) == (2, 'one\ntwo "three"')
        assert problem == errors.Problem(
            line=5,
            message='seed must be a whole number from 0 to 9223372036854775807, got "x"',
        )
        assert (last.line, last.prompt) == (7, "five")

    def test_a_lora_cell_may_hold_the_list_of_json_lines(self):
        out = io.StringIO()
        csv.writer(out).writerows(
            [["prompt", "lora"], ["a", '[{"path": "b", "strength": 2}]'], ["a", "[oops"]]
        )
        good, bad = read_all(out.getvalue(), "csv")
        assert good.lora == (prompt_row.Lora(path="b", strength=2.0),)
        assert "lora must be a list" in bad.message

    def test_names_in_the_header_may_have_spaces_around_and_a_bom_before(self):
        assert rows_of(b"\xef\xbb\xbfprompt , seed\na,5\n", "csv")[0].seed == 5

    @pytest.mark.parametrize(
        ("header", "part"),
        [
            ("prompt,sed", 'unknown column "sed": did you mean seed?'),
            ("seed", "a column named prompt is missing"),
            ("prompt,prompt", 'column "prompt" is given twice'),
            ("prompt,", "a column has no name"),
            ("prompt;seed", "columns must be separated by commas"),
            ("prompt,metadata", "did you mean metadata.<name>?"),
            ("prompt,metadata.", "unknown column"),
            ("prompt" + ",x" * 100, "has 101 columns"),
            ('prompt,"seed', "a quote is opened and never closed"),
        ],
    )
    def test_a_wrong_header_is_told_and_no_row_is_guessed(self, header, part):
        problems = read_all(f"{header}\na,b\n", "csv")
        assert {problem.line for problem in problems} == {1}
        assert any(part in problem.message for problem in problems)

    @pytest.mark.parametrize(
        ("line", "part"),
        [
            (b"a,1,2", "has 3 cells but the header has 2"),
            (b"a", "has 1 cells but the header has 2"),
            (b",1", "prompt is empty"),
            (b'"a" b,1', "must be doubled"),
            (b"caf\xe9,1", "not UTF-8: byte 0xe9 at byte 3 of the line"),
            (b"a\0,1", "prompt holds a NUL"),
            (b"a\rb,1", "carriage return"),
            (b"a,1_0", 'got "1_0"'),
            (b"x" * 10_001 + b",1", "10,001 characters"),
            (b"x" * 1_100_000 + b",1", "longer than 1,048,576 bytes"),
        ],
    )
    def test_a_bad_row_is_told_and_the_next_one_is_read(self, line, part):
        problem, last = read_all(b"prompt,seed\n" + line + b"\ngood,1\n", "csv")
        assert problem.line == 2
        assert part in problem.message
        assert (last.line, last.prompt) == (3, "good")

    def test_a_quote_that_is_never_closed_tells_which_lines_it_swallowed(self):
        first, problem = read_all('prompt\ngood\n"oops\nlost\nlost\n', "csv")
        assert first.prompt == "good"
        assert problem.line == 3
        assert problem.message == "a quote is opened and never closed (lines 3 to 5 are skipped)"

    def test_a_record_without_end_is_given_up_after_a_mebibyte(self):
        lines = repeated(b'prompt,seed\n"a', b'\n","', 400_000)
        problem = next(readers.read(lines, format="csv"))
        assert isinstance(problem, errors.Problem)

    def test_bad_bytes_inside_a_quoted_cell_cost_that_record_only(self):
        problem, last = read_all(b'prompt\n"one\n\xff\n"\ntwo\n', "csv")
        assert problem.line == 3
        assert (last.line, last.prompt) == (5, "two")


def repeated(head: bytes, piece: bytes, count: int) -> BinaryIO:
    return io.BytesIO(head + piece * count)


class TestText:
    def test_each_line_is_a_prompt(self):
        content = "\ufeffone\r\n\r\n  two, three \n\u3000\nfour".encode()
        assert [(r.line, r.prompt) for r in rows_of(content, "text")] == [
            (1, "one"),
            (3, "two, three"),
            (5, "four"),
        ]

    @pytest.mark.parametrize(
        ("line", "part"),
        [
            (b"caf\xe9", "not UTF-8"),
            (b"a\0b", "prompt holds a NUL"),
            (b'{"prompt": "a"}', "looks like JSON"),
            (b"a cat\ra dog", "a carriage return stands alone"),
            (b"x" * 10_001, "10,001 characters"),
            (b"x" * 3_000_000, "longer than 1,048,576 bytes"),
        ],
    )
    def test_a_bad_line_is_told_and_the_next_one_is_read(self, line, part):
        first, problem, last = read_all(b"one\n" + line + b"\nthree", "text")
        assert (first.line, problem.line, last.line) == (1, 2, 3)
        assert part in problem.message

    def test_only_line_feeds_end_a_line(self):
        assert len(rows_of("a\u2028b\x0bc\x85d\n", "text")) == 1


class TestDuplicates:
    def test_the_second_of_two_equal_ids_names_both_lines(self):
        lines = [{"prompt": "a", "custom_id": name} for name in ("x", "y", "x", "X", "x")]
        items = readers.without_duplicates(read_all("\n".join(map(json.dumps, lines))))
        found = list(items)
        assert [isinstance(item, errors.Problem) for item in found] == [0, 0, 1, 0, 1]
        assert str(found[2]) == 'line 3: custom_id "x" is already on line 1: each must be unique'
        assert str(found[4]) == 'line 5: custom_id "x" is already on line 1: each must be unique'

    def test_rows_without_an_id_and_problems_pass(self):
        items = read_all('{"prompt": "a"}\nx\n{"prompt": "a"}')
        assert list(readers.without_duplicates(items)) == items


class EndlessLine(io.RawIOBase):
    """A stream of one line that never ends, given out in pieces."""

    def __init__(self, pieces: int):
        self.pieces = pieces
        self.largest = 0

    def readable(self):
        return True

    def readline(self, size: int | None = -1) -> bytes:
        self.largest = max(self.largest, -1 if size is None else size)
        self.pieces -= 1
        return b"x" * (size or 0) if self.pieces >= 0 else b""


@pytest.mark.parametrize("format", FORMATS)
def test_a_giant_line_is_never_held_whole(format):
    stream = EndlessLine(pieces=50)
    (problem,) = readers.read(stream, format=format)
    assert problem.line == 1
    assert "longer than 1,048,576 bytes" in problem.message
    assert 0 < stream.largest <= readers.MAX_LINE_BYTES + 2


def many_lines(count: int, format: readers.Format) -> Iterator[bytes]:
    if format == "csv":
        yield b"custom_id,prompt,seed\n"
    for number in range(count):
        if format == "jsonl":
            yield b'{"custom_id": "c%d", "prompt": "a red circle", "seed": %d}\n' % (number, number)
        elif format == "csv":
            yield b'c%d,"a red circle",%d\n' % (number, number)
        else:
            yield b"a red circle %d\n" % number


class LineStream(io.RawIOBase):
    """A file that is made while it is read."""

    def __init__(self, lines: Iterator[bytes]):
        self.lines = lines

    def readline(self, _size: int | None = -1) -> bytes:
        return next(self.lines, b"")


@pytest.mark.parametrize("format", FORMATS)
def test_memory_stays_flat_over_many_rows(format):
    stream = LineStream(many_lines(60_000, format))
    items = readers.without_duplicates(readers.read(stream, format=format))
    first = next(items)
    tracemalloc.start()
    try:
        count = sum(1 for item in items if isinstance(item, prompt_row.PromptRow)) + 1
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert isinstance(first, prompt_row.PromptRow)
    assert count == 60_000
    assert peak_bytes < 1_000_000


fragments = st.one_of(
    st.binary(max_size=30),
    st.sampled_from(
        [
            b"\n", b"\r\n", b"\r", b'"', b"'", b",", b"{", b"}", b"[", b"]", b":", b"\\", b"\0",
            b'{"prompt": "a"}', b'"prompt"', b"prompt,seed\n", b"\\ud800", b"\\u0000", b"NaN",
            b"-1e999", b"9" * 5000, b'{"body": {}}', b"\xef\xbb\xbf", b"\xff\xfe", b"\xff",
            b'"metadata": {"a": "b"}', b'"lora": [{}]', b'"size": "1x1"', b"true", b"[" * 3000,
        ]
    ),
)  # fmt: skip


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=300, deadline=None)
@given(content=st.lists(fragments, max_size=20).map(b"".join))
@example(content=b'prompt\n"')
def test_no_bytes_whatever_make_reading_raise(format, content):
    items = read_all(content, format)
    num_lines = content.count(b"\n") + 1
    assert items
    for item in items:
        if isinstance(item, errors.Problem):
            assert item.line is None or 1 <= item.line <= num_lines
            item.message.encode()
        else:
            assert 1 <= item.line <= num_lines
            assert item.prompt.strip()
            item.prompt.encode()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    fields=st.dictionaries(
        st.sampled_from([*sorted(prompt_row.KEYS), "body", "method", "url"]), json_values
    )
)
def test_any_json_object_is_a_row_or_a_problem_of_line_1(fields):
    (item,) = read_all(json.dumps(fields))
    assert item.line == 1


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_any_storable_prompt_survives_json_lines_and_csv(prompt):
    if one_line.is_blank(prompt):
        return
    out = io.StringIO()
    csv.writer(out, quoting=csv.QUOTE_ALL).writerows([["prompt"], [prompt]])
    assert rows_of(json.dumps({"prompt": prompt}))[0].prompt == prompt
    assert rows_of(out.getvalue(), "csv")[0].prompt == prompt


@pytest.mark.parametrize("name", ["prompts.jsonl", "prompts.csv", "prompts.txt"])
def test_the_examples_can_be_submitted(name):
    path = ROOT / "examples" / name
    with path.open("rb") as stream:
        format = readers.detect_format(name, b"")
        items = list(readers.without_duplicates(readers.read(stream, format=format)))
    assert len(items) == 8
    assert all(isinstance(item, prompt_row.PromptRow) for item in items), items


def test_the_examples_are_the_same_in_every_format_and_pictures_are_others():
    """In one folder, one would be taken for the other."""
    rows = {}
    for name in ("prompts.jsonl", "prompts.csv", "pictures.jsonl"):
        with (ROOT / "examples" / name).open("rb") as stream:
            read = readers.read(stream, format=readers.detect_format(name, b""))
            rows[name] = [dataclasses.replace(row, line=0) for row in read]
    assert rows["prompts.csv"] == rows["prompts.jsonl"]
    ids = [{row.custom_id for row in rows[name]} for name in ("prompts.jsonl", "pictures.jsonl")]
    assert not ids[0] & ids[1]


def test_the_documentation_names_every_key_and_limit():
    text = (ROOT / "docs" / "prompt-files.md").read_text()
    limits = (
        prompt_row.MAX_PROMPT_CHARS,
        readers.MAX_LINE_BYTES,
        prompt_row.MAX_CUSTOM_ID_CHARS,
        prompt_row.MAX_METADATA_PAIRS,
        prompt_row.MAX_METADATA_KEY_CHARS,
        prompt_row.MAX_METADATA_VALUE_CHARS,
        looks.MAX_LORAS,
        prompt_row.MAX_IMAGE_CHARS,
        prompt_row.MAX_SECONDS,
        looks.MAX_SIDE,
        looks.MAX_FRAMES,
        looks.MAX_FPS,
        prompt_row.MAX_PRIORITY,
    )
    assert [key for key in prompt_row.KEYS if f"`{key}`" not in text] == []
    assert [limit for limit in limits if f"{limit:,}" not in text] == []
