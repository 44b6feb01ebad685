"""Dimensions come from the checkpoint's own configs, and what these say wrongly is named."""

import json

import pytest

from models import config, config_files, errors, layout
from models.config_files import WHERE_CONFIG

# As released by Wan-AI, keys and values.
OFFICIAL_14B = {
    "_class_name": "WanModel",
    "_diffusers_version": "0.30.0",
    "dim": 5120,
    "eps": 1e-06,
    "ffn_dim": 13824,
    "freq_dim": 256,
    "in_dim": 16,
    "model_type": "t2v",
    "num_heads": 40,
    "num_layers": 40,
    "out_dim": 16,
    "text_len": 512,
}
DIFFUSERS_1_3B = {
    "_class_name": "WanTransformer3DModel",
    "added_kv_proj_dim": None,
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "eps": 1e-06,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "image_dim": None,
    "in_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "out_channels": 16,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
    "text_dim": 4096,
}


@pytest.fixture
def written(tmp_path):
    def write(values):
        path = tmp_path / "config.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return path

    return write


def test_official_native_configs_give_the_named_sizes(written):
    assert config_files.native_transformer(written(OFFICIAL_14B)) == config.WAN_T2V_14B
    image = {**OFFICIAL_14B, "model_type": "i2v", "in_dim": 36}
    assert config_files.native_transformer(written(image)) == config.WAN_I2V_14B


def test_official_diffusers_configs_give_the_named_sizes(written):
    assert config_files.diffusers_transformer(written(DIFFUSERS_1_3B)) == config.WAN_T2V_1_3B
    image = {
        **DIFFUSERS_1_3B,
        "num_attention_heads": 40,
        "num_layers": 40,
        "ffn_dim": 13824,
        "in_channels": 36,
        "image_dim": 1280,
        "added_kv_proj_dim": 5120,
    }
    assert config_files.diffusers_transformer(written(image)) == config.WAN_I2V_14B


@pytest.mark.parametrize(
    ("change", "key", "says"),
    [
        ({"dim": None}, "dim", "must be an integer"),
        ({"dim": "5120"}, "dim", "got '5120'"),
        ({"num_layers": True}, "num_layers", "got True"),
        ({"eps": "small"}, "eps", "must be a number"),
        ({"model_type": "vace"}, "model_type", "supported: 't2v', 'i2v'"),
        ({"model_type": 2}, "model_type", "must be a string"),
        ({"qk_norm": False}, "qk_norm", "is False; supported: True"),
        ({"patch_size": [2, 2, 2]}, "patch_size", r"supported: \[1, 2, 2\]"),
        ({"guidance_embed": 4}, None, "not known here: guidance_embed"),
        ({"num_heads": 39}, None, "contradicts itself: dim 5120 is not a multiple"),
        ({"dim": -5120}, None, "dim must be positive"),
        ({"freq_dim": 255}, None, "freq_dim must be even"),
    ],
)
def test_a_wrong_key_is_named_with_its_file(written, change, key, says):
    path = written({**OFFICIAL_14B, **change})
    with pytest.raises(errors.ConfigError, match=says) as caught:
        config_files.native_transformer(path)
    assert (caught.value.path, caught.value.key) == (path, key)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("key", sorted(key for key in OFFICIAL_14B if not key.startswith("_")))
def test_no_dimension_is_guessed(written, key):
    with pytest.raises(errors.ConfigError, match=f"'{key}' is missing; {WHERE_CONFIG}$"):
        config_files.native_transformer(
            written({name: value for name, value in OFFICIAL_14B.items() if name != key})
        )


def test_image_projections_of_another_width_contradict(written):
    path = written({**DIFFUSERS_1_3B, "image_dim": 1280})
    with pytest.raises(errors.ConfigError, match="does not fit image_dim 1280") as caught:
        config_files.diffusers_transformer(path)
    assert caught.value.key == "added_kv_proj_dim"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not readable JSON"),
        ("", f"config.json: is empty; {WHERE_CONFIG}$"),
        ("{}", f"is missing; {WHERE_CONFIG}$"),
        ("[1]", "JSON object, not a list"),
        pytest.param("[" * 100_000, "not readable JSON", id="deep"),
    ],
)
def test_broken_json_is_named(written, text, says):
    with pytest.raises(errors.ConfigError, match=says):
        config_files.native_transformer(written(text))


def test_an_empty_config_of_a_model_says_where_one_is(native_root):
    (native_root / "config.json").write_bytes(b"")
    with pytest.raises(errors.ConfigError, match=f"config.json: is empty; {WHERE_CONFIG}$"):
        layout.find(native_root)


def test_a_config_that_is_not_there_is_named(tmp_path):
    with pytest.raises(errors.ConfigError, match="is not there"):
        config_files.vae(tmp_path / "config.json")


def test_an_autoencoder_of_another_kind_is_refused(native_root, edit_json):
    path = native_root / "vae_config.json"
    for change, says in [
        ({"is_residual": True}, "is_residual"),
        ({"latents_std": [1.0]}, "need 16 entries"),
        ({"latents_std": [0.0] * 16}, "must be positive"),
        ({"dim_mult": [1, 2.5]}, "list of int"),
        ({"temperal_downsample": [True]}, "one entry less"),
    ]:
        before = path.read_text()
        edit_json(path, **change)
        with pytest.raises(errors.ConfigError, match=says):
            config_files.vae(path)
        path.write_text(before)


def test_a_text_encoder_that_is_no_umt5_is_refused(native_root, edit_json):
    path = native_root / "t5_config.json"
    edit_json(path, model_type="t5")
    with pytest.raises(errors.ConfigError, match="supported: 'umt5'"):
        config_files.text_encoder(path)
