"""Networks stay warm, a bad folder is told by name, and hashes are read once per machine."""

import contextlib
import dataclasses
import json
import os
import shutil
import threading
import time
import weakref
from concurrent import futures

import pytest
import safetensors.torch
import structlog
import torch

from models import layout, memory, quantization, quantized_files, rope, stamps
from worker import components, copies, errors, hashes, host_memory, replaced, room, wanted

NUM_FILES = 8  # three of weights, three configs, two of the tokenizer


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


def hashed(files, cache):
    as_loaded = [stamps.of(path) for path in files.weights + files.configs]
    return hashes.of(files, as_loaded=as_loaded, cache=cache)


def known(warm, model):
    """Hashes of its weights, as a render asks for them."""
    hashing = warm.hashing(model)
    futures.wait([hashing])
    return warm.weight_hashes(hashing)


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


def config_of_another_size(root):
    path = root / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"dim": 256}))


def missing_config_of_vae(root):
    (root / "vae_config.json").unlink()


def missing_config_of_text_encoder(root):
    (root / "t5_config.json").unlink()


def broken_tokenizer(root):
    path = root / "google" / "umt5-xxl" / "tokenizer.json"
    path.write_bytes(b"{" + b"\0" * 500 + b"}")


def vae_of_another_network(root):
    shutil.copy(layout.find(root).text_encoder[0], layout.find(root).vae[0])


def transformer_of_another_network(root):
    tensors = safetensors.torch.load_file(weight_file(root))
    tensors["patch_embedding.weight"] = torch.zeros(8, 4, 1, 2, 2)
    safetensors.torch.save_file(tensors, weight_file(root))


@pytest.mark.parametrize(
    ("spoil", "named", "fault"),
    [
        (missing_folder, "other: expected a model folder", errors.WeightsAbsent),
        (missing_weights, "other: expected", errors.WeightsAbsent),
        (truncated_weights, "safetensors: cannot be read as weights", errors.WeightsAbsent),
        (foreign_files, "other: expected a model folder", errors.WeightsAbsent),
        (broken_config, r"config\.json", errors.WeightsAbsent),
        (config_of_another_size, r"config\.json: describes", errors.WeightsAbsent),
        (missing_config_of_vae, r"VAE\.pth: .* missing tensors", errors.WeightsAbsent),
        (missing_config_of_text_encoder, r"config\.json: takes text", errors.WeightsAbsent),
        (broken_tokenizer, "umt5-xxl: is no usable tokenizer", errors.WeightsAbsent),
        (vae_of_another_network, r"VAE\.pth: .* missing tensors", errors.WeightsAbsent),
        (transformer_of_another_network, "describes a patch_embedding", errors.WeightsAbsent),
    ],
)
def test_a_bad_folder_is_told_by_name_and_the_next_good_one_works(
    warm, look, own_models, spoil, named, fault
):
    warm.model_for(look())
    spoil(own_models / "other")
    for _ in range(2):
        with pytest.raises(fault, match=named):
            warm.model_for(look(model_path="other"))
    assert len(known(warm, warm.model_for(look()))) == NUM_FILES


@pytest.fixture
def named_look(look, own_models):
    """A look that names the transformer of another folder, and `other` for all else."""
    weight_file(own_models / "tiny").rename(own_models / "fine.safetensors")
    return look(model_path="other", transformer="fine.safetensors")


@pytest.mark.parametrize(
    "spoil", [missing_weights, vae_of_another_network, broken_tokenizer, broken_config]
)
def test_a_bad_folder_is_told_also_where_the_look_names_its_transformer(
    warm, named_look, own_models, spoil
):
    spoil(own_models / "other")
    with pytest.raises(errors.WeightsAbsent):
        warm.model_for(named_look)


