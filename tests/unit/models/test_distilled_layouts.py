"""Where a distilled transformer may lie: each shape of folder is found, each doubt is an error."""

import dataclasses
import json
import shutil

import pytest
import safetensors.torch
import torch

from models import checkpoint, config, errors, layout, transformer_files
from models.tiny import make

DIT = "diffusion_pytorch_model.safetensors"


def touch(folder, *names):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def split_by_block(tensors, folder):
    """As LightX2V's converter saves by block."""
    folder.mkdir(parents=True)
    files = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        file = f"block_{parts[1]}" if parts[0] == "blocks" else "non_block"
        files.setdefault(f"{file}.safetensors", {})[name] = tensor
    for file, content in files.items():
        safetensors.torch.save_file(content, folder / file)
    return folder


@pytest.fixture
def tensors(native_root):
    return safetensors.torch.load_file(native_root / DIT)


def names_of(files, root):
    return [str(path.relative_to(root)) for path in files]


@pytest.mark.parametrize("folder", ["distill_fp8", "distill_int8"])
@pytest.mark.parametrize(
    "names",
    [
        ("block_0.safetensors", "block_1.safetensors", "non_block.safetensors"),
        ("any_name.safetensors",),
        ("any_name.pt",),
    ],
    ids=["split", "one file", "pt"],
)
def test_an_8_bit_copy_is_used_when_it_is_the_only_distilled_one(native_root, folder, names):
    touch(native_root / folder, *names)
    found = layout.find(native_root).transformer
    assert names_of(found, native_root) == [f"{folder}/{name}" for name in names]
    base = layout.find(native_root, base=True).transformer
    assert base == (native_root / DIT,)


def test_a_complete_distilled_file_comes_before_its_8_bit_copies(native_root):
    touch(native_root / "distill_fp8", "a.safetensors")
    touch(native_root / "distill_int8", "a.safetensors")
    with pytest.raises(errors.AmbiguousFilesError, match="distill_fp8, distill_int8"):
        layout.find(native_root)
    touch(native_root / "distill_models", "distill_model.pt")
    assert layout.find(native_root).transformer[0].name == "distill_model.pt"
    chosen = layout.find(native_root, transformer_file=native_root / "distill_fp8")
    assert chosen.transformer == (native_root / "distill_fp8" / "a.safetensors",)


PUBLISHED = [
    "wan2.1_t2v_14b_lightx2v_4step.safetensors",
    "wan2.1_t2v_14b_scaled_fp8_e4m3_lightx2v_4step.safetensors",
    "wan2.1_t2v_14b_int8_lightx2v_4step.safetensors",
    "wan2.1_i2v_480p_scaled_fp8_e4m3_lightx2v_4step_comfyui.safetensors",
]


