"""What may name something."""

import pytest

from jobs import one_line


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Screenshot 2026-11-27 at 9.41.00\u202fPM.png",
        "夜\u3000景.png",
        "می\u200cروم",
        "👩\u200d🚀",
        "\U000e0100 of a newer Unicode: \U0001fadd",
    ],
)
def test_what_people_write_may(name: str) -> None:
    assert one_line.is_named(name)


@pytest.mark.parametrize(
    "text", ["", " ", "\u3000\t", "\u200b", "\u2060\ufeff", "\u0301", "\xad", "\u3164\u20e3"]
)
def test_what_cannot_be_seen_is_blank(text: str) -> None:
    assert one_line.is_blank(text)
    assert not one_line.is_blank(f"{text}.{text}")


@pytest.mark.parametrize("wrong", ["\0", "\t", "\n", "\x1b", "\x85", "\u2028", "\u202e", "\ud800"])
def test_what_breaks_lines_or_turns_them_may_not(wrong: str) -> None:
    assert one_line.first_wrong(f"a{wrong}b") == wrong