def test_a_file_that_a_look_names_takes_no_worker_away(warm, named_look, own_models):
    """Wherever it lies: others of the model do without it."""
    path = own_models / "fine.safetensors"
    warm.model_for(named_look)
    config_of_another_size(own_models / "other")
    with pytest.raises(errors.WeightsUnusable, match=r"config\.json: describes"):
        components.Components(models_dir=own_models, home=warm.home, device=warm.device).model_for(
            named_look
        )
    inside = own_models / "tiny" / "mine"
    inside.mkdir()
    path = path.rename(inside / "fine.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    for named in ("tiny/mine/fine.safetensors", "tiny/mine", "tiny/loras/nothing"):
        with pytest.raises(errors.WeightsUnusable):
            warm.model_for(named_look.with_changes({"model_path": "tiny", "transformer": named}))


def shards_below_an_index(root, tensors):
    (root / "sh").mkdir()
    names = sorted(tensors)
    parts = {"a": names[:9], "b": names[9:-1]}  # one is missing
    for part, held in parts.items():
        held = {name: tensors[name] for name in held}
        safetensors.torch.save_file(held, root / "sh" / f"{part}.safetensors")
    where = {name: f"sh/{part}.safetensors" for part, held in parts.items() for name in held}
    (root / "a.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return {"transformer": "tiny/a.safetensors.index.json"}


def config_beside(content):
    def spoil(root, tensors):
        (root / "distill_fp8").mkdir()
        safetensors.torch.save_file(tensors, root / "distill_fp8" / "x.safetensors")
        (root / "distill_fp8" / "config.json").write_text(content)
        return {"transformer": "tiny/distill_fp8"}

    return spoil


def damaged_lora(root, tensors):
    (root / "style.safetensors").write_bytes(b"x")
    return {"loras": [{"path": "tiny/style.safetensors"}]}


@pytest.mark.parametrize(
    "spoil",
    [shards_below_an_index, config_beside("{"), config_beside('{"dim": 8}'), damaged_lora],
)
def test_what_a_look_alone_asks_for_is_its_own_inside_the_folder_too(warm, look, own_models, spoil):
    root = own_models / "tiny"
    asked = spoil(root, safetensors.torch.load_file(weight_file(root)))
    with pytest.raises(errors.WeightsUnusable):
        warm.model_for(look(**asked))


def test_a_missing_folder_does_not_cost_the_warm_model(warm, look):
    first = warm.model_for(look())
    with pytest.raises(errors.WeightsAbsent):
        warm.model_for(look(model_path="gone"))
    assert warm.model_for(look()) is first


def test_hashes_are_of_the_resident_model(warm, look, own_models):
    model = warm.model_for(look())
    assert known(warm, model) == layout.weight_hashes(layout.find(own_models / "tiny"))


def test_hashes_are_read_once_per_machine(warm, look, reads, own_models, tmp_path, cpu):
    for _ in range(3):
        again = components.Components(models_dir=own_models, home=tmp_path / "home", device=cpu)
        assert len(known(again, again.model_for(look()))) == NUM_FILES
    assert len(reads) == 1


def test_a_changed_file_is_read_again(own_models, cache, reads):
    root = own_models / "tiny"
    first = hashed(layout.find(root), cache)
    path = weight_file(root)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    second = hashed(layout.find(root), cache)
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
        assert len(hashed(files, cache)) == NUM_FILES
    assert len(reads) == 1
    assert json.loads(cache.read_bytes())


def test_models_share_the_cache(own_models, cache, reads):
    for name in ("tiny", "other", "tiny", "other"):
        hashed(layout.find(own_models / name), cache)
    assert [root.name for root in reads] == ["tiny", "other"]


def test_a_home_that_cannot_be_written_costs_the_cache_alone(own_models, tmp_path, reads):
    (tmp_path / "home").write_text("a file")
    files = layout.find(own_models / "tiny")
    cache = tmp_path / "home" / hashes.HASHES_FILE
    assert len(hashed(files, cache)) == NUM_FILES


def test_weights_that_vanish_after_loading_cost_the_hashes_alone(warm, look, own_models, cache):
    """Not the render, and not for ever: they are known again when the files are."""
    path = weight_file(own_models / "tiny")
    model = warm.model_for(look())
    known(warm, model)
    cache.unlink()
    moved = path.rename(path.with_suffix(".away"))
    model.hashes = warm._hasher.submit(warm._hash, model.files, model.as_loaded)
    assert known(warm, model) is None
    moved.rename(path)
    assert warm.model_for(look()) is model
    assert len(known(warm, model)) == NUM_FILES


def replace(path):
    """As mv and rsync do it; another content of the same size. Gives the old one back."""
    kept = path.with_suffix(".kept")
    shutil.copy2(path, kept)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.rename(path)
    return kept


def test_hashes_name_no_file_that_was_put_in_place_of_what_was_loaded(
    warm, look, own_models, tmp_path, cpu, monkeypatch
):
    """Reading them takes a minute; nor are they kept for those who find the old file back."""
    path, may_read = weight_file(own_models / "tiny"), threading.Event()
    old, real = layout.weight_hashes(layout.find(own_models / "tiny")), layout.weight_hashes
    monkeypatch.setattr(layout, "weight_hashes", lambda files: may_read.wait(30) and real(files))
    model = warm.model_for(look())
    old_file = replace(path)
    may_read.set()
    assert known(warm, model) is None
    shutil.copy2(old_file, path)
    fresh = components.Components(models_dir=own_models, home=tmp_path / "home", device=cpu)
    assert known(fresh, fresh.model_for(look())) == old


def test_a_file_that_is_replaced_while_it_is_loaded_costs_its_job_nothing(
    warm, look, own_models, monkeypatch
):
    """It goes back: of some of the weights nobody knows which they are."""
    real = components.checkpoint.load

    def load(*arguments, **options):
        networks = real(*arguments, **options)
        replace(weight_file(own_models / "tiny"))
        return networks

    monkeypatch.setattr(components.checkpoint, "load", load)
    with pytest.raises(errors.WeightsAbsent, match="was replaced while it was loaded"):
        warm.model_for(look())
    monkeypatch.undo()
    root = own_models / "tiny"
    assert known(warm, warm.model_for(look())) == layout.weight_hashes(layout.find(root))


WITH_LORA = {"base": "original", "loras": [{"path": "tiny/loras/distill_lora.safetensors"}]}


@pytest.mark.parametrize(
    ("header", "told"),
    [
        ({"denoising_step_list": "[1000, 700, 400, 150]", "step_rule": "euler"}, 1),
        ({"step_rule": "renoise", "sample_shift": "3"}, 2),
        ({"denoising_step_list": "[1000, 750, 500, 250]", "sample_shift": "5"}, 0),
        ({"denoising_step_list": "[" * 5000, "sample_shift": "much"}, 0),
        ({}, 0),
    ],
)
@pytest.mark.parametrize("file", ["distill_models/distill_model", "loras/distill_lora"])
def test_other_steps_than_a_file_was_distilled_for_are_told_once(
    warm, look, own_models, file, header, told
):
    path = own_models / "tiny" / f"{file}.safetensors"
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, header or None)
    asked = look(**WITH_LORA) if "lora" in file else look()
    with structlog.testing.capture_logs() as logs:
        warm.model_for(asked)
        warm.model_for(asked)
    warnings = [each["because"] for each in logs if each["event"] == "model.unlike_header"]
    assert len(warnings) == told
    assert all(str(path) in each and "the preset has" in each for each in warnings)


def test_a_text_encoder_for_the_processor_never_comes_to_the_device(warm, look, monkeypatch):
    """Neither while the model is loaded, which the estimate of its memory does not count."""
    warm.device = dataclasses.replace(warm.device, torch_device=torch.device("meta"))
    loaded = []

    def load(*_, device, **__):
        loaded.append(device.type)
        raise OSError("seen enough")

    monkeypatch.setattr(components.checkpoint, "load", load)
    for changes in ({"unload_encoders": True}, {}):
        with pytest.raises(errors.WeightsAbsent):
            warm.model_for(look(**changes))
    assert loaded == ["cpu", "meta"]


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
    (accounted,) = warm.report(renders=0).resident
    assert warm.model_for(plain) is model
    (kept,) = warm.report(renders=0).resident
    assert kept.host_bytes == accounted.host_bytes
    state = model.networks.transformer.state_dict()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)


