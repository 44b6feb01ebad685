"""Config files of a checkpoint, native or diffusers, read into the dimensions of the networks.

A key that is missing, unknown or says something these networks cannot do is an error naming file
and key. Keys that start with an underscore are the writer's notes and are passed over.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from models import config, errors

Config = TypeVar("Config")

FIRST_AND_LAST_FRAME = "models between a first and a last frame are not supported"

WHERE_CONFIG = "take config.json from Wan-AI's repository of the same model"
"""LightX2V's repositories ship empty ones."""


def read_json(path: Path, *, hint: str = "") -> dict[str, Any]:
    """The object in a JSON file. Raises ConfigError when it is not there, broken, or no object.

    `hint` ends the message where the file is empty.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise errors.ConfigError(path, "is not there") from None
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and not error.doc.strip():
            problem = "is empty" + (f"; {hint}" if hint else "")
            raise errors.ConfigError(path, problem) from None
        raise errors.ConfigError(path, f"is not readable JSON: {error}") from error
    if not isinstance(values, dict):
        raise errors.ConfigError(path, f"must hold a JSON object, not a {type(values).__name__}")
    return values


class Keys:
    """A config file whose keys are taken one by one, each checked, none guessed."""

    def __init__(self, path: Path, values: Mapping[str, Any], *, hint: str = "") -> None:
        """`hint` ends the message where a key is missing."""
        self.path = path
        self._hint = hint
        self._left = {key: value for key, value in values.items() if not key.startswith("_")}

    @classmethod
    def read(cls, path: Path, *, more: Path | None = None, hint: str = "") -> Self:
        """The keys of a file; those that only `more` has are taken from there.

        Raises ConfigError where the two contradict each other.
        """
        values = read_json(path, hint=hint)
        for key, value in (read_json(more) if more else {}).items():
            if values.setdefault(key, value) != value and not key.startswith("_"):
                problem = f"is {values[key]!r}, but {value!r} in {more}"
                raise errors.ConfigError(path, problem, key=key, against=more)
        return cls(path, values, hint=hint)

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._take(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"must be an integer, got {value!r}")
        return value

    def string(self, key: str) -> str:
        value = self._take(key, None)
        if not isinstance(value, str):
            raise self.error(key, f"must be a string, got {value!r}")
        return value

    def number(self, key: str) -> float:
        value = self._take(key, None)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"must be a number, got {value!r}")
        return float(value)

    def sequence(self, key: str, of: type) -> tuple[Any, ...]:
        value = self._take(key, None)
        accepted = (float, int) if of is float else (of,)
        if not isinstance(value, list) or any(type(item) not in accepted for item in value):
            raise self.error(key, f"must be a list of {of.__name__}, got {value!r}")
        return tuple(value)

    def optional_integer(self, key: str) -> int | None:
        if self._left.get(key) is None:
            self.drop(key)
            return None
        return self.integer(key)

    def only(self, key: str, *supported: Any) -> None:
        """Accept a key that may be there, as long as it says what these networks do anyway."""
        value = self._left.pop(key, supported[0])
        if value not in supported:
            raise self.error(key, f"is {value!r}; supported: {supported[0]!r}")

    def drop(self, *keys: str) -> None:
        """Accept keys that do not change the numbers."""
        for key in keys:
            self._left.pop(key, None)

    def finish(self) -> None:
        """Raise for keys nobody took: they might change the network in a way we would miss."""
        if self._left:
            raise errors.ConfigError(
                self.path, f"has keys that are not known here: {', '.join(sorted(self._left))}"
            )

    def error(self, key: str, problem: str) -> errors.ConfigError:
        return errors.ConfigError(self.path, problem, key=key)

    def _take(self, key: str, default: Any) -> Any:
        if key not in self._left and default is None:
            raise self.error(key, "is missing" + (f"; {self._hint}" if self._hint else ""))
        return self._left.pop(key, default)


def native_transformer(
    path: Path, *, more: Path | None = None, has_image_encoder: bool = True
) -> config.TransformerConfig:
    """Read `config.json` of the official layout (text-to-video and image-to-video).

    `more` is the config.json of a quantized copy, which may add keys. Wan2.2's image-to-video says
    what Wan2.1's says, but has no image encoder.
    """
    keys = Keys.read(path, more=more, hint=WHERE_CONFIG)
    if more:
        keys.drop("quantization_config")  # the tensors themselves say how they are quantized
    keys.only("qk_norm", True)
    keys.only("cross_attn_norm", True)
    keys.only("window_size", [-1, -1])
    keys.only("patch_size", [1, 2, 2])
    model_type = keys.string("model_type")
    if model_type == "flf2v":
        raise keys.error("model_type", f"is 'flf2v': {FIRST_AND_LAST_FRAME}")
    if model_type not in ("t2v", "i2v"):
        raise keys.error("model_type", f"is {model_type!r}; supported: 't2v', 'i2v'")
    names = ("dim", "ffn_dim", "num_heads", "num_layers")
    fields: dict[str, int | None] = {name: keys.integer(name) for name in names}
    fields |= {name: keys.integer(name) for name in ("in_dim", "out_dim", "freq_dim", "text_len")}
    fields["text_dim"] = keys.integer("text_dim", config.WAN_TEXT_DIM)
    image_dim = None
    if model_type == "i2v":
        image_dim = keys.integer("image_dim", config.WAN_IMAGE_DIM)
    eps = keys.number("eps")
    keys.finish()
    fields["image_dim"] = image_dim if has_image_encoder else None
    return _checked(path, config.TransformerConfig, **fields, eps=eps)


def diffusers_transformer(path: Path) -> config.TransformerConfig:
    """Read `transformer/config.json` of the diffusers layout (class WanTransformer3DModel)."""
    keys = Keys.read(path)
    keys.only("qk_norm", "rms_norm_across_heads")
    keys.only("cross_attn_norm", True)
    keys.only("patch_size", [1, 2, 2])
    if keys.optional_integer("pos_embed_seq_len") is not None:
        raise keys.error("pos_embed_seq_len", f"is set: {FIRST_AND_LAST_FRAME}")
    keys.drop("rope_max_seq_len", "add_img_emb", "window_size")
    num_heads, head_dim = keys.integer("num_attention_heads"), keys.integer("attention_head_dim")
    dim, image_dim = num_heads * head_dim, keys.optional_integer("image_dim")
    if keys.optional_integer("added_kv_proj_dim") != (dim if image_dim else None):
        raise keys.error("added_kv_proj_dim", f"does not fit image_dim {image_dim} and width {dim}")
    fields = {
        name: keys.integer(name) for name in ("ffn_dim", "num_layers", "freq_dim", "text_dim")
    }
    fields |= {"in_dim": keys.integer("in_channels"), "out_dim": keys.integer("out_channels")}
    eps = keys.number("eps")
    keys.finish()
    return _checked(
        path,
        config.TransformerConfig,
        **fields,
        dim=dim,
        num_heads=num_heads,
        eps=eps,
        image_dim=image_dim,
    )


def vae(path: Path) -> config.VAEConfig:
    """Read AutoencoderKLWan's keys from `vae/config.json`, or natively from `vae_config.json`."""
    keys = Keys.read(path)
    base_dim = keys.integer("base_dim")
    keys.only("decoder_base_dim", None, base_dim)
    keys.only("attn_scales", [])
    keys.only("is_residual", False)
    keys.only("patch_size", None)
    keys.only("in_channels", 3)
    keys.only("out_channels", 3)
    keys.drop("dropout", "clip_output", "scale_factor_temporal", "scale_factor_spatial")
    fields: dict[str, Any] = {"base_dim": base_dim}
    fields |= {name: keys.integer(name) for name in ("z_dim", "num_res_blocks")}
    fields["dim_mult"] = keys.sequence("dim_mult", int)
    fields["temporal_downsample"] = keys.sequence("temperal_downsample", bool)
    fields["latent_mean"] = keys.sequence("latents_mean", float)
    fields["latent_std"] = keys.sequence("latents_std", float)
    keys.finish()
    return _checked(path, config.VAEConfig, **fields)


