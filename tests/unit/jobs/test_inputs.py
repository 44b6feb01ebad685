"""Images of a prompt file: fetched ahead, some at once, each once."""

import contextlib
import io
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from jobs import errors, images, inputs, presets, settings, stores, submission

I2V = presets.load("tiny_i2v")
ROWS = 100


def _picture(number: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (32, 32), (number, number, number)).save(data, "PNG")
    return data.getvalue()


class Afar:
    """Servers of images; counts who asks, and how many at once."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.most = self._now = 0
        self._lock = threading.Lock()

    def fetch(self, source: str, **_: object) -> images.FetchedImage:
        with self._lock:
            self.asked.append(source)
            self._now += 1
            self.most = max(self.most, self._now)
        time.sleep(0.01)
        with self._lock:
            self._now -= 1
        name = source.rpartition("/")[2]
        if name == "bad":
            raise images.ImageUnusable(source, "is no image")
        return images.examine(_picture(int(name)), source)


@pytest.fixture
def afar(monkeypatch: pytest.MonkeyPatch) -> Afar:
    found = Afar()
    monkeypatch.setattr(images, "fetch", found.fetch)
    return found


def _file(tmp_path: Path, sources: list[str]) -> submission.PromptFile:
    (tmp_path / "results").mkdir(exist_ok=True)
    config = settings.load(results_url=(tmp_path / "results").as_uri())
    rows = [json.dumps({"prompt": f"p {n}", "image": each}) for n, each in enumerate(sources)]
    return submission.PromptFile(
        stream=io.BytesIO("\n".join(rows).encode()),
        source="p",
        format="jsonl",
        options=submission.Options(preset=I2V),
        images=inputs.InputImages(config=config, base=None, store=stores.open_store(config)),
    )


def _threads() -> int:
    return sum(thread.name.startswith("images") for thread in threading.enumerate())


def test_addresses_are_fetched_ahead_and_the_rows_keep_their_order(
    afar: Afar, tmp_path: Path
) -> None:
    sources = [f"https://x.example/{n % 60}" for n in range(ROWS)]
    kept: list[submission.Order] = []
    file = _file(tmp_path, sources)
    with contextlib.closing(file.images):
        plan = submission.plan(file, keep=kept.append)
    assert plan.prompts == ROWS
    assert [order.row.prompt for order in kept] == [f"p {n}" for n in range(ROWS)]
    expected = [images.examine(_picture(n % 60), "x").key for n in range(ROWS)]
    assert [order.image_key for order in kept] == expected
    assert sorted(afar.asked) == sorted(set(sources))
    assert afar.most == inputs.FETCHES_AT_ONCE
    assert _threads() == 0


def test_what_is_wrong_is_told_in_the_order_of_the_file(afar: Afar, tmp_path: Path) -> None:
    sources = [f"https://x.example/{'bad' if n % 40 == 7 else n}" for n in range(ROWS)]
    file = _file(tmp_path, sources)
    with contextlib.closing(file.images), pytest.raises(errors.InvalidInput) as refused:
        submission.plan(file)
    assert [problem.line for problem in refused.value.problems] == [8, 48, 88]


def test_each_row_has_the_size_of_its_own_image(afar: Afar, tmp_path: Path) -> None:
    shapes = {"wide": (96, 32), "tall": (32, 96)}

    def fetch(source: str, **_: object) -> images.FetchedImage:
        data = io.BytesIO()
        Image.new("RGB", shapes[source.rpartition("/")[2]]).save(data, "PNG")
        return images.examine(data.getvalue(), source)

    kept: list[submission.Order] = []
    file = _file(tmp_path, [f"https://x.example/{shape}" for shape in shapes])
    with contextlib.closing(file.images), pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "fetch", fetch)
        submission.plan(file, keep=kept.append)
    wide, tall = (order.look for order in kept)
    assert wide.width > wide.height
    assert tall.width < tall.height


def test_other_pictures_under_the_same_names_are_other_content(
    afar: Afar, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fingerprint(shift: int) -> str:
        shifted = [images.examine(_picture(n + shift), "x") for n in range(2)]
        monkeypatch.setattr(images, "fetch", lambda source, **_: shifted[int(source[-1])])
        file = _file(tmp_path, [f"https://x.example/{n}" for n in range(2)])
        with contextlib.closing(file.images):
            return submission.plan(file).fingerprint

    assert fingerprint(0) == fingerprint(0) != fingerprint(5)


def test_an_end_in_the_middle_leaves_no_thread_at_work(afar: Afar, tmp_path: Path) -> None:
    file = _file(tmp_path, [f"https://x.example/{n}" for n in range(ROWS)])
    file.images.may_wait = True

    def away(source: str, **_: object) -> images.FetchedImage:
        raise images.ImageUnreachable(source, "does not answer")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "fetch", away)
        with pytest.raises(inputs.ImageAway) as ended:
            submission.plan(file)
    assert ended.traceback, "whose frames are kept"
    assert _threads() == 0
    file.images.close()


def test_few_images_are_decoded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small on the wire, each may take a quarter of a gigabyte."""
    decoded, now, most, lock = images._decoded, 0, 0, threading.Lock()

    @contextlib.contextmanager
    def counted(*given: Any) -> Iterator[Image.Image]:
        nonlocal now, most
        with decoded(*given) as image:
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.01)
            yield image
            with lock:
                now -= 1

    monkeypatch.setattr(images, "_read", lambda *_, **__: _picture(1))
    monkeypatch.setattr(images, "_decoded", counted)
    file = _file(tmp_path, [f"https://x.example/{n}" for n in range(ROWS)])
    with contextlib.closing(file.images):
        assert submission.plan(file).prompts == ROWS
    assert most == 2