def test_a_lora_that_was_replaced_is_applied_anew(warm, look, own_models):
    """Else the sidecar would name a file that the video was not made with."""
    asked = look(**WITH_LORA)
    path = own_models / asked.loras[0].path
    model = warm.model_for(asked)
    modulation = model.networks.transformer.head.modulation
    before, hashed = modulation.clone(), warm.lora_hashes(asked, model)
    warm.model_for(asked)
    assert warm.lora_switches == 1
    tensors = safetensors.torch.load_file(path)
    tensors["diffusion_model.head.diff_m"] += 1
    safetensors.torch.save_file(tensors, path)
    assert warm.lora_hashes(asked, model) is None  # of what was merged it is not known any more
    after = warm.model_for(asked).networks.transformer.head.modulation
    assert torch.allclose(after, before + 1, atol=1e-2)
    assert warm.lora_hashes(asked, model) not in (None, hashed)
    assert (warm.loads, warm.lora_switches) == (1, 2)
    path.unlink()
    with pytest.raises(
        errors.WeightsUnusable, match=r"^tiny/loras: expected the LoRA distill_lora"
    ):
        warm.model_for(asked)


def test_a_lora_of_the_same_size_and_time_is_another(warm, look, own_models):
    """Archives with fixed times unpack to such files."""
    asked = look(**WITH_LORA)
    path = own_models / asked.loras[0].path
    hashed = warm.lora_hashes(asked, warm.model_for(asked))
    with as_old_as(path):
        tensors = safetensors.torch.load_file(path)
        safetensors.torch.save_file({name: -tensors[name] for name in tensors}, path)
    model = warm.model_for(asked)
    assert warm.lora_switches == 2
    assert warm.lora_hashes(asked, model) not in (None, hashed)


