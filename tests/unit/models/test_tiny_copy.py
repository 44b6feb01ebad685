"""The trained tiny models are copied whole, and never over something."""

import shutil

import pytest

from models.tiny import shipped


@pytest.mark.parametrize("name", shipped.NAMES)
def test_a_model_is_copied_to_the_last_byte(tmp_path, name):
    assert shipped.copy(name, tmp_path / "models" / name)
    source = shipped.FOLDER / name
    files = {path.relative_to(source) for path in source.rglob("*") if path.is_file()}
    assert files
    for file in files:
        copied = tmp_path / "models" / name / file
        assert copied.read_bytes() == (source / file).read_bytes()
    assert [path.name for path in (tmp_path / "models").iterdir()] == [name]


def test_a_model_that_is_there_stays(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    (folder / "config.json").write_text("mine")
    assert not shipped.copy("tiny", folder)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(source, target):
        target.mkdir()
        raise OSError("disk full")

    monkeypatch.setattr(shutil, "copytree", fail)
    with pytest.raises(OSError, match="disk full"):
        shipped.copy("tiny", tmp_path / "models" / "tiny")
    assert list((tmp_path / "models").iterdir()) == []
