"""metrics.csv tells of each update once, whatever happened to the file."""

import dataclasses

import pytest

from models.distillation import metrics, trainer

ZEROS = dict.fromkeys((field.name for field in dataclasses.fields(trainer.Update)), 0.5)


def update(number):
    return trainer.Update(**{**ZEROS, "number": number})


@pytest.fixture
def path(tmp_path):
    """A file that tells of three updates."""
    lines = metrics.Metrics(tmp_path, updates=0)
    for number in (1, 2, 3):
        lines.add(update(number))
    return tmp_path / metrics.FILE


def numbers(path):
    return [line.split(",")[0] for line in path.read_text().splitlines()[1:]]


def test_lines_of_updates_that_are_done_again_are_dropped(path):
    before = path.read_bytes()
    metrics.Metrics(path.parent, updates=3)
    assert path.read_bytes() == before
    metrics.Metrics(path.parent, updates=1).add(update(2))
    assert numbers(path) == ["1", "2"]


@pytest.mark.parametrize(
    "damage",
    [bytes(200_000), b"\xff\xfe\x80\n", b'4,"', b"4,0.5", b"4,0.5,0.5,0.5,0.5,0.5,0.5,0.5,0\0\0"],
    ids=["zeros", "no UTF-8", "a quote", "half a line", "zeros in a line"],
)
def test_a_line_that_is_damaged_costs_no_other(path, damage):
    before = path.read_bytes()
    path.write_bytes(before + damage)
    metrics.Metrics(path.parent, updates=9).add(update(4))
    assert path.read_bytes().startswith(before)
    assert numbers(path) == ["1", "2", "3", "4"]