def test_a_weight_file_of_the_same_size_and_time_is_read_again(own_models, cache, reads):
    files = layout.find(own_models / "tiny")
    first = hashed(files, cache)
    with as_old_as(files.transformer[0]):
        replace(files.transformer[0])
    assert hashed(files, cache) != first


@pytest.mark.parametrize("name", ["google/umt5-xxl/tokenizer.json", "config.json"])
def test_hashes_tell_another_tokenizer_or_config(warm, look, own_models, tmp_path, cpu, name):
    """Which change the video as weights do."""
    first = known(warm, warm.model_for(look()))
    path = own_models / "tiny" / name
    path.write_text(path.read_text() + "\n")
    fresh = components.Components(models_dir=own_models, home=tmp_path / "home", device=cpu)
    second = known(fresh, fresh.model_for(look()))
    assert {key for key in first if first[key] != second[key]} == {name}


@contextlib.contextmanager
def as_old_as(path):
    """Of the same size and time, however it is written."""
    before = path.stat()
    yield
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size


def test_weights_that_were_replaced_are_loaded_anew_by_the_next_attempt(warm, look, own_models):
    """Not merged into by halves: the old ones are gone from the disk, for which no job pays."""
    plain = look(base="original")
    first = warm.model_for(plain)
    path = own_models / "tiny" / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["head.modulation"] = tensors["head.modulation"] + 1
    safetensors.torch.save_file(tensors, path)
    with pytest.raises(errors.WeightsAbsent, match="has changed since it was loaded"):
        warm.model_for(look(**WITH_LORA))
    assert warm.model_for(plain) is not first
    found = warm.model_for(plain).networks.transformer.head.modulation
    assert torch.equal(found, tensors["head.modulation"])


def shifted(path, by):
    """The same network with another modulation of its head, of the same names."""
    tensors = safetensors.torch.load_file(path)
    tensors["head.modulation"] = tensors["head.modulation"] + by
    safetensors.torch.save_file(tensors, path)


def test_a_distilled_model_that_is_copied_beside_a_warm_base_is_taken_when_it_is_there(
    warm, look, own_models, monkeypatch
):
    path = weight_file(own_models / "tiny")
    away = path.parent.rename(own_models / "away")
    base = warm.model_for(look())
    away.rename(path.parent)
    assert warm.model_for(look()) is base  # the copy may not have ended
    monkeypatch.setattr(copies, "COPIED_SECONDS", 0.0)
    with structlog.testing.capture_logs() as logs:
        distilled = warm.model_for(look())
    assert base.files.transformer != distilled.files.transformer == (path,)
    assert [each["event"] for each in logs][:2] == ["model.replaced", "model.evicted"]
    assert warm.model_for(look()) is distilled
    assert warm.loads == 2


def test_a_distilled_model_that_is_taken_away_is_waited_for(warm, look, own_models, monkeypatch):
    """Another one may be about to be copied to its place; a minute later the base is rendered."""
    root, first = own_models / "tiny", warm.model_for(look())
    time.sleep(0.6)  # all else is older
    shutil.rmtree(root / "distill_models")
    now = root.stat().st_ctime + copies.COPIED_SECONDS - 0.3
    monkeypatch.setattr(copies.time, "time", lambda: now)
    assert warm.model_for(look()) is first
    now += 0.6
    assert warm.model_for(look()).files != first.files