def text_encoder(path: Path) -> config.TextEncoderConfig:
    """Read the keys of transformers' UMT5Config: `text_encoder/config.json`, or `t5_config.json`.

    Its many other keys (generation, decoder) do not concern the encoder and are passed over.
    """
    keys = Keys.read(path)
    keys.only("model_type", "umt5")
    keys.only("feed_forward_proj", "gated-gelu")
    return _checked(
        path,
        config.TextEncoderConfig,
        vocab_size=keys.integer("vocab_size"),
        dim=keys.integer("d_model"),
        head_dim=keys.integer("d_kv"),
        num_heads=keys.integer("num_heads"),
        ffn_dim=keys.integer("d_ff"),
        num_layers=keys.integer("num_layers"),
        num_buckets=keys.integer("relative_attention_num_buckets"),
        max_distance=keys.integer("relative_attention_max_distance"),
        eps=keys.number("layer_norm_epsilon"),
    )


def image_encoder(path: Path) -> config.ImageEncoderConfig:
    """Read the keys of transformers' CLIPVisionConfig: `image_encoder/config.json`, or natively
    `clip_config.json`. Its many other keys do not concern the tower and are passed over.
    """
    keys = Keys.read(path)
    keys.only("model_type", "clip_vision_model")
    keys.only("hidden_act", "gelu")
    keys.only("num_channels", 3)
    return _checked(
        path,
        config.ImageEncoderConfig,
        image_size=keys.integer("image_size"),
        patch_size=keys.integer("patch_size"),
        dim=keys.integer("hidden_size"),
        ffn_dim=keys.integer("intermediate_size"),
        num_heads=keys.integer("num_attention_heads"),
        num_layers=keys.integer("num_hidden_layers"),
        eps=keys.number("layer_norm_eps"),
    )


def _checked(path: Path, build: Callable[..., Config], **fields: Any) -> Config:
    try:
        return build(**fields)
    except ValueError as error:
        raise errors.ConfigError(path, f"contradicts itself: {error}") from error
