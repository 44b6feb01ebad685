"""Model folders load strictly, and whatever is wrong with one is said with file and names."""

import math
import os

import pytest
import safetensors.torch
import torch

from benchmarks import networks as benchmark_networks
from models import checkpoint, config, errors, layout, memory, pristine, transformer_headers

DIT = "diffusion_pytorch_model.safetensors"


def load(root, dtype=torch.float32, *, vae_dtype=None, **options):
    files = layout.find(root, task=layout.Task.TEXT_TO_VIDEO, **options)
    return checkpoint.load(files, device="cpu", dtype=dtype, vae_dtype=vae_dtype)


def test_the_tiny_model_loads_with_every_tensor_in_its_place(native_root):
    networks = load(native_root)
    stored = safetensors.torch.load_file(native_root / DIT)
    loaded = networks.transformer.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    stored = torch.load(native_root / "Wan2.1_VAE.pth", weights_only=True)
    loaded = networks.vae.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


def test_readers_copy_each_tensor_once_and_tell_what_they_cannot_read():
    some, other = torch.randn(3), torch.randn(4)
    mapped = {"a": some, "b": other, "tied to a": some}
    found = checkpoint.owned(mapped, "cpu", dict.fromkeys(mapped, torch.float32))
    assert list(found) == list(mapped)
    assert found["a"] is found["tied to a"]
    for name, tensor in mapped.items():
        assert torch.equal(found[name], tensor)
        assert found[name].data_ptr() != tensor.data_ptr()
    mapped["lost"] = torch.empty(2, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):
        checkpoint.owned(mapped, "cpu", dict.fromkeys(mapped, torch.float32))


def test_networks_come_frozen_in_eval_mode_and_not_on_meta(native_root):
    networks = load(native_root)
    for network in (networks.transformer, networks.vae, networks.text_encoder.network):
        assert not network.training
        assert all(not p.requires_grad and not p.is_meta for p in network.parameters())
    embeddings = networks.text_encoder.network
    assert embeddings.shared.weight is embeddings.encoder.embed_tokens.weight


def test_the_benchmarks_hold_an_autoencoder_in_the_dtypes_of_a_worker(native_root):
    """Half of it encodes, in fp32: 0.36 GB at full size, where all in bf16 would be 0.25."""
    loaded = load(native_root, dtype=torch.bfloat16).vae.state_dict()
    ours = benchmark_networks.autoencoder(config.TINY_VAE).state_dict()
    assert {name: t.dtype for name, t in ours.items()} == {
        name: t.dtype for name, t in loaded.items()
    }
    weights = benchmark_networks.autoencoder().parameters()
    assert sum(weight.nbytes for weight in weights) == pytest.approx(0.361e9, rel=0.005)


def test_a_diffusers_folder_holds_the_same_networks(diffusers_root):
    root = diffusers_root()
    networks = load(root)
    theirs = safetensors.torch.load_file(root / "transformer" / DIT)
    ours = networks.transformer.state_dict()
    block = "blocks.1."
    assert torch.equal(ours[f"{block}norm3.weight"], theirs[f"{block}norm2.weight"])
    assert torch.equal(ours["head.modulation"], theirs["scale_shift_table"])
    assert networks.vae.config.base_dim == 8
    assert networks.text_encoder.encode("a cat").shape == (1, 512, 32)


def test_sharded_files_are_the_single_file(diffusers_root):
    whole = load(diffusers_root("whole"))
    pieces_root = diffusers_root("pieces", transformer_shards="200KB", text_shards="40KB")
    pieces = load(pieces_root)
    assert len(layout.find(pieces_root).weights) > 4
    for part in ("transformer", "vae"):
        ours, theirs = getattr(whole, part).state_dict(), getattr(pieces, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(whole.text_encoder.encode("a cat"), pieces.text_encoder.encode("a cat"))


def test_bf16_keeps_small_parameters_and_the_encoding_of_images_in_fp32(native_root):
    networks = load(native_root, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in networks.transformer.state_dict().items()}
    assert dtypes["blocks.0.ffn.0.weight"] == torch.bfloat16
    assert dtypes["blocks.0.self_attn.norm_q.weight"] == torch.bfloat16
    for name in ("blocks.0.modulation", "time_projection.1.weight", "head.head.weight"):
        assert dtypes[name] == torch.float32
    assert networks.text_encoder.encode("x").dtype == torch.bfloat16
    for vae, decoder in (
        (networks.vae, torch.bfloat16),
        (load(native_root, torch.bfloat16, vae_dtype=torch.float32).vae, torch.float32),
        (load(native_root, torch.float16).vae, torch.float32),
        (load(native_root, torch.float64).vae, torch.float64),
    ):
        assert {tensor.dtype for tensor in vae.decoder.parameters()} == {vae.dtype} == {decoder}
        wide = {tensor.dtype for tensor in (*vae.encoder.parameters(), *vae.conv1.parameters())}
        assert wide == {torch.promote_types(decoder, torch.float32)}


def test_a_distilled_pt_is_used_in_place_of_the_base_model(native_root):
    distilled = native_root / "distill_models" / "distill_model.pt"
    distilled.parent.mkdir()
    tensors = safetensors.torch.load_file(native_root / DIT)
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, distilled)
    found = load(native_root).transformer.state_dict()
    assert torch.equal(found["head.modulation"], tensors["head.modulation"] + 1)