def test_a_transformer_that_a_look_names_is_waited_for_where_it_lies(
    warm, named_look, own_models, monkeypatch
):
    """As what lies in the model's folder is; and it is not taken for another one afterwards."""
    first, path = warm.model_for(named_look), own_models / "fine.safetensors"
    time.sleep(0.6)  # all else is older
    shifted(path, by=1)
    now = path.stat().st_ctime + copies.COPIED_SECONDS - 0.3
    monkeypatch.setattr(copies.time, "time", lambda: now)
    assert warm.model_for(named_look) is first
    now += 0.6
    anew = warm.model_for(named_look)
    assert anew is not first
    assert warm.model_for(named_look) is anew


def test_a_folder_that_is_a_link_is_loaded_anew_where_it_leads_elsewhere(
    warm, look, own_models, monkeypatch
):
    """At once, and no job pays for it: neither one with the same LoRA, nor the next without it."""
    monkeypatch.setattr(copies, "COPIED_SECONDS", 0.0)
    old, new, link = (own_models / name for name in ("v1", "v2", "tiny"))
    link.rename(old)
    shutil.copytree(old, new)
    shifted(new / "diffusion_pytorch_model.safetensors", by=1)
    link.symlink_to(old)
    with_lora, plain = look(**WITH_LORA), look(base="original")
    before = warm.model_for(with_lora).networks.transformer.head.modulation.clone()
    link.unlink()
    link.symlink_to(new)
    after = warm.model_for(with_lora).networks.transformer.head.modulation
    assert torch.allclose(after, before + 1, atol=1e-2)
    warm.model_for(plain)
    assert warm.loads == 2


@pytest.mark.parametrize("spoil", [missing_folder, missing_weights, broken_config])
def test_files_that_make_no_model_cost_no_warm_one(warm, look, own_models, monkeypatch, spoil):
    monkeypatch.setattr(copies, "COPIED_SECONDS", 0.0)
    first = warm.model_for(look())
    spoil(own_models / "tiny")
    assert warm.model_for(look()) is first


def test_a_models_folder_that_hangs_holds_up_no_warm_model(warm, look, monkeypatch):
    """It is not asked again before it has answered."""
    first = warm.model_for(look())
    asked, answers = [], threading.Event()
    monkeypatch.setattr(replaced, "DISK_SECONDS", 0.1)
    monkeypatch.setattr(
        replaced.layout, "find", lambda *_, **__: asked.append(1) or answers.wait(30)
    )
    for _ in range(3):
        assert warm.model_for(look()) is first
        monkeypatch.setattr(replaced, "DISK_SECONDS", 60.0)  # nobody waits a second time
    assert len(asked) == 1
    answers.set()


def test_frames_are_decoded_in_the_type_that_each_look_asks_for(warm, look):
    asked = {None: torch.float32, "bf16": torch.bfloat16, "fp32": torch.float32}
    found = {name: warm.model_for(look(vae_dtype=name)).networks.vae.dtype for name in asked}
    assert found == asked


def test_a_refused_lora_leaves_none_in_the_report(warm, look, own_models):
    """What is merged after a failure is not known."""
    path = own_models / "style.safetensors"
    safetensors.torch.save_file({"other": torch.zeros(1)}, path)
    warm.model_for(look(**WITH_LORA))
    assert [told.loras for told in warm.report(renders=0).resident] == [
        (WITH_LORA["loras"][0]["path"],)
    ]
    with pytest.raises(errors.LoraUnfit):
        warm.model_for(look(base="original", loras=[{"path": path.name}]))
    assert [told.loras for told in warm.report(renders=0).resident] == [()]


def test_models_that_fit_stay_warm_side_by_side(warm, look):
    for _ in range(5):
        warm.model_for(look())
        warm.model_for(look(model_path="other"))
    assert warm.loads == 2


def test_the_least_recently_used_model_goes_when_room_is_needed(warm, look, own_models):
    shutil.copytree(own_models / "tiny", own_models / "third")
    first, second = warm.model_for(look()), warm.model_for(look(model_path="other"))
    warm.model_for(look())  # now the other one is the least recently used
    share = share_of(warm, look())
    warm.host_bytes = share.host_peak + share.host_resident
    warm.model_for(look(model_path="third"))
    assert warm.model_for(look()) is first
    assert warm.model_for(look(model_path="other")) is not second