@pytest.mark.parametrize("folder", [".", "distill_models"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_known_by_its_name(native_root, folder, name):
    touch(native_root / folder, name, "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors")
    assert layout.find(native_root).transformer == (native_root / folder / name,)
    assert layout.find(native_root, base=True).transformer == (native_root / DIT,)


def test_a_published_split_is_known_by_its_name(native_root):
    split = native_root / "wan2.1_t2v_14b_scaled_fp8_e4m3_lightx2v_4step_split"
    touch(split, "block_0.safetensors", "non_block.safetensors")
    assert len(layout.find(native_root).transformer) == 2


def test_a_published_file_comes_before_the_8_bit_copies_made_of_it(native_root):
    touch(native_root, PUBLISHED[0])
    for copy in ("distill_fp8", "distill_int8"):
        touch(native_root / copy, "distill_model.safetensors")
    assert layout.find(native_root).transformer == (native_root / PUBLISHED[0],)


def test_two_published_files_are_ambiguous_and_listed(native_root):
    touch(native_root, *PUBLISHED[:2])
    with pytest.raises(errors.AmbiguousFilesError) as caught:
        layout.find(native_root)
    assert [path.name for path in caught.value.candidates] == PUBLISHED[:2]


def test_a_lora_alone_is_no_transformer(native_root):
    name = "wan2.1_t2v_14b_lora_rank64_lightx2v_4step.safetensors"
    (native_root / DIT).unlink()
    touch(native_root, name)
    with pytest.raises(errors.MissingFileError, match=name):
        layout.find(native_root)


def test_a_chosen_path_may_be_a_file_an_index_or_a_folder(native_root, tmp_path):
    folder = tmp_path / "mine"
    touch(folder, "a-1.safetensors", "a-2.safetensors")
    index = folder / "a.safetensors.index.json"
    weight_map = {"x": "a-1.safetensors", "y": "a-2.safetensors"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    shards = (folder / "a-1.safetensors", folder / "a-2.safetensors")
    for path in (index, folder):
        assert layout.find(native_root, transformer_file=path).transformer == shards
    found = layout.find(native_root, transformer_file=shards[0]).transformer
    assert found == shards[:1]


@pytest.mark.parametrize(
    "names",
    [
        ("a.safetensors", "b.safetensors"),
        ("a.safetensors", "a.pt"),
        ("block_0.safetensors", "non_block.safetensors", "whole.safetensors"),
    ],
)
def test_a_chosen_folder_with_several_transformers_is_ambiguous(native_root, tmp_path, names):
    touch(tmp_path / "mine", *names)
    with pytest.raises(errors.AmbiguousFilesError) as caught:
        layout.find(native_root, transformer_file=tmp_path / "mine")
    assert len(caught.value.candidates) == 2


@pytest.mark.parametrize(
    "names",
    [
        ("block_0.safetensors", "block_2.safetensors", "non_block.safetensors"),
        ("block_0.safetensors",),
        ("non_block.safetensors",),
        (),
    ],
)
def test_an_incomplete_split_is_refused(native_root, tmp_path, names):
    touch(tmp_path / "mine", *names)
    with pytest.raises(errors.MissingFileError):
        layout.find(native_root, transformer_file=tmp_path / "mine")


def test_an_index_of_exactly_the_split_is_the_split(native_root, tmp_path):
    names = ("block_0.safetensors", "block_1.safetensors", "non_block.safetensors")
    touch(tmp_path / "mine", *names)
    index = tmp_path / "mine" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: name for name in names}}))
    found = layout.find(native_root, transformer_file=tmp_path / "mine").transformer
    assert sorted(path.name for path in found) == sorted(names)


def test_many_blocks_come_in_the_order_of_their_numbers(tmp_path):
    touch(tmp_path, "non_block.safetensors", *(f"block_{i}.safetensors" for i in range(12)))
    names = [path.name for path in transformer_files.in_folder(tmp_path)]
    assert names == [*(f"block_{i}.safetensors" for i in range(12)), "non_block.safetensors"]


def load(root, **options):
    return checkpoint.load(layout.find(root, **options), device="cpu", dtype=torch.float32)


def test_a_split_is_the_single_file(native_root, tensors):
    split_by_block(tensors, native_root / "distill_fp8")
    found = load(native_root).transformer.state_dict()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_split_with_a_block_too_many_is_refused(native_root, tensors):
    folder = split_by_block(tensors, native_root / "distill_fp8")
    (folder / "block_2.safetensors").write_bytes((folder / "block_1.safetensors").read_bytes())
    with pytest.raises(errors.UnreadableWeightsError, match="also in another shard"):
        load(native_root)


def test_a_config_beside_8_bit_weights_may_add_keys_but_not_contradict(
    native_root, tensors, edit_json
):
    folder = split_by_block(tensors, native_root / "distill_int8")
    root_config = native_root / "config.json"
    values = json.loads(root_config.read_text())
    beside = folder / "config.json"
    beside.write_text(json.dumps({**values, "quantization_config": {"any": 1}}))
    edit_json(root_config, drop="text_len")
    assert load(native_root).transformer.config.text_len == values["text_len"]
    with pytest.raises(errors.ConfigError, match="text_len"):
        load(native_root, base=True)  # the base model has no such file beside it
    edit_json(beside, num_heads=4)
    with pytest.raises(errors.ConfigError, match=r"'num_heads' is 2, but 4 in .*distill_int8"):
        load(native_root)