def test_loaded_weights_do_not_hang_on_the_file(native_root):
    """A mapped file that someone rewrites in place would change the weights or end the process."""
    networks = load(native_root)
    before = networks.transformer.head.modulation.clone()
    path = native_root / DIT
    with path.open("r+b") as stream:
        stream.write(b"\0" * path.stat().st_size)
    assert torch.equal(networks.transformer.head.modulation, before)


@pytest.mark.parametrize(
    "name", [DIT, "Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"], ids=["dit", "vae", "t5"]
)
def test_missing_unused_and_wrongly_shaped_tensors_are_named(native_root, edit_tensors, name):
    def damage(tensors):
        names = sorted(tensors)
        tensors["surplus.weight"] = tensors.pop(names[0])
        tensors[names[1]] = torch.zeros(3, 7)
        damaged.extend(names[:2])

    damaged = []
    edit_tensors(native_root / name, damage)
    with pytest.raises(errors.WeightsMismatchError) as caught:
        load(native_root)
    error = caught.value
    assert error.path == native_root / name
    assert len(error.missing) == len(error.wrong_shapes) == 1 or "t5" in name
    assert error.unused == ("surplus.weight",)
    assert [found for found, _ in error.wrong_shapes.values()] == [(3, 7)]
    assert "1 tensors no network uses (surplus.weight)" in str(error)
    assert "is [3, 7], expected [" in str(error)


def test_many_missing_tensors_are_counted_not_all_listed(native_root, edit_tensors):
    edit_tensors(native_root / DIT, dict.clear)
    with pytest.raises(errors.WeightsMismatchError, match=r"\d+ missing .* and \d+ more") as caught:
        load(native_root)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", [DIT, "Wan2.1_VAE.pth"])
@pytest.mark.parametrize("size", [0, 100, 0.5])
def test_a_truncated_file_is_named(native_root, name, size):
    path = native_root / name
    os.truncate(path, int(size * path.stat().st_size) if size == 0.5 else size)
    with pytest.raises(errors.UnreadableWeightsError) as caught:
        load(native_root)
    assert caught.value.path == path


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(native_root, edit_tensors, value):
    """Their videos would look like those of a bad machine."""

    def spoil(tensors):
        tensors["head.head.weight"][3, 5] = value

    edit_tensors(native_root / DIT, spoil)
    with pytest.raises(errors.UnreadableWeightsError, match=r"head\.head\.weight holds NaN or inf"):
        load(native_root)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"a": torch.eye(2).to_sparse()}, "a is no plain tensor"),
        ({"a": torch.empty(2, device="meta")}, "a is no plain tensor"),
        ({5: torch.zeros(2)}, "5 is no name"),
        ({"a": {"b": torch.zeros(2)}}, "a is a dict"),
        ([torch.zeros(2)], "it holds a list"),
    ],
)
def test_a_pickle_of_anything_but_named_plain_tensors_is_refused(tmp_path, content, told):
    path = tmp_path / "x.pt"
    torch.save(content, path)
    with pytest.raises(errors.UnreadableWeightsError, match=told):
        checkpoint.read_tensors([path])


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 28577121552\n"


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth"])
def test_a_pointer_of_git_lfs_is_told(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(POINTER)
    for read in (checkpoint.read_tensors, memory.headers):
        with pytest.raises(errors.UnreadableWeightsError, match=r"Git LFS pointer.*git lfs pull"):
            read([path])


def test_a_safetensors_file_under_another_name_is_told(tmp_path):
    path = tmp_path / "x.pth"
    safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    for read in (checkpoint.read_tensors, memory.headers):
        with pytest.raises(errors.UnreadableWeightsError, match="safetensors file under another"):
            read([path])


@pytest.mark.parametrize(
    "keys", [("generator_ema",), ("generator", "critic"), ("generator", "critic", "generator_ema")]
)
def test_a_checkpoint_of_a_training_is_told(tmp_path, keys):
    path = tmp_path / "self_forcing.pt"
    tensors = {"model.patch_embedding.weight": torch.zeros(1)}
    torch.save(dict.fromkeys(keys, tensors), path)
    says = r"a training .*save the tensors of its generator \(or generator_ema\) as a file of"
    for read in (checkpoint.read_tensors, memory.headers):
        with pytest.raises(errors.UnreadableWeightsError, match=says):
            read([path])


def test_names_of_a_transformer_in_a_file_of_torch_may_begin_with_model(native_root, tmp_path):
    """As a trainer saves the network that it wraps."""
    plain = safetensors.torch.load_file(native_root / DIT)
    path = tmp_path / "model_iter6000.pt"
    torch.save({f"model.{name}": tensor for name, tensor in plain.items()}, path)
    loaded = load(native_root, transformer_file=path).transformer.state_dict()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)
    transformer_headers.check(layout.find(native_root, transformer_file=path))


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "model."])
def test_a_transformer_that_comfyui_saved_is_the_same(native_root, tmp_path, prefix):
    plain = safetensors.torch.load_file(native_root / DIT)
    path = tmp_path / "saved.safetensors"
    safetensors.torch.save_file({f"{prefix}{name}": plain[name] for name in plain}, path)
    loaded = load(native_root, transformer_file=path).transformer.state_dict()
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)
    read_again = pristine.PristineFiles([path])
    assert all(torch.equal(read_again(name), plain[name]) for name in plain)
    assert memory.headers([path], prefixes=[prefix]).keys() == plain.keys()


