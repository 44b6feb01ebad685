"""Networks stay warm, a bad folder is told by name, and hashes are read once per machine."""

import json
import shutil

import pytest

from models import layout
from worker import components, errors


@pytest.fixture
def own_models(models_dir, tmp_path):
    """`tiny` and `other`, which a test may break."""
    folder = tmp_path / "models"
    for name in ("tiny", "other"):
        shutil.copytree(models_dir / "tiny", folder / name)
    return folder


@pytest.fixture
def warm(own_models, tmp_path, cpu):
    return components.Components(models_dir=own_models, home=tmp_path / "home", device=cpu)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "home" / components.HASHES_FILE


@pytest.fixture
def reads(monkeypatch):
    """Counts how often weights are really read for their hashes."""
    counted = []
    real = layout.weight_hashes

    def count(files):
        counted.append(files.root)
        return real(files)

    monkeypatch.setattr(layout, "weight_hashes", count)
    return counted


def weight_file(root):
    return layout.find(root).transformer[0]


def test_many_jobs_of_one_model_load_it_once(warm, look):
    first = warm.networks_for(look())
    assert all(warm.networks_for(look(width=side)) is first for side in (16, 32, 64))
    assert warm.loads == 1


def test_another_model_is_loaded_in_place_of_the_first(warm, look):
    first = warm.networks_for(look())
    other = warm.networks_for(look(model_path="other"))
    assert other is not first
    assert warm.networks_for(look(model_path="other")) is other
    warm.networks_for(look())
    assert warm.loads == 3


def test_a_model_may_lie_anywhere(warm, look, own_models):
    warm.networks_for(look(model_path=str(own_models / "other")))
    assert warm.loads == 1


def missing_folder(root):
    shutil.rmtree(root)


def missing_weights(root):
    weight_file(root).unlink()


def truncated_weights(root):
    path = weight_file(root)
    path.write_bytes(path.read_bytes()[:-1000])


def foreign_files(root):
    shutil.rmtree(root)
    root.mkdir()
    (root / "holiday.jpg").write_bytes(b"")


def broken_config(root):
    (root / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (missing_folder, "other: expected a model folder"),
        (missing_weights, "other: expected"),
        (truncated_weights, "safetensors: cannot be read as weights"),
        (foreign_files, "other: expected a model folder"),
        (broken_config, r"config\.json"),
    ],
)
def test_a_bad_folder_is_told_by_name_and_the_next_good_one_works(
    warm, look, own_models, spoil, named
):
    warm.networks_for(look())
    spoil(own_models / "other")
    for _ in range(2):
        with pytest.raises(errors.WeightsUnusable, match=named):
            warm.networks_for(look(model_path="other"))
    assert warm.networks_for(look()) is not None
    assert len(warm.weight_hashes()) == 3


def test_a_missing_folder_does_not_cost_the_warm_model(warm, look):
    first = warm.networks_for(look())
    with pytest.raises(errors.WeightsUnusable):
        warm.networks_for(look(model_path="gone"))
    assert warm.networks_for(look()) is first


def test_hashes_are_of_the_resident_model(warm, look, own_models):
    warm.networks_for(look())
    assert warm.weight_hashes() == layout.weight_hashes(layout.find(own_models / "tiny"))


def test_hashes_are_read_once_per_machine(warm, look, reads, own_models, tmp_path, cpu):
    for _ in range(3):
        again = components.Components(models_dir=own_models, home=tmp_path / "home", device=cpu)
        again.networks_for(look())
        assert len(again.weight_hashes()) == 3
    assert len(reads) == 1


def test_a_changed_file_is_read_again(own_models, cache, reads):
    root = own_models / "tiny"
    first = components.cached_weight_hashes(layout.find(root), cache=cache)
    path = weight_file(root)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    second = components.cached_weight_hashes(layout.find(root), cache=cache)
    assert len(reads) == 2
    assert first[path.name] != second[path.name]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1]", b"\xff", b'{"key": 5}', b'{"key": {"file": 5}}']
)
def test_a_damaged_cache_is_made_anew(own_models, cache, reads, damage):
    files = layout.find(own_models / "tiny")
    cache.parent.mkdir()
    cache.write_bytes(damage)
    for _ in range(2):
        assert len(components.cached_weight_hashes(files, cache=cache)) == 3
    assert len(reads) == 1
    assert json.loads(cache.read_bytes())


def test_models_share_the_cache(own_models, cache, reads):
    for name in ("tiny", "other", "tiny", "other"):
        components.cached_weight_hashes(layout.find(own_models / name), cache=cache)
    assert [root.name for root in reads] == ["tiny", "other"]


def test_a_home_that_cannot_be_written_costs_the_cache_alone(own_models, tmp_path, reads):
    (tmp_path / "home").write_text("a file")
    files = layout.find(own_models / "tiny")
    cache = tmp_path / "home" / components.HASHES_FILE
    assert len(components.cached_weight_hashes(files, cache=cache)) == 3


def test_weights_that_vanish_after_loading_cost_the_hashes_alone(warm, look, own_models):
    """Not the render, and not for ever: they are known again when the files are."""
    networks = warm.networks_for(look())
    warm.weight_hashes()
    path = weight_file(own_models / "tiny")
    moved = path.rename(path.with_suffix(".away"))
    warm._begin_to_hash(warm._files)
    assert warm.weight_hashes() is None
    moved.rename(path)
    warm.weight_hashes()
    assert warm.networks_for(look()) is networks
    assert len(warm.weight_hashes()) == 3
