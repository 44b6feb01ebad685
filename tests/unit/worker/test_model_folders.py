"""Which models lie on a host, and which have come since."""

import errno
import json
import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jobs import queues, settings
from worker import copies, model_folders


@pytest.fixture
def queues_with(monkeypatch, tmp_path):
    """`queues_with(*paths)`: of a models folder that holds these files."""

    def look(*paths, **environment):
        for path in paths:
            (tmp_path / "own" / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "own" / path).write_text("{}")
        monkeypatch.setenv("RUSHES_MODELS_DIR", str(tmp_path / "own"))
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        return set(model_folders.find(settings.load()))

    return look


def test_native_diffusers_and_nested_models_have_a_queue_each(queues_with):
    found = queues_with(
        "native/config.json",
        "diffusers/model_index.json",
        "diffusers/transformer/config.json",
        "diffusers/vae/config.json",
        "lightx2v/nested/config.json",
        "notes/readme.txt",
    )
    assert found == {queues.of_model(name) for name in ("native", "diffusers", "lightx2v/nested")}


def test_a_folder_with_an_empty_config_is_no_model_and_hides_none(queues_with, tmp_path):
    for name in ("weights", "lightx2v"):
        (tmp_path / "own" / name).mkdir(parents=True)
        (tmp_path / "own" / name / "config.json").touch()
    assert queues_with("lightx2v/nested/config.json") == {queues.of_model("lightx2v/nested")}


def preset_of(folder, name, model_path):
    folder.mkdir(exist_ok=True)
    preset = {"model_path": str(model_path), "denoising_step_list": [1000, 750, 500, 250]}
    sizes = {"target_video_length": 5, "target_width": 16, "target_height": 16}
    (folder / name).write_text(json.dumps(preset | sizes))


def test_a_preset_may_name_a_model_anywhere(queues_with, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    preset_of(tmp_path / "presets", "mine.json", elsewhere)
    preset_of(tmp_path / "presets", "deep.json", "a/b/c")
    preset_of(tmp_path / "presets", "gone.json", tmp_path / "gone")
    found = queues_with("a/b/c/config.json", RUSHES_PRESETS_DIR=tmp_path / "presets")
    assert found == {queues.of_model(str(elsewhere)), queues.of_model("a/b/c")}


def test_a_folder_of_that_name_where_we_stand_is_no_model(queues_with, tmp_path):
    preset_of(tmp_path / "presets", "mine.json", "tiny-but-not-there")
    (tmp_path / "cwd" / "tiny-but-not-there").mkdir()
    assert queues_with(RUSHES_PRESETS_DIR=tmp_path / "presets") == set()


def test_a_broken_preset_hides_no_model(queues_with, tmp_path):
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "broken.json").write_text("{")
    found = queues_with("native/config.json", RUSHES_PRESETS_DIR=tmp_path / "presets")
    assert found == {queues.of_model("native")}


def test_a_folder_whose_name_is_not_utf8_is_left_out_and_told_once(queues_with):
    odd = [os.fsdecode(name) for name in (b"caf\xe9", b"caf\xe9s/inner")]
    with capture_logs() as logs:
        for _ in range(2):
            found = queues_with("native/config.json", *(f"{name}/config.json" for name in odd))
    assert found == {queues.of_model("native")}
    told = [(line["event"], line["path"]) for line in logs]
    names = ("caf\\xe9", "caf\\xe9s/inner")
    assert sorted(told) == [("launcher.model_left_out", name) for name in names]


def test_a_model_where_this_user_may_not_look_is_none(queues_with, tmp_path, monkeypatch):
    """Python before 3.14 raises there."""
    closed, stat = tmp_path / "closed", os.stat

    def refuse(path, **given):
        if Path(path).is_relative_to(closed):
            raise PermissionError(errno.EACCES, "Permission denied")
        return stat(path, **given)

    preset_of(tmp_path / "presets", "mine.json", closed / "model")
    monkeypatch.setattr(os, "stat", refuse)
    found = queues_with("native/config.json", RUSHES_PRESETS_DIR=tmp_path / "presets")
    assert found == {queues.of_model("native")}


@pytest.fixture
def looks(monkeypatch, tmp_path):
    """`looks(*files)`: what each of so many looks tells; before it, these files are written."""

    def told(*steps, known=()):
        monkeypatch.setenv("RUSHES_MODELS_DIR", str(tmp_path / "models"))
        newcomers = model_folders.Newcomers(settings.load())
        answers = []
        for files in steps:
            for path, text in files.items():
                (tmp_path / "models" / path).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / "models" / path).write_text(text)
            answers.append(newcomers.look(known=known))
        return answers

    return told


A, B, PART = (queues.of_model(name) for name in ("a", "b", "b/vae"))
MODEL_A = {"a/config.json": "{}", "a/weights": "1"}


def test_a_model_is_told_when_two_looks_agree(looks, monkeypatch):
    monkeypatch.setattr(copies, "COPIED_SECONDS", 0.0)
    assert looks(MODEL_A, {"a/weights": "12"}, {}) == [(), (), (A,)]


def test_a_model_that_is_known_is_not_told(looks, monkeypatch):
    monkeypatch.setattr(copies, "COPIED_SECONDS", 0.0)
    assert looks(MODEL_A, {"b/config.json": "{}"}, {}, known=[A]) == [(), (), (B,)]


def test_a_copy_that_pauses_has_not_ended(looks):
    assert looks(MODEL_A, {}, {}) == [(), (), ()]


def test_a_model_that_is_copied_holds_up_no_other(looks, monkeypatch):
    monkeypatch.setattr(copies, "COPIED_SECONDS", 0.0)
    copy = [{"b/config.json": "{}", "b/weights": "1" * length} for length in range(3)]
    assert looks(MODEL_A | copy[0], *copy[1:]) == [(), (A,), (A,)]


def test_a_part_of_a_model_that_is_copied_is_none(looks, monkeypatch):
    """As a file of diffusers' layout may come before the one that says that it is a part."""
    monkeypatch.setattr(copies, "COPIED_SECONDS", 0.0)
    first = {"b/vae/config.json": "{}", "b/unet/weights": "1"}
    rest = {"b/model_index.json": "{}"}
    assert looks(first, {"b/unet/weights": "12"}, rest, {}) == [(), (), (), (B,)]
    assert PART not in model_folders.find(settings.load())


@pytest.mark.parametrize(
    ("clock", "is_copied"), [(-90, True), (-30, False), (30, False), (90, True)]
)
def test_a_copy_is_as_old_as_its_inodes_whatever_times_it_keeps(
    monkeypatch, tmp_path, clock, is_copied
):
    """As `cp -a` sets them back; the clock of the server that has the files may be ahead."""
    part = tmp_path / "a" / "vae"
    part.mkdir(parents=True)
    (part / "weights").write_text("1")
    for path in (part / "weights", part, part.parent):
        os.utime(path, (0, 0))
    now = part.parent.stat().st_ctime + clock
    monkeypatch.setattr(copies.time, "time", lambda: now)
    assert copies.beside(part, tmp_path).is_copied is is_copied


def test_a_link_to_nothing_keeps_no_model_away(looks, monkeypatch, tmp_path):
    monkeypatch.setattr(copies, "COPIED_SECONDS", 0.0)
    (tmp_path / "models" / "a").mkdir(parents=True)
    (tmp_path / "models" / "a" / "gone").symlink_to("nowhere")
    assert looks(MODEL_A, {}) == [(), (A,)]
