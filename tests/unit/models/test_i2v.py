"""Image-to-video folders: found and loaded strictly in both layouts, and never mixed up."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from transformers import CLIPVisionModel, CLIPVisionModelWithProjection

from benchmarks import reference
from models import checkpoint, conditioning, config, config_files, errors, layout, sampling
from models.tiny import make

DIT = "diffusion_pytorch_model.safetensors"
CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
I2V, T2V = layout.Task.IMAGE_TO_VIDEO, layout.Task.TEXT_TO_VIDEO


def load(root, dtype=torch.float32):
    return checkpoint.load(layout.find(root), device="cpu", dtype=dtype)


@pytest.fixture
def i2v_root(tmp_path):
    """The tiny model with its base transformer alone."""
    root = make.make(tmp_path / "tiny-i2v", task=I2V)
    shutil.rmtree(root / "distill_models")
    return root


@pytest.fixture
def diffusers_i2v_root(diffusers_root):
    """Written by diffusers and transformers themselves."""

    def build(kind=CLIPVisionModel):
        root = diffusers_root()
        torch.manual_seed(1)
        reference.transformer(config.TINY_I2V).save_pretrained(root / "transformer")
        clip = reference.clip_config(config.TINY_IMAGE_ENCODER)
        kind(clip).save_pretrained(root / "image_encoder")
        (root / "model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}')
        return root

    return build


def test_native_files_of_an_image_model(i2v_root):
    files = layout.find(i2v_root)
    assert files.task is I2V
    assert files.image_encoder == (i2v_root / CLIP,)
    assert files.image_encoder_config == i2v_root / "clip_config.json"
    assert files.weights[-1] == i2v_root / CLIP
    assert CLIP in layout.weight_hashes(files)


def test_a_text_model_has_no_image_encoder_even_where_one_lies_beside(native_root):
    (native_root / CLIP).touch()
    files = layout.find(native_root)
    assert files.task is T2V
    assert files.image_encoder == ()
    assert native_root / CLIP not in files.weights


def test_the_image_encoder_may_lie_beside_the_distilled_transformer(i2v_root):
    distilled = i2v_root / "distill_models"
    distilled.mkdir()
    (i2v_root / CLIP).rename(distilled / CLIP)
    assert layout.find(i2v_root).image_encoder == (distilled / CLIP,)


def test_diffusers_files_of_an_image_model(diffusers_i2v_root):
    root = diffusers_i2v_root()
    files = layout.find(root)
    assert files.task is I2V
    assert files.image_encoder == (root / "image_encoder" / "model.safetensors",)
    assert files.image_encoder_config == root / "image_encoder" / "config.json"


def test_a_missing_image_encoder_is_named(i2v_root, diffusers_i2v_root):
    (i2v_root / CLIP).unlink()
    with pytest.raises(errors.MissingFileError, match=CLIP):
        load(i2v_root)
    root = diffusers_i2v_root()
    (root / "image_encoder").rename(root / "away")
    with pytest.raises(errors.MissingFileError, match="the folder image_encoder/"):
        load(root)


def test_tasks_are_not_mixed_up(native_root, i2v_root, diffusers_root, diffusers_i2v_root):
    for root in (i2v_root, diffusers_i2v_root()):
        with pytest.raises(errors.ConfigError, match="image-to-video model, not text-to-video"):
            layout.find(root, task=T2V)
    for root in (native_root, diffusers_root("text")):
        with pytest.raises(errors.ConfigError, match="text-to-video model, not image-to-video"):
            layout.find(root, task=I2V)


def test_every_tensor_is_in_its_place(i2v_root):
    networks = load(i2v_root)
    stored = torch.load(i2v_root / CLIP, weights_only=True)
    loaded = networks.image_encoder.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)
    assert networks.transformer.config == config.TINY_I2V
    for network in (networks.transformer, networks.image_encoder):
        assert not network.training
        assert all(not p.requires_grad and not p.is_meta for p in network.parameters())


def test_what_clip_has_beside_its_visual_tower_is_passed_over(i2v_root, edit_tensors):
    """As in the released file: a text tower, a temperature, and the end of the visual tower."""
    before = load(i2v_root).image_encoder.state_dict()

    def add(tensors):
        tensors["textual.token_embedding.weight"] = torch.zeros(3, 2)
        tensors["textual.head.2.weight"] = torch.zeros(3, 2)
        tensors["log_scale"] = torch.tensor(2.6)
        tensors["visual.post_norm.weight"] = tensors["visual.post_norm.bias"] = torch.zeros(48)
        tensors["visual.head"] = torch.zeros(48, 32)

    edit_tensors(i2v_root / CLIP, add)
    after = load(i2v_root).image_encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_everything_else_of_clip_is_strict(i2v_root, edit_tensors):
    def damage(tensors):
        tensors["visual.extra"] = tensors.pop("visual.pre_norm.bias")
        tensors["visual.pos_embedding"] = torch.zeros(1, 26, 48)
        for name in [name for name in tensors if ".transformer.2." in name]:
            tensors[name.replace(".2.", ".3.", 1)] = tensors[name]

    edit_tensors(i2v_root / CLIP, damage)
    with pytest.raises(errors.WeightsMismatchError) as caught:
        load(i2v_root)
    error = caught.value
    assert error.path == i2v_root / CLIP
    assert error.missing == ("visual.pre_norm.bias",)
    assert error.wrong_shapes == {"visual.pos_embedding": ((1, 26, 48), (1, 17, 48))}
    assert "visual.extra" in error.unused
    assert len(error.unused) == 13, "a block more than the config says is noticed too"


@pytest.mark.parametrize("kind", [CLIPVisionModel, CLIPVisionModelWithProjection])
def test_a_diffusers_folder_holds_the_same_networks(diffusers_i2v_root, kind):
    """Names with and without the `vision_model.` in front, which depends on who wrote the file."""
    root = diffusers_i2v_root(kind)
    path = root / "image_encoder" / "model.safetensors"
    theirs = {
        name.removeprefix("vision_model."): tensor
        for name, tensor in safetensors.torch.load_file(path).items()
    }
    ours = load(root).image_encoder.state_dict()
    attention, block = "encoder.layers.1.self_attn.", "visual.transformer.1."
    parts = [theirs[f"{attention}{part}_proj.weight"] for part in "qkv"]
    assert torch.equal(ours[f"{block}attn.to_qkv.weight"], torch.cat(parts))
    assert torch.equal(ours["visual.cls_embedding"].flatten(), theirs["embeddings.class_embedding"])
    assert torch.equal(
        ours["visual.pos_embedding"][0], theirs["embeddings.position_embedding.weight"]
    )


def test_a_part_of_an_attention_that_is_missing_is_named(diffusers_i2v_root, edit_tensors):
    root = diffusers_i2v_root()
    path = root / "image_encoder" / "model.safetensors"
    edit_tensors(path, lambda tensors: tensors.pop("encoder.layers.1.self_attn.k_proj.bias"))
    with pytest.raises(errors.WeightsMismatchError) as caught:
        load(root)
    assert caught.value.missing == ("visual.transformer.1.attn.to_qkv.bias",)
    assert "visual.transformer.1.attn.to_q.bias" in caught.value.unused


def test_bf16_loads_the_image_encoder_in_fp16(i2v_root):
    networks = load(i2v_root, torch.bfloat16)
    dtypes = {tensor.dtype for tensor in networks.image_encoder.state_dict().values()}
    assert dtypes == {torch.float16}
    assert networks.transformer.dtype == torch.bfloat16
    assert networks.vae.conv1.weight.dtype == torch.float32
    assert load(i2v_root, torch.float64).image_encoder.visual.cls_embedding.dtype == torch.float64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"in_dim": 16}, "16 in and 16 out, the autoencoder 16 channels; expected 36 in"),
        ({"out_dim": 20}, "36 in and 20 out"),
        ({"image_dim": 1280}, "takes an image of width 1280, the encoder's: 48"),
        ({"model_type": "flf2v"}, "is 'flf2v': models between a first and a last frame are not"),
    ],
)
def test_networks_that_do_not_fit_each_other_are_refused(i2v_root, edit_json, change, says):
    edit_json(i2v_root / "config.json", **change)
    with pytest.raises(errors.ConfigError, match=says):
        load(i2v_root)


def test_models_between_two_frames_are_refused_by_config_and_by_tensor(
    i2v_root, edit_tensors, diffusers_i2v_root, edit_json
):
    root = diffusers_i2v_root()
    edit_json(root / "transformer" / "config.json", pos_embed_seq_len=514)
    with pytest.raises(errors.ConfigError, match="first and a last frame") as caught:
        load(root)
    assert caught.value.key == "pos_embed_seq_len"
    extra = {"img_emb.emb_pos": torch.zeros(1, 514, 48)}
    edit_tensors(i2v_root / DIT, lambda tensors: tensors.update(extra))
    with pytest.raises(errors.CheckpointError, match=r"img_emb\.emb_pos: models between a first"):
        load(i2v_root)


def test_without_a_config_the_encoder_is_wans(i2v_root, edit_json):
    (i2v_root / "clip_config.json").unlink()
    with pytest.raises(errors.ConfigError, match="width 48, the encoder's: 1280"):
        load(i2v_root)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"hidden_act": "quick_gelu"}, "'hidden_act' is 'quick_gelu'; supported: 'gelu'"),
        ({"model_type": "clip"}, "supported: 'clip_vision_model'"),
        ({"num_hidden_layers": 0}, "num_layers must be positive"),
        ({"image_size": 57}, "patches of 14 do not fill 57 pixels"),
        ({"num_attention_heads": 5}, "not a multiple of num_heads 5"),
        ({"drop": "hidden_size"}, "'hidden_size' is missing"),
    ],
)
def test_a_wrong_clip_config_is_named(i2v_root, edit_json, change, says):
    edit_json(i2v_root / "clip_config.json", **change)
    with pytest.raises(errors.ConfigError, match=says) as caught:
        load(i2v_root)
    assert caught.value.path == i2v_root / "clip_config.json"


def test_the_official_clip_config_gives_the_named_sizes(tmp_path):
    path = tmp_path / "config.json"
    official = {
        "architectures": ["CLIPVisionModel"],
        "hidden_act": "gelu",
        "hidden_size": 1280,
        "image_size": 224,
        "intermediate_size": 5120,
        "layer_norm_eps": 1e-05,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_channels": 3,
        "num_hidden_layers": 32,
        "patch_size": 14,
        "projection_dim": 1024,
    }
    path.write_text(json.dumps(official))
    assert config_files.image_encoder(path) == config.CLIP_VIT_H_14
    assert config.CLIP_VIT_H_14.num_tokens == 257


def test_a_text_model_has_no_image_width(native_root, edit_json):
    edit_json(native_root / "config.json", image_dim=48)
    with pytest.raises(errors.ConfigError):
        layout.find(native_root, task=T2V)


def test_a_seed_fixes_every_byte_of_the_tiny_model(tmp_path):
    first, second = (make.make(tmp_path / name, task=I2V) for name in "ab")
    names = {path.relative_to(first) for path in first.rglob("*") if path.is_file()}
    assert len(names) == 12
    for name in names:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name
    with pytest.raises(FileExistsError, match="not a model folder for text-to-video"):
        make.make(first)


def test_the_command_writes_an_image_model(tmp_path):
    command = [sys.executable, "-m", "models.tiny.make", str(tmp_path / "tiny"), "--task", "i2v"]
    subprocess.run(command, check=True, capture_output=True)
    assert layout.find(tmp_path / "tiny").task is I2V


@pytest.fixture
def render(i2v_root):
    networks = load(i2v_root)
    levels = sampling.noise_levels([1000, 750, 500, 250], 5)
    target = conditioning.Target(width=64, height=48, num_frames=5)
    shape = networks.vae.config.latent_shape(num_frames=5, height=48, width=64)

    @torch.inference_mode()
    def latents(colour, *, seed=0, change=lambda condition: condition):
        image = torch.tensor(colour, dtype=torch.uint8).expand(30, 50, 3)
        condition = conditioning.encode(
            image, target, clip=networks.image_encoder, autoencoder=networks.vae
        )
        velocity = conditioning.velocity(
            networks.transformer, networks.text_encoder.encode("a cat"), change(condition)
        )
        noise, _ = sampling.initial_noise(seed, shape, "cpu")
        return sampling.denoise(velocity, noise, levels, step_rule="euler")

    return latents


def test_a_render_is_repeatable_and_depends_on_the_image_both_ways(render):
    """Through the latents and through CLIP's tokens; and on the seed."""
    red = render([255, 0, 0])
    assert red.shape == (1, 16, 2, 6, 8)
    assert torch.equal(red, render([255, 0, 0]))
    assert (red - render([0, 0, 255])).abs().mean() > 0.05
    assert (red - render([255, 0, 0], seed=1)).abs().mean() > 0.1
    blue = []
    render([0, 0, 255], change=lambda condition: blue.append(condition) or condition)
    other_tokens = render([255, 0, 0], change=lambda own: with_tokens(own, blue[0]))
    other_latents = render([255, 0, 0], change=lambda own: with_tokens(blue[0], own))
    assert (red - other_tokens).abs().mean() > 0.01
    assert (red - other_latents).abs().mean() > 0.01


def with_tokens(condition, other):
    return dataclasses.replace(condition, image_tokens_BIG=other.image_tokens_BIG)
