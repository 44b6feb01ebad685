"""What the page of Gradio does, without Gradio."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from fastapi import Request
from sqlalchemy.exc import OperationalError

from jobs.web import gradio_page, videos
from tests.unit.jobs.web.conftest import Web


class Told(Exception):
    """Gradio's error, whose words the page shows."""

    def __init__(self, words: str, *, print_exception: bool) -> None:
        assert not print_exception
        super().__init__(words)


def render(web: Web) -> list[tuple[str, str]]:
    gradio = SimpleNamespace(Error=Told, Request=object)
    scope = {"type": "http", "app": web.client.app, "headers": [], "method": "GET", "client": None}
    asks = SimpleNamespace(request=Request(scope))
    return list(gradio_page._handler(gradio, web.serving)("a cat", "tiny", "", None, asks))


def test_a_database_that_goes_away_is_told_in_words(
    web: Web, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: object) -> None:
        raise OperationalError("SELECT", {}, Exception("postgresql://user:secret@host"))

    monkeypatch.setattr(videos, "show", away)
    with pytest.raises(Told, match="the database does not answer"):
        render(web)


def test_presets_that_are_away_are_told_without_the_path_of_their_folder(
    make_web: Callable[..., Web], tmp_path: Path
) -> None:
    with pytest.raises(Told, match=r"^the presets cannot be read$"):
        render(make_web(presets_dir=tmp_path / "away"))
