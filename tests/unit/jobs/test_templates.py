"""What variables in prompts stand for, and what is told of those that stand for nothing."""

from datetime import datetime
from zoneinfo import ZoneInfo

import pytest

from jobs import errors, prompt_row, templates

MOMENT = datetime(2026, 11, 27, 2, 5, tzinfo=ZoneInfo("Europe/Berlin"))


def variables(counter: int = 1, **lists: list[str]) -> templates.Variables:
    return templates.Variables(moment=MOMENT, counter=counter, schedule="night", lists=lists)


@pytest.mark.parametrize(
    ("text", "filled"),
    [
        ("no variable, one { and } and }}", "no variable, one { and } and }}"),
        ("{{date}} {{ time }} {{weekday}}", "2026-11-27 02:05 Friday"),
        ("{{date:%d.%m.%y}}", "27.11.26"),
        ("{{counter}} of {{schedule}}", "7 of night"),
        ("a {{style}} cat, {{style}}", "a noir cat, noir"),
    ],
)
def test_variables_are_filled_in(text: str, filled: str) -> None:
    assert variables(7, style=["noir", "anime"]).fill(text) == filled


def test_a_list_gives_its_next_item_at_each_firing_and_begins_again() -> None:
    items = ["a", "b", "c"]
    found = [variables(counter, x=items).fill("{{x}}") for counter in range(1, 8)]
    assert found == ["a", "b", "c", "a", "b", "c", "a"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{{stile}}", r"unknown variable {{stile}}: did you mean style\?"),
        ("{{zzz}}", r"there are date, time, weekday, counter, schedule, style"),
        ("{{date", "is no variable"),
        ("{{a b}}", "is no variable"),
        ("{{time:%H}}", "only date takes a form"),
        ("{{date:}}", "empty or too long"),
    ],
)
def test_what_is_no_variable_is_told(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        variables(style=["noir"]).fill(text)


def test_every_text_of_a_row_is_filled_in_and_the_rest_stays() -> None:
    row = prompt_row.PromptRow(
        line=3,
        prompt="{{x}}",
        negative_prompt="no {{x}}",
        custom_id="{{x}}-{{counter}}",
        image="https://example.org/{{x}}.png",
        seed=5,
        metadata={"what": "{{x}}"},
    )
    assert variables(x=["cat"]).row(row) == prompt_row.PromptRow(
        line=3,
        prompt="cat",
        negative_prompt="no cat",
        custom_id="cat-1",
        image="https://example.org/cat.png",
        seed=5,
        metadata={"what": "cat"},
    )


def test_a_custom_id_that_grows_too_long_is_told() -> None:
    row = prompt_row.PromptRow(line=1, prompt="p", custom_id="{{x}}" * 2)
    with pytest.raises(ValueError, match="custom_id has more than 512 characters"):
        variables(x=["y" * 300]).row(row)


@pytest.mark.parametrize(
    ("lists", "told"),
    [
        ({"date": ["x"]}, "choose another name"),
        ({"a-b": ["x"]}, "no name for a list"),
        ({"x": []}, "1 to 1,000 items, got 0"),
        ({"x": ["a", ""]}, "on one line"),
    ],
)
def test_lists_are_checked(lists: dict[str, list[str]], told: str) -> None:
    with pytest.raises(errors.InvalidInput, match=told):
        templates.check_lists(lists)