def test_a_larger_job_of_a_warm_model_evicts_the_others(warm, look):
    """Before it runs out of memory, which would cost it a slower mode."""
    first, other = warm.model_for(look()), warm.model_for(look(model_path="other"))
    small, large = look(), look(width=256, height=256)
    both = share_of(warm, large).host_peak + share_of(warm, small).host_resident
    warm.host_bytes = both - 1
    assert warm.model_for(small) is first
    assert warm.model_for(look(model_path="other")) is other
    assert warm.model_for(large) is first
    assert [told.model for told in warm.report(renders=0).resident] == [str(first.key.root)]


def test_parked_models_are_accounted_on_the_host(warm, look):
    share = share_of(warm, look(offload="model"))
    weights = sum(path.stat().st_size for path in layout.find(warm.models_dir / "tiny").weights)
    assert share.host_resident >= weights
    warm.model_for(look())
    warm.host_bytes = share.host_peak
    warm.model_for(look(offload="model"))
    (told,) = warm.report(renders=0).resident
    assert (told.memory, told.host_bytes) == ("model offload", share.host_resident)


def test_copies_for_loras_are_accounted_on_the_host(warm, look, tmp_path):
    """Of weights that cannot be read again; they stay when the next job wants no LoRA."""
    files = layout.find(warm.models_dir / "tiny")
    pickled = tmp_path / "distill_model.pt"
    torch.save(safetensors.torch.load_file(files.transformer[0]), pickled)
    files = dataclasses.replace(files, transformer=(pickled,))
    plain, with_lora = (
        room.share_of(wanted.needed(each, files, memory.Mode(), warm.models_dir), warm.device)
        for each in (look(), look(loras=[{"path": "x"}]))
    )
    copies = with_lora.host_resident - plain.host_resident
    assert copies >= pickled.stat().st_size * 0.9
    assert plain.kept_beside(with_lora).host_resident == with_lora.host_resident


def test_what_a_look_asks_for_is_in_its_need(warm, look, own_models):
    """Frames in fp32, and a LoRA beside weights in 8 bits."""
    quantized = own_models / "fp8.safetensors"
    quantized_files.write(layout.find(own_models / "tiny"), quantized, quantization.Scheme.FP8)

    def resident_bytes(**changes):
        asked = look(**changes)
        files = wanted.find(asked, own_models)
        need = wanted.needed(asked, files, wanted.mode_of(asked), own_models)
        return need.resident_bytes

    assert resident_bytes(vae_dtype="fp32") > resident_bytes(vae_dtype="bf16")
    in_fp8 = {"transformer": quantized.name}
    assert resident_bytes(**in_fp8, loras=WITH_LORA["loras"]) > resident_bytes(**in_fp8)


def test_a_model_whose_going_would_not_help_stays(warm, look, monkeypatch):
    """It is on the device alone, and main memory is short."""
    none = {"device_resident": 0, "device_peak": 0, "host_resident": 0, "host_peak": 0}
    shares = [room.Share(**none | {"device_resident": 8}), room.Share(**none | {"host_peak": 8})]
    monkeypatch.setattr(room, "share_of", lambda *_: shares.pop(0))
    warm.model_for(look())
    warm.host_bytes = 7
    with pytest.raises(errors.HostOutOfMemory):
        warm.model_for(look(model_path="other"))
    assert [told.device_bytes for told in warm.report(renders=0).resident] == [8]


def test_memory_of_a_model_that_goes_is_given_back(warm, look):
    """Tables for its sizes go with it, and so does what the allocators keep for their next use."""
    warm.model_for(look())
    rope.table((1, 1, 1), 12, warm.device.torch_device, torch.float32)
    warm.step_down(look())
    assert rope.table.cache_info().currsize == 0


def test_too_little_main_memory_is_refused_before_it_is_taken(warm, look):
    share = share_of(warm, look())
    warm.host_bytes = share.host_peak - 1
    with pytest.raises(errors.HostOutOfMemory, match=r"main memory: needs about .* GB free"):
        warm.model_for(look())
    assert warm.loads == 0
    warm.host_bytes = share.host_peak
    warm.model_for(look())


def test_what_is_free_is_measured(warm, look, monkeypatch):
    """Other processes, such as those of other devices, take from the same memory."""
    full = host_memory.HostMemory(total_bytes=1 << 40, free_bytes=room.HOST_SPARE_BYTES)
    first = warm.model_for(look())
    monkeypatch.setattr(host_memory, "now", lambda: full)
    with pytest.raises(errors.HostOutOfMemory):
        warm.model_for(look(model_path="other"))
    assert warm.report(renders=0).resident == ()  # all that could go went first
    monkeypatch.undo()
    assert warm.model_for(look()) is not first


