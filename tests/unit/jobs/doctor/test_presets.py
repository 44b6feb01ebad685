"""The presets: each can be read, and those of the web service are there."""

import pytest

from jobs.doctor import presets
from tests.told import told_by


def test_a_folder_of_presets_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_PRESETS_DIR", "elsewhere")
    assert told_by(presets.check)["presets"].status == "fail"


def test_a_default_preset_that_is_not_there_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUSHES_DEFAULT_IMAGE_PRESET", "tiny_i2w")
    found = told_by(presets.check)["default preset"]
    assert (found.status, "did you mean 'tiny_i2v'" in found.seen) == ("fail", True)
    assert "RUSHES_DEFAULT_IMAGE_PRESET" in found.seen