# Wan2.2: two transformers


def test_two_experts_load_as_two_transformers(experts_root):
    networks = load(experts_root)
    for network, folder in (
        (networks.transformer, "high_noise_model"),
        (networks.low_noise_transformer, "low_noise_model"),
    ):
        stored = safetensors.torch.load_file(experts_root / folder / DIT)
        assert all(torch.equal(network.state_dict()[name], stored[name]) for name in stored)
    assert len(layout.find(experts_root).weights) == 4


def test_distilled_experts_may_lie_in_distill_models(experts_root):
    for name in ("high_noise_model", "low_noise_model"):
        (experts_root / "distill_models").mkdir(exist_ok=True)
        (experts_root / name).rename(experts_root / "distill_models" / name)
        weights = experts_root / "distill_models" / name / DIT
        weights.rename(weights.with_name("distill_model.safetensors"))
    files = layout.find(experts_root)
    assert files.transformer[0].parent.name == "high_noise_model"
    assert files.low_noise_transformer[0].parent.name == "low_noise_model"
    assert load(experts_root)


def test_experts_may_be_replaced_by_files(experts_root, tmp_path):
    mine = tmp_path / "wan2.2_t2v_A14b_low_noise_lightx2v_4step.safetensors"
    mine.touch()
    files = layout.find(experts_root, low_noise_file=mine)
    assert files.low_noise_transformer == (mine,)
    assert files.transformer[0].parent.name == "high_noise_model"


def test_one_transformer_and_two_are_not_taken_for_each_other(experts_root, tmp_path):
    files = layout.find(experts_root)
    with pytest.raises(errors.CheckpointError, match="two transformers, as"):
        checkpoint.load_transformer(files, device="cpu", dtype=torch.float32)
    single = make.make(tmp_path / "single")
    with pytest.raises(errors.MissingFileError, match="high_noise_model"):
        layout.find(single, low_noise_file=single / DIT)


def test_two_files_beside_a_root_with_one_config(experts_root, tmp_path):
    """As LightX2V's Wan2.2-Distill-Models are used: files anywhere, the rest from the root."""
    names = {}
    for noise in ("high_noise", "low_noise"):
        folder = experts_root / f"{noise}_model"
        (folder / "config.json").rename(experts_root / "config.json")
        path = tmp_path / f"wan2.2_t2v_A14b_{noise}_lightx2v_4step.safetensors"
        names[noise] = (folder / DIT).rename(path)
        folder.rmdir()
    asked = {"transformer_file": names["high_noise"], "low_noise_file": names["low_noise"]}
    assert layout.find(experts_root, **asked).weights[:2] == tuple(names.values())
    networks = load(experts_root, **asked)
    assert not torch.equal(
        networks.transformer.head.modulation, networks.low_noise_transformer.head.modulation
    )


def test_a_config_beside_an_expert_comes_before_that_of_the_root(experts_root):
    high, low = (experts_root / name / "config.json" for name in transformer_files.EXPERTS)
    shutil.copy(high, experts_root / "config.json")
    found = layout.find(experts_root)
    assert (found.transformer_config, found.low_noise_config) == (high, low)