def test_a_prefix_that_not_all_names_have_is_part_of_them(native_root, edit_tensors):
    def rename(tensors):
        tensors["diffusion_model.head.head.weight"] = tensors.pop("head.head.weight")

    edit_tensors(native_root / DIT, rename)
    with pytest.raises(errors.WeightsMismatchError) as caught:
        load(native_root)
    assert caught.value.unused == ("diffusion_model.head.head.weight",)


def test_a_damaged_pickle_of_the_old_kind_is_named(tmp_path):
    """torch raises more than its own errors for them."""
    path = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for end in range(0, len(data), 7):
        path.write_bytes(data[:end])
        with pytest.raises(errors.UnreadableWeightsError, match=r"x\.pt"):
            checkpoint.read_tensors([path])


def test_pickled_objects_are_refused_and_not_executed(native_root):
    class Payload:
        def __reduce__(self):
            return os.mkdir, (str(native_root / "executed"),)

    path = native_root / "Wan2.1_VAE.pth"
    torch.save({"conv1.weight": Payload()}, path)
    with pytest.raises(errors.UnreadableWeightsError, match="never executed"):
        load(native_root)
    assert not (native_root / "executed").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([torch.zeros(1)], "holds a list"),
        ({"state_dict": {"conv1.weight": torch.zeros(1)}}, "state_dict is a dict, not a tensor"),
        ({"conv1.weight": torch.zeros(1, dtype=torch.int8)}, "quantised weights"),
        ({"conv1.weight": torch.zeros(1).to(torch.float8_e4m3fn)}, "torch.float8_e4m3fn"),
    ],
)
def test_what_is_no_dict_of_float_tensors_is_refused(native_root, content, says):
    torch.save(content, native_root / "Wan2.1_VAE.pth")
    with pytest.raises(errors.UnreadableWeightsError, match=says):
        load(native_root)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        safetensors.torch.save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(errors.UnreadableWeightsError, match="x is also in another shard"):
        checkpoint.read_tensors(paths)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text_dim": 4096}, "takes text of width 4096, the encoder's: 32"),
        ({"out_dim": 8}, "16 in and 8 out, the autoencoder 16"),
        ({"model_type": "i2v", "in_dim": 36}, "image-to-video model, not text-to-video"),
    ],
)
def test_networks_that_do_not_fit_each_other_are_refused(native_root, edit_json, change, says):
    edit_json(native_root / "config.json", **change)
    with pytest.raises(errors.ConfigError, match=says):
        load(native_root)


def test_a_config_of_another_size_than_the_weights_is_refused(native_root, edit_json):
    edit_json(native_root / "config.json", num_layers=3)
    with pytest.raises(errors.WeightsMismatchError, match=r"missing tensors \(blocks\.2\."):
        load(native_root)


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(native_root, edit_json):
    edit_json(native_root / "t5_config.json", vocab_size=200)
    with pytest.raises(errors.ConfigError, match=r"tokenizer\.json: has .* the encoder only 200"):
        load(native_root)


@pytest.mark.parametrize("damaged", ["{", "{\0}", "{}", '{"model": {}}', '{"added_tokens": [{}]}'])
def test_a_broken_tokenizer_is_named(native_root, damaged):
    path = native_root / "google" / "umt5-xxl" / "tokenizer.json"
    path.write_text(damaged)
    with pytest.raises(errors.ConfigError, match="no usable tokenizer") as told:
        load(native_root)
    assert told.value.path in (path, path.parent)


def test_every_error_is_a_value_error_a_caller_can_catch_at_once(tmp_path):
    with pytest.raises(ValueError, match="native layout"):
        load(tmp_path / "nowhere")
