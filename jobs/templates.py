"""Variables in the prompts of a schedule: `a {{style}} city at dawn, {{date:%d %B}}`."""

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jobs import errors, one_line, prompt_row

VARIABLE = re.compile(r"\{\{\s*([A-Za-z_][A-Za-z0-9_]*)\s*(?::([^{}]*))?\}\}")
MEANINGS = {
    "date": "the date of the firing, 2026-11-27; {{date:%d %B}} in another form",
    "time": "its time, 02:00",
    "weekday": "its weekday, Friday",
    "counter": "1, 2, 3, ...: how many times it has fired",
    "schedule": "the schedule's name",
}
"""The variables that every schedule has; its lists come beside them."""

MAX_LISTS = 20
MAX_ITEMS = 1_000
MAX_ITEM_CHARS = 500
MAX_FORMAT_CHARS = 60


@dataclass(frozen=True, kw_only=True)
class Variables:
    """What the variables stand for in one firing."""

    moment: datetime
    """The fire time by the schedule's clock."""
    counter: int
    """From 1."""
    schedule: str
    lists: Mapping[str, Sequence[str]]
    """Each firing takes the next item, and the first after the last."""

    def fill(self, text: str) -> str:
        """ValueError names a variable that there is not, and what there is."""
        if "{{" not in text:
            return text
        filled = VARIABLE.sub(self._value, text)
        left = VARIABLE.sub("", text)
        if "{{" in left:
            at = left[left.index("{{") :][:40]
            raise ValueError(f"{at!r} is no variable: write it as {{{{name}}}}")
        return filled

    def row(self, row: prompt_row.PromptRow) -> prompt_row.PromptRow:
        """The row with its variables filled in; ValueError as of `fill`."""
        texts: dict[str, Any] = {
            name: self.fill(value)
            for name in ("prompt", "negative_prompt", "custom_id", "image")
            if (value := getattr(row, name)) is not None
        }
        for name, most in (
            ("prompt", prompt_row.MAX_PROMPT_CHARS),
            ("negative_prompt", prompt_row.MAX_PROMPT_CHARS),
            ("custom_id", prompt_row.MAX_CUSTOM_ID_CHARS),
        ):
            if len(texts.get(name, "")) > most:
                raise ValueError(f"{name} has more than {most:,} characters with its variables")
        metadata = row.metadata
        if metadata is not None:
            metadata = {
                key: self.fill(value)[: prompt_row.MAX_METADATA_VALUE_CHARS]
                for key, value in metadata.items()
            }
        return dataclasses.replace(row, **texts, metadata=metadata)

    def _value(self, match: re.Match[str]) -> str:
        name, form = match[1], match[2]
        if form is not None and name != "date":
            raise ValueError(f"{match[0]}: only date takes a form, as {{{{date:%d %B}}}}")
        if name in self.lists:
            items = self.lists[name]
            return items[(self.counter - 1) % len(items)]
        if name not in MEANINGS:
            raise ValueError(_unknown(name, [*MEANINGS, *self.lists]))
        if name == "date":
            return self._date(form)
        values = {
            "time": self.moment.strftime("%H:%M"),
            "weekday": self.moment.strftime("%A"),
            "counter": str(self.counter),
            "schedule": self.schedule,
        }
        return values[name]

    def _date(self, form: str | None) -> str:
        text = "%Y-%m-%d" if form is None else form.strip()
        if not text or len(text) > MAX_FORMAT_CHARS or "\0" in text:
            raise ValueError("the form of {{date:...}} is empty or too long: %d %B would do")
        try:
            return self.moment.strftime(text)
        except ValueError as error:
            raise ValueError(f"{{{{date:{form}}}}}: {error}") from None


def check_lists(lists: Mapping[str, Sequence[str]]) -> None:
    """InvalidInput that names the list."""
    problems = [problem for name, items in lists.items() if (problem := _wrong_list(name, items))]
    if len(lists) > MAX_LISTS:
        problems.append(f"at most {MAX_LISTS} lists, got {len(lists)}")
    if problems:
        raise errors.invalid("lists", *problems)


def _wrong_list(name: str, items: Sequence[str]) -> str | None:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]{0,49}", name):
        return f"{name[:60]!r} is no name for a list: letters, digits and _ would do"
    if name in MEANINGS:
        return f"{name} is {MEANINGS[name]}: choose another name"
    if not 1 <= len(items) <= MAX_ITEMS:
        return f"{name} must have 1 to {MAX_ITEMS:,} items, got {len(items)}"
    if not all(1 <= len(item) <= MAX_ITEM_CHARS and one_line.is_named(item) for item in items):
        return f"items of {name} must be 1 to {MAX_ITEM_CHARS} characters on one line"
    return None


def _unknown(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"
    return f"unknown variable {{{{{name}}}}}: {hint}"
