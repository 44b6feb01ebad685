"""Which files of a folder are used, and what is said when one is missing or doubtful."""

import hashlib
import subprocess
import sys

import pytest

from models import errors, layout

DIT = "diffusion_pytorch_model.safetensors"


def test_native_files(native_root):
    files = layout.find(native_root)
    assert files.layout is layout.Layout.NATIVE
    assert [str(path.relative_to(native_root)) for path in files.weights] == [
        DIT,
        "Wan2.1_VAE.pth",
        "models_t5_umt5-xxl-enc-bf16.pth",
    ]
    assert files.tokenizer == native_root / "google" / "umt5-xxl"
    assert files.sizes_bytes[native_root / DIT] == (native_root / DIT).stat().st_size


def test_a_distilled_transformer_comes_before_the_base_model(native_root):
    distilled = native_root / "distill_models"
    distilled.mkdir()
    (distilled / "distill_model.pt").touch()
    assert layout.find(native_root).transformer == (distilled / "distill_model.pt",)
    (distilled / "distill_model.safetensors").touch()
    assert layout.find(native_root).transformer == (distilled / "distill_model.safetensors",)


def test_an_explicit_transformer_file_comes_first(native_root, tmp_path):
    mine = tmp_path / "wan2.1_t2v_14b_lightx2v_4step.safetensors"
    with pytest.raises(errors.MissingFileError, match=mine.name):
        layout.find(native_root, transformer_file=mine)
    mine.touch()
    files = layout.find(native_root, transformer_file=mine)
    assert files.transformer == (mine,)


def test_encoders_may_lie_beside_the_distilled_transformer(native_root):
    distilled = native_root / "distill_models"
    distilled.mkdir()
    (native_root / "Wan2.1_VAE.pth").rename(distilled / "Wan2.1_VAE.pth")
    assert layout.find(native_root).vae == (distilled / "Wan2.1_VAE.pth",)


def test_diffusers_files(diffusers_root):
    root = diffusers_root(transformer_shards="200KB")
    files = layout.find(root)
    assert files.layout is layout.Layout.DIFFUSERS
    assert len(files.transformer) > 1
    assert all("-of-" in path.name for path in files.transformer)


def test_shards_are_those_of_the_index_not_those_of_the_folder(diffusers_root):
    root = diffusers_root(transformer_shards="200KB")
    before = layout.find(root).transformer
    (root / "transformer" / "fp8_variant.safetensors").touch()
    assert layout.find(root).transformer == before
    before[1].unlink()
    with pytest.raises(errors.MissingFileError, match=before[1].name):
        layout.find(root)


def test_one_file_and_an_index_side_by_side_are_ambiguous(native_root):
    (native_root / f"{DIT}.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(errors.AmbiguousFilesError, match=r"index\.json") as caught:
        layout.find(native_root)
    assert len(caught.value.candidates) == 2


def test_both_layouts_in_one_folder_are_ambiguous(native_root):
    (native_root / "model_index.json").write_text("{}")
    with pytest.raises(errors.AmbiguousFilesError, match=r"model_index\.json, config\.json"):
        layout.find(native_root)


def test_other_safetensors_files_are_named_not_merged(native_root):
    (native_root / DIT).rename(native_root / "some_int8.safetensors")
    with pytest.raises(errors.MissingFileError, match=r"some_int8\.safetensors") as caught:
        layout.find(native_root)
    assert DIT in str(caught.value)


@pytest.mark.parametrize(
    "name", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl"]
)
def test_a_missing_file_is_named_with_its_folder(native_root, name):
    (native_root / name).rename(native_root / "away")
    with pytest.raises(errors.MissingFileError, match=name) as caught:
        layout.find(native_root)
    assert caught.value.root == native_root


@pytest.fixture(params=["native", "diffusers"])
def tokenizer(request, native_root, diffusers_root):
    if request.param == "native":
        return native_root / layout.TOKENIZER_FOLDER
    return diffusers_root() / "tokenizer"


def model_of(tokenizer):
    is_native = tokenizer.name == layout.TOKENIZER_FOLDER.name
    return tokenizer.parents[1] if is_native else tokenizer.parent


def test_a_tokenizer_without_its_file_is_told_where_that_is(tokenizer):
    """Made of spiece.model, some tokens would have other ids."""
    (tokenizer / "tokenizer.json").rename(tokenizer / "spiece.model")
    with pytest.raises(errors.MissingFileError, match=r"tokenizer\.json; Wan-AI's repos") as caught:
        layout.find(model_of(tokenizer))
    assert caught.value.root == tokenizer


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda content: b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (lambda content: content[:-50], "it is damaged"),
        (lambda content: b"<html></html>", "it is damaged"),
        (lambda content: b"", "it is damaged"),
    ],
)
def test_a_tokenizer_that_is_no_json_is_told(tokenizer, spoil, says):
    path = tokenizer / "tokenizer.json"
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(errors.ConfigError, match=rf"tokenizer\.json: is no usable .*{says}"):
        layout.find(model_of(tokenizer))
    path.write_text(" {} \n")
    layout.find(model_of(tokenizer))


def test_a_folder_that_is_no_model_hears_of_both_layouts(tmp_path):
    for root in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(errors.MissingFileError) as caught:
            layout.find(root)
        assert "config.json" in str(caught.value)
        assert "model_index.json" in str(caught.value)


@pytest.mark.parametrize(
    "content",
    ["not json", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "{}", "[" * 100_000],
    ids=lambda content: content[:25],
)
def test_a_broken_index_is_named(native_root, content):
    (native_root / DIT).unlink()
    index = native_root / f"{DIT}.index.json"
    index.write_text(content)
    with pytest.raises(errors.ConfigError, match="no index of shards") as caught:
        layout.find(native_root)
    assert caught.value.path == index


def test_weight_hashes_are_sha256_by_relative_path(native_root):
    hashes = layout.weight_hashes(layout.find(native_root))
    expected = hashlib.sha256((native_root / DIT).read_bytes()).hexdigest()
    assert hashes[DIT] == expected
    assert len(hashes) == 8
    assert {"config.json", "google/umt5-xxl/tokenizer.json"} <= hashes.keys()


def test_looking_at_files_loads_no_torch():
    code = "import sys; from models import layout; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
