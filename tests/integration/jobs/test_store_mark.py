"""A farm knows its store again, and takes no other for it."""

import re
import shutil
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from jobs import folder_store, store_mark
from tests.integration.jobs.conftest import World


@pytest.fixture
def folders(tmp_path: Path) -> list[folder_store.FolderStore]:
    """Two stores."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return [folder_store.FolderStore(tmp_path / name, may_make=False) for name in ("one", "two")]


def test_the_first_store_is_the_farms(
    world: World, folders: list[folder_store.FolderStore]
) -> None:
    first, other = folders
    store_mark.Guard(world.db, other).require()
    store_mark.Guard(world.db, first).leave()
    store_mark.Guard(world.db, first).require()
    for call in (store_mark.Guard.require, store_mark.Guard.leave):
        with pytest.raises(store_mark.OtherStore, match="correct RUSHES_RESULTS_URL"):
            call(store_mark.Guard(world.db, other))
    assert list(other.list()) == []


def test_of_two_at_once_both_know_the_store(
    world: World, folders: list[folder_store.FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, mark, is_first = folders[0], store_mark.Guard._mark, iter([True])
    store_mark.Guard(world.db, store).leave()

    def late(guard: store_mark.Guard) -> object:
        return None if next(is_first, False) else mark(guard)

    monkeypatch.setattr(store_mark.Guard, "_mark", late)
    with capture_logs() as logs:
        store_mark.Guard(world.db, store).leave()
    assert logs == []
    assert len(list(store.list())) == 1


def test_a_mark_that_was_written_unheard_stays(
    world: World, folders: list[folder_store.FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the database took it and its answer was lost: it is asked again."""
    write = world.db.write
    monkeypatch.setattr(world.db, "write", lambda *given: [write(*given), write(*given)])
    store_mark.Guard(world.db, folders[0]).leave()
    store_mark.Guard(world.db, folders[0]).require()


def test_a_mark_that_was_deleted_ends_nothing_that_runs(
    world: World, folders: list[folder_store.FolderStore]
) -> None:
    """As by a rule of the bucket that deletes what is old."""
    store = folders[0]
    guard = store_mark.Guard(world.db, store)
    guard.leave()
    store.delete(next(iter(store.list())))
    guard.require()
    guard.leave()
    store_mark.Guard(world.db, store).require()


def test_a_farm_that_moves_meanwhile_has_its_new_mark_in_its_new_store_alone(
    world: World, folders: list[folder_store.FolderStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = folders
    store_mark.Guard(world.db, old).leave()
    before, require = list(old.list()), store_mark.Guard.require

    def moved_after(guard: store_mark.Guard) -> object:
        mark = require(guard)
        store_mark.move(world.db, new)
        return mark

    monkeypatch.setattr(store_mark.Guard, "require", moved_after)
    store_mark.Guard(world.db, old).leave()
    assert list(old.list()) == before


def test_a_farm_that_moved_takes_its_old_store_for_another(
    world: World, folders: list[folder_store.FolderStore]
) -> None:
    old, new = folders
    guard = store_mark.Guard(world.db, old)
    guard.leave()
    assert store_mark.move(world.db, new).changed
    store_mark.Guard(world.db, new).require()
    with pytest.raises(store_mark.OtherStore, match=re.escape(f"of this farm, {new.url}:")):
        guard.require()


def test_a_move_to_the_same_address_leaves_no_copy_of_the_store_behind(
    world: World, folders: list[folder_store.FolderStore], tmp_path: Path
) -> None:
    """As where its disk or endpoint is another now, and the mark was copied with all else."""
    store = folders[0]
    store_mark.Guard(world.db, store).leave()
    copy = folder_store.FolderStore(shutil.copytree(tmp_path / "one", tmp_path / "copy"))
    guard = store_mark.Guard(world.db, store)
    guard.require()
    store_mark.Guard(world.db, copy).require()
    assert not store_mark.move(world.db, store).changed
    guard.require()
    with pytest.raises(store_mark.OtherStore):
        store_mark.Guard(world.db, copy).require()