def test_texts_that_are_kept_go_before_a_model_does(warm, look, monkeypatch):
    """One that is short of main memory by no more than them costs no job an attempt."""
    first = warm.model_for(look())
    encoded = []
    monkeypatch.setattr(first, "_encode_text", lambda text: encoded.append(text) or torch.ones(1))
    first.encode_text("a")
    is_held = weakref.ref(first._contexts._kept["a"])

    def now():
        free = room.HOST_SPARE_BYTES + (0 if is_held() is not None else 1 << 39)
        return host_memory.HostMemory(total_bytes=1 << 40, free_bytes=free)

    monkeypatch.setattr(host_memory, "now", now)
    warm.model_for(look(model_path="other"))
    assert len(warm.report(renders=0).resident) == 2
    first.encode_text("a")
    assert encoded == ["a", "a"]


def test_two_processes_that_load_at_once_do_not_count_on_the_same_memory(
    own_models, tmp_path, cpu, look, monkeypatch
):
    """The second waits until the first has taken its part, and measures what is left then."""
    first, second = (
        components.Components(models_dir=own_models, home=tmp_path / "home", device=cpu)
        for _ in range(2)
    )
    one = share_of(first, look()).host_peak
    enough_for_one = room.HOST_SPARE_BYTES + one + one // 2

    def now():
        free = enough_for_one - one * (first.loads + second.loads)
        return host_memory.HostMemory(total_bytes=1 << 40, free_bytes=max(free, 0))

    monkeypatch.setattr(host_memory, "now", now)
    is_loading, may_go_on = threading.Event(), threading.Event()
    load = first._load

    def slow_load(*arguments):
        is_loading.set()
        assert may_go_on.wait(30)
        return load(*arguments)

    monkeypatch.setattr(first, "_load", slow_load)
    with futures.ThreadPoolExecutor(2) as threads:
        loaded = threads.submit(first.model_for, look())
        assert is_loading.wait(30)
        refused = threads.submit(second.model_for, look())
        with pytest.raises(TimeoutError):
            refused.result(timeout=3 * components.LOOK_SECONDS)
        may_go_on.set()
        loaded.result()
        with pytest.raises(errors.HostOutOfMemory):
            refused.result()
    assert (first.loads, second.loads) == (1, 0)
    monkeypatch.undo()
    second.model_for(look())  # nothing is left reserved


def test_a_folder_that_goes_away_costs_a_job_with_a_lora_nothing(warm, look, own_models):
    """Its model is warm, so the LoRA is the first to be missed; that is no fault of the job."""
    asked = look(**WITH_LORA)
    warm.model_for(asked)
    away = (own_models / "tiny").rename(own_models / "away")
    with pytest.raises(errors.WeightsAbsent, match=r"tiny was there .* and is gone"):
        warm.model_for(asked)
    away.rename(own_models / "tiny")
    warm.model_for(asked)
    assert warm.loads == 1


def test_weights_that_vanished_are_loaded_anew_when_they_are_back(warm, look, own_models):
    path = own_models / "tiny" / "diffusion_pytorch_model.safetensors"
    for asked in (look(**WITH_LORA), look(base="original")):
        warm.model_for(asked)
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(errors.WeightsUnusable, match="cannot be read"):
        warm.model_for(look(**WITH_LORA))
    path.write_bytes(content)
    warm.model_for(look(**WITH_LORA))
    assert warm.loads == 2


def test_a_look_that_asks_for_what_no_host_has_takes_no_worker_away(warm, look):
    for asks, error in (
        ({"transformer": "nowhere.safetensors"}, errors.WeightsUnusable),
        ({"loras": [{"path": "nowhere.safetensors"}]}, errors.WeightsUnusable),
        ({"task": "i2v"}, errors.SpecUnusable),
    ):
        with pytest.raises(error):
            warm.model_for(look(**asks))


