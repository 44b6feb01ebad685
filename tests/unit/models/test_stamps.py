"""Another file is told from the one that was read, and nothing else is."""

import os

import pytest

from models import errors, stamps


def longer(path):
    path.write_bytes(b"123")


def touched(path):
    os.utime(path, ns=(0, 1))


def another(path):
    other = path.with_name("other")
    other.write_bytes(b"21")
    other.replace(path)


@pytest.mark.parametrize("change", [longer, touched, another])
def test_one_difference_makes_another_file(tmp_path, change):
    path = tmp_path / "weights"
    path.write_bytes(b"12")
    os.utime(path, ns=(0, 0))
    stamp = stamps.of(path)
    stamps.check([stamp])
    change(path)
    if change is not touched:
        os.utime(path, ns=(0, 0))
    with pytest.raises(errors.WeightsChangedError):
        stamps.check([stamp])


def test_a_file_whose_rights_or_links_change_is_the_same(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"12")
    stamp = stamps.of(path)
    path.chmod(0o600)
    (tmp_path / "link").hardlink_to(path)
    stamp.check()