def test_distilled_experts_come_before_plain_ones_unless_base(experts_root):
    for copy in ("distill_fp8", "distill_int8"):
        for name in ("high_noise_model", "low_noise_model"):
            touch(experts_root / copy / name, "non_block.safetensors", "block_0.safetensors")
    with pytest.raises(errors.AmbiguousFilesError, match="distill_fp8, distill_int8"):
        layout.find(experts_root)
    for path in sorted((experts_root / "distill_int8").rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    (experts_root / "distill_int8").rmdir()
    files = layout.find(experts_root)
    assert {path.parent.parent.name for path in files.low_noise_transformer} == {"distill_fp8"}
    assert files.transformer_config == experts_root / "high_noise_model" / "config.json"
    plain = layout.find(experts_root, base=True)
    assert plain.low_noise_transformer == (experts_root / "low_noise_model" / DIT,)


def test_image_to_video_experts_have_no_image_encoder(experts_root, edit_json):
    sizes = dataclasses.replace(config.TINY, in_dim=36)
    for name in ("high_noise_model", "low_noise_model"):
        folder = experts_root / name
        edit_json(folder / "config.json", model_type="i2v", in_dim=36)
        dit = make.random_transformer(sizes, torch.Generator().manual_seed(1))
        safetensors.torch.save_file(dit.state_dict(), folder / DIT)
    networks = load(experts_root)
    assert networks.transformer.config == sizes
    with pytest.raises(errors.ConfigError, match="not text-to-video"):
        layout.find(experts_root, task=layout.Task.TEXT_TO_VIDEO)


def test_an_expert_without_the_other_is_refused(experts_root):
    (experts_root / "low_noise_model").rename(experts_root / "away")
    with pytest.raises(errors.MissingFileError, match="low_noise_model"):
        layout.find(experts_root)


def test_experts_of_different_sizes_are_refused(experts_root, edit_json):
    edit_json(experts_root / "low_noise_model" / "config.json", ffn_dim=64)
    with pytest.raises(errors.ConfigError, match="other dimensions"):
        load(experts_root)


def test_two_experts_in_diffusers_names(diffusers_root):
    root, other = diffusers_root(), diffusers_root("other")
    (other / "transformer").rename(root / "transformer_2")
    networks = load(root)
    theirs = safetensors.torch.load_file(root / "transformer_2" / DIT)
    found = networks.low_noise_transformer.head.modulation
    assert torch.equal(found, theirs["scale_shift_table"])


# Distilled weights beside a diffusers folder


@pytest.mark.parametrize("place", transformer_files.DISTILLED_FILES[::2])
def test_a_distilled_file_in_a_diffusers_folder_comes_before_its_transformer(
    diffusers_root, tensors, place
):
    root = diffusers_root()
    (root / place).parent.mkdir(exist_ok=True)
    safetensors.torch.save_file(tensors, root / place)
    assert layout.find(root).transformer == (root / place,)
    assert layout.find(root, base=True).transformer == (root / "transformer" / DIT,)
    found = load(root).transformer.state_dict()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_chosen_transformer_may_have_the_names_of_either_layout(
    native_root, diffusers_root, tensors
):
    root = diffusers_root()
    native = load(root, transformer_file=native_root / DIT).transformer
    assert torch.equal(native.head.modulation, tensors["head.modulation"])
    own = load(root).transformer.state_dict()
    found = load(native_root, transformer_file=root / "transformer").transformer.state_dict()
    assert all(torch.equal(found[name], own[name]) for name in own)


@pytest.fixture
def diffusers_pair(diffusers_root):
    root = diffusers_root()
    shutil.copytree(root / "transformer", root / "transformer_2")
    return root


def test_one_of_two_may_be_replaced_in_a_diffusers_folder(diffusers_pair, native_root, tensors):
    networks = load(diffusers_pair, low_noise_file=native_root / DIT)
    assert torch.equal(networks.low_noise_transformer.head.modulation, tensors["head.modulation"])
    own = safetensors.torch.load_file(diffusers_pair / "transformer" / DIT)
    assert torch.equal(networks.transformer.head.modulation, own["scale_shift_table"])


def test_distilled_experts_in_a_diffusers_folder_come_before_its_transformers(diffusers_pair):
    for name in transformer_files.EXPERTS:
        touch(diffusers_pair / "distill_models" / name, "distill_model.safetensors")
    files = layout.find(diffusers_pair)
    assert files.transformer[0].parent.name == "high_noise_model"
    assert files.low_noise_transformer[0].parent.name == "low_noise_model"
    plain = layout.find(diffusers_pair, base=True)
    assert plain.low_noise_transformer == (diffusers_pair / "transformer_2" / DIT,)


def test_two_pairs_in_the_root_of_a_diffusers_folder_are_ambiguous(diffusers_pair):
    for name in transformer_files.EXPERTS:
        touch(diffusers_pair / name, DIT)
    with pytest.raises(errors.AmbiguousFilesError, match=r"high_noise_model, .*transformer_2"):
        layout.find(diffusers_pair)