@pytest.mark.parametrize("name", ["nowhere", "a" * 250])
def test_a_lora_that_is_not_there_takes_no_worker_away(warm, look, own_models, name):
    """Nor where the folder itself would be doubtful, were the look to take a distilled model."""
    shutil.rmtree(own_models / "tiny" / "distill_models")
    for name in ("distill_fp8", "distill_int8"):
        (own_models / "tiny" / name).mkdir()
    nowhere = look(base="original", loras=[{"path": f"{name}.safetensors"}])
    with pytest.raises(errors.WeightsUnusable, match=f"^tiny: expected the LoRA at {name[:30]}"):
        warm.model_for(nowhere)


def test_a_lora_for_images_on_a_model_without_them_is_told_before_that_is_loaded(
    warm, look, own_models
):
    path = own_models / "style.safetensors"
    keys = [f"diffusion_model.blocks.0.cross_attn.k_img.lora_{half}.weight" for half in ("A", "B")]
    safetensors.torch.save_file({key: torch.zeros(4, 4) for key in keys}, path)
    with pytest.raises(errors.LoraUnfit, match=r"^style\.safetensors: 2 keys are for images"):
        warm.model_for(look(base="original", loras=[{"path": path.name}]))
    assert warm.loads == 0


def test_a_lora_that_cannot_fit_is_told_apart_from_one_that_cannot_be_read(warm, look, own_models):
    """And nothing of it stays in the weights."""
    path = own_models / "style.safetensors"
    asked = look(base="original", loras=[{"path": path.name}])
    network = warm.model_for(look(base="original")).networks.transformer
    before = [parameter.clone() for parameter in network.parameters()]
    real = safetensors.torch.load_file(own_models / look(**WITH_LORA).loras[0].path)
    for tensors, counts in (
        ({"other": torch.zeros(1)}, r"0 keys match the network; 1 keys do not \(other\)"),
        (real | {"other": torch.zeros(1)}, rf"{len(real)} keys match the network; 1 keys do not"),
        ({name: tensor.int() for name, tensor in real.items()}, r"torch\.int32, expected float16"),
    ):
        safetensors.torch.save_file(tensors, path)
        with pytest.raises(errors.LoraUnfit, match=counts):
            warm.model_for(asked)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(errors.WeightsUnusable, match="cannot be read as weights"):
        warm.model_for(asked)
    assert all(map(torch.equal, network.parameters(), before))
    assert warm.loads == 1


def test_two_transformers_and_a_boundary_between_them_go_together(
    warm, look, own_models, monkeypatch
):
    monkeypatch.setattr(copies, "COPIED_SECONDS", 0.0)
    with pytest.raises(errors.SpecUnusable, match="one transformer, and the preset a boundary"):
        warm.model_for(look(boundary_step_index=2))
    root = own_models / "other"
    for name in ("high_noise_model", "low_noise_model"):
        (root / name).mkdir()
        shutil.copy(root / "diffusion_pytorch_model.safetensors", root / name)
    with pytest.raises(errors.SpecUnusable, match="two transformers, and the preset no bound"):
        warm.model_for(look(model_path="other"))
    both = warm.model_for(look(model_path="other", boundary_step_index=2))
    assert warm.model_for(look(model_path="other", boundary_step_index=2)) is both
    named = look(
        model_path="other",
        high_noise_transformer="other/high_noise_model",
        low_noise_transformer="other/low_noise_model",
        boundary_step_index=2,
    )
    assert warm.model_for(named) is warm.model_for(named)


def share_of(warm, look):
    files = layout.find(warm.models_dir / look.model_path)
    need = wanted.needed(look, files, wanted.mode_of(look), warm.models_dir)
    return room.share_of(need, warm.device)


LADDER = ["model offload", "block offload", "block offload, VAE in tiles"]


@pytest.mark.parametrize(
    ("changes", "modes"),
    [
        ({}, ["resident", *LADDER]),
        ({"text_encoder_on_cpu": True}, ["encoders parked", *LADDER]),
        ({"offload": "model"}, LADDER),
        ({"offload": "block"}, LADDER[1:]),
        ({"offload": "block", "vae_tiling": True}, LADDER[2:]),
        ({"vae_tiling": True}, ["VAE in tiles", "model offload, VAE in tiles", LADDER[2]]),
    ],
)
def test_every_mode_steps_down_to_the_smallest_and_no_further(warm, look, changes, modes):
    asked = look(**changes)
    told = [wanted.told(warm.mode_of(asked))]
    while warm.step_down(asked) is not None:
        told.append(wanted.told(warm.mode_of(asked)))
    assert told == modes
