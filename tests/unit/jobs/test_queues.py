"""Names of queues."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs import queues


@pytest.mark.parametrize(
    ("model_path", "queue"),
    [
        ("tiny", "rushes.render.tiny"),
        ("wan2.1-t2v-14b", "rushes.render.wan2.1-t2v-14b"),
        ("Wan2.1-T2V-14B", "rushes.render.wan2.1-t2v-14b"),
    ],
)
def test_a_plain_name_is_the_queue(model_path: str, queue: str) -> None:
    assert queues.of_model(model_path) == queue


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("/data/a/wan", "/data/b/wan"),
        ("a/wan", "wan"),
        ("wan 2", "wan-2"),
        ("日本", "中国"),
        ("x" * 100, "x" * 101),
        ("a_b", "a-b"),
    ],
)
def test_other_weights_have_another_queue(one: str, other: str) -> None:
    assert queues.of_model(one) != queues.of_model(other)


@pytest.mark.parametrize("path", ["/data/a/wan", "a/wan", "/tiny"])
def test_a_path_of_several_parts_is_told_from_the_name(path: str) -> None:
    assert queues.may_lie_elsewhere(queues.of_model(path))
    assert not queues.may_lie_elsewhere(queues.of_model("Wan2.1-T2V-14B"))


@given(st.text(min_size=1).filter(lambda text: "\0" not in text and text.isprintable()))
def test_any_path_makes_a_name_that_the_tables_and_redis_take(model_path: str) -> None:
    name = queues.of_model(model_path)
    assert re.fullmatch(r"rushes\.render\.[a-z0-9.-]+", name)
    assert len(name) <= 200
    assert queues.of_model(model_path) == name
