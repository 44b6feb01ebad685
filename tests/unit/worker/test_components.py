"""Networks stay warm, a bad folder is told by name, and hashes are read once per machine."""

import json
import shutil

import pytest
import safetensors.torch
import torch

from models import layout, memory
from worker import components, errors, hashes


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
    return tmp_path / "home" / hashes.HASHES_FILE


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
    first = warm.model_for(look())
    assert all(warm.model_for(look(width=side)) is first for side in (16, 32, 64))
    assert warm.loads == 1


def test_a_model_may_lie_anywhere(warm, look, own_models):
    warm.model_for(look(model_path=str(own_models / "other")))
    assert warm.loads == 1


def missing_folder(root):
    shutil.rmtree(root)


def missing_weights(root):
    layout.find(root).vae[0].unlink()


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
    warm.model_for(look())
    spoil(own_models / "other")
    for _ in range(2):
        with pytest.raises(errors.WeightsUnusable, match=named):
            warm.model_for(look(model_path="other"))
    assert len(warm.weight_hashes(warm.model_for(look()))) == 3


def test_a_missing_folder_does_not_cost_the_warm_model(warm, look):
    first = warm.model_for(look())
    with pytest.raises(errors.WeightsUnusable):
        warm.model_for(look(model_path="gone"))
    assert warm.model_for(look()) is first


def test_hashes_are_of_the_resident_model(warm, look, own_models):
    model = warm.model_for(look())
    assert warm.weight_hashes(model) == layout.weight_hashes(layout.find(own_models / "tiny"))


def test_hashes_are_read_once_per_machine(warm, look, reads, own_models, tmp_path, cpu):
    for _ in range(3):
        again = components.Components(models_dir=own_models, home=tmp_path / "home", device=cpu)
        assert len(again.weight_hashes(again.model_for(look()))) == 3
    assert len(reads) == 1


def test_a_changed_file_is_read_again(own_models, cache, reads):
    root = own_models / "tiny"
    first = hashes.of(layout.find(root), cache=cache)
    path = weight_file(root)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    second = hashes.of(layout.find(root), cache=cache)
    assert len(reads) == 2
    name = path.relative_to(root).as_posix()
    assert first[name] != second[name]


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[1]", b"\xff", b'{"key": 5}', b'{"key": {"file": 5}}']
)
def test_a_damaged_cache_is_made_anew(own_models, cache, reads, damage):
    files = layout.find(own_models / "tiny")
    cache.parent.mkdir()
    cache.write_bytes(damage)
    for _ in range(2):
        assert len(hashes.of(files, cache=cache)) == 3
    assert len(reads) == 1
    assert json.loads(cache.read_bytes())


def test_models_share_the_cache(own_models, cache, reads):
    for name in ("tiny", "other", "tiny", "other"):
        hashes.of(layout.find(own_models / name), cache=cache)
    assert [root.name for root in reads] == ["tiny", "other"]


def test_a_home_that_cannot_be_written_costs_the_cache_alone(own_models, tmp_path, reads):
    (tmp_path / "home").write_text("a file")
    files = layout.find(own_models / "tiny")
    cache = tmp_path / "home" / hashes.HASHES_FILE
    assert len(hashes.of(files, cache=cache)) == 3


def test_weights_that_vanish_after_loading_cost_the_hashes_alone(warm, look, own_models):
    """Not the render, and not for ever: they are known again when the files are."""
    path = weight_file(own_models / "tiny")
    model = warm.model_for(look())
    warm.weight_hashes(model)
    moved = path.rename(path.with_suffix(".away"))
    model.hashes = warm._hasher.submit(warm._hash, model.files)
    assert warm.weight_hashes(model) is None
    moved.rename(path)
    warm.weight_hashes(model)
    assert warm.model_for(look()) is model
    assert len(warm.weight_hashes(model)) == 3


WITH_LORA = {"base": "original", "loras": [{"path": "tiny/loras/distill_lora.safetensors"}]}


def test_a_lora_takes_no_copies_of_safetensors(warm, look):
    model = warm.model_for(look(**WITH_LORA))
    assert {switcher.kept_bytes for switcher in model._switchers.values()} == {0}


def test_a_lora_on_a_pickle_keeps_copies_and_restores_from_them(warm, look, own_models):
    path = own_models / "tiny" / "distill_models" / "distill_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    torch.save(tensors, path.with_suffix(".pt"))
    path.unlink()
    plain = look(transformer="tiny/distill_models/distill_model.pt")
    lora = plain.with_changes({"loras": WITH_LORA["loras"]})
    model = warm.model_for(lora)
    assert not torch.equal(model.networks.transformer.head.modulation, tensors["head.modulation"])
    assert model._switchers["high_noise_model"].kept_bytes > 0
    assert warm.model_for(plain) is model
    state = model.networks.transformer.state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_weights_that_were_replaced_are_loaded_anew_by_the_next_attempt(warm, look, own_models):
    """Not merged into by halves: the old ones are gone from the disk."""
    plain = look(base="original")
    first = warm.model_for(plain)
    path = own_models / "tiny" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["head.modulation"] = tensors["head.modulation"] + 1
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(errors.WeightsUnusable, match="has changed since it was loaded"):
        warm.model_for(look(**WITH_LORA))
    assert warm.model_for(plain) is not first
    found = warm.model_for(plain).networks.transformer.head.modulation
    assert torch.equal(found, tensors["head.modulation"])


def test_models_that_fit_stay_warm_side_by_side(warm, look):
    for _ in range(5):
        warm.model_for(look())
        warm.model_for(look(model_path="other"))
    assert warm.loads == 2


def test_the_least_recently_used_model_goes_when_room_is_needed(warm, look, own_models):
    shutil.copytree(own_models / "tiny", own_models / "third")
    first = warm.model_for(look())
    room_for_one = memory_of(warm, look())
    warm.total_bytes = int(1.9 * room_for_one)
    second = warm.model_for(look(model_path="other"))
    assert warm.model_for(look(model_path="other")) is second
    assert warm.model_for(look()) is not first


def memory_of(warm, look):
    files = layout.find(warm.models_dir / look.model_path)
    need = memory.needed(files, num_frames=look.num_frames, height=look.height, width=look.width)
    return 2 * need.device_bytes  # fp32
