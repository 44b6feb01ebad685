"""From the keys of one preset file to the fields of a Look."""

import difflib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from pydantic import ValidationError

from jobs import looks, preset_keys

DEFAULT_MODEL_PATHS = {
    ("t2v", False): "Wan2.1-T2V-14B",
    ("i2v", False): "Wan2.1-I2V-14B-480P",
    ("t2v", True): "Wan2.2-T2V-A14B",
    ("i2v", True): "Wan2.2-I2V-A14B",
}
"""By task, and whether the model has two networks."""

WAN21_CLASS, WAN22_CLASS = "wan2.1_distill", "wan2.2_moe_distill"

_CHECKPOINT_KEYS = ("dit_original_ckpt", "dit_quantized_ckpt", "dit_distill_ckpt")
_EXPERT_KEYS = (
    "high_noise_original_ckpt",
    "low_noise_original_ckpt",
    "high_noise_quantized_ckpt",
    "low_noise_quantized_ckpt",
)
_FLAGS = (
    "dit_quantized",
    "cpu_offload",
    "t5_cpu_offload",
    "clip_cpu_offload",
    "vae_cpu_offload",
    "use_tiling_vae",
    "unload_modules",
    "lazy_load",
    "t5_lazy_load",
    "use_image_encoder",
)
_SIZE_RULES = {"adaptive": "bucket", "fixed_shape": "fixed"}
_KEY_OF_FIELD = {
    "width": "target_width",
    "height": "target_height",
    "num_frames": "target_video_length",
    "transformer": "dit_original_ckpt",
    "high_noise_transformer": "high_noise_original_ckpt",
    "low_noise_transformer": "low_noise_original_ckpt",
    "loras": "lora_configs",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a file says: a look, or else what is wrong with it."""

    look: looks.Look | None
    problems: list[str]
    keys_without_effect: list[tuple[str, str]]


def read(fields: dict[str, Any], *, name: str) -> Reading:
    """`name` is the file's: LightX2V's own files say their task there only."""
    file = _File(fields=fields, task=_task(fields, name))
    for part in (_shape, _size, _transformer, _experts, _loras, _memory):
        part(file)
    problems = [
        *_unknown_keys(fields),
        *_unsupported(file),
        *_contradictions(file),
        *file.problems,
    ]
    look = None
    try:
        look = looks.Look.model_validate(_defaults(file) | file.values)
    except ValidationError as error:
        told = looks.messages(error)
        problems += [f"{_key_of(part, file)} {text}".lstrip() for part, text in told]
    notes = [*file.notes.items(), *_without_effect(file)]
    order = list(fields)
    notes.sort(key=lambda note: order.index(note[0].partition(".")[0]))
    return Reading(look=look, problems=problems, keys_without_effect=notes)


@dataclass
class _File:
    fields: dict[str, Any]
    task: object
    values: dict[str, Any] = field(default_factory=dict)
    """Fields of the look that the file decides."""
    keys: dict[str, str] = field(default_factory=dict)
    """Under which key a field was given, where it has several."""
    notes: dict[str, str] = field(default_factory=dict)
    """Keys that have no effect because of others, or another than they say."""
    problems: list[str] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """The value; None if the key says "off" in one of its ways."""
        value = self.fields.get(key)
        return None if preset_keys.is_off(value) else value

    def is_on(self, key: str) -> bool:
        return self.fields.get(key) is True

    def take(self, key: str, field_name: str) -> None:
        if key in self.fields:
            self.put(key, field_name, self.fields[key])

    def put(self, key: str, field_name: str, value: object) -> None:
        self.values[field_name] = value
        self.keys[field_name] = key

    @property
    def is_moe(self) -> bool:
        return (
            self.fields.get("boundary_step_index") is not None
            or any(self.get(key) is not None for key in _EXPERT_KEYS)
            or self.fields.get("model_cls") == WAN22_CLASS
        )

    @property
    def model_path(self) -> str:
        given = self.fields.get("model_path")
        return given if isinstance(given, str) and given.strip() else _defaults(self)["model_path"]

    @property
    def loras_given(self) -> bool:
        return self.get("lora_path") is not None or self.get("lora_configs") is not None


def _task(fields: dict[str, Any], name: str) -> object:
    named_i2v = re.search(r"(^|[_-])i2v([_-]|$)", name) is not None
    return fields.get("task", "i2v" if named_i2v else "t2v")


def _defaults(file: _File) -> dict[str, Any]:
    """What a LightX2V file leaves to its caller."""
    task = "i2v" if file.task == "i2v" else "t2v"
    return {
        "task": file.task,
        "model_path": DEFAULT_MODEL_PATHS[task, file.is_moe],
        "denoising_step_list": looks.DEFAULT_STEPS,
        "step_rule": "euler",
        "sample_shift": 5.0,
        "width": 832,
        "height": 480,
        "num_frames": 81,
        "fps": 16,
        "size_rule": "area" if task == "i2v" else "fixed",
    }


def _key_of(field_name: str, file: _File) -> str:
    """The key that the person wrote for this field of the look."""
    return file.keys.get(field_name) or _KEY_OF_FIELD.get(field_name, field_name)


# One part of the look each.


def _shape(file: _File) -> None:
    for name in ("model_path", "denoising_step_list", "step_rule", "sample_shift", "fps"):
        file.take(name, name)
    for key in ("target_video_length", "num_frames"):
        file.take(key, "num_frames")


def _size(file: _File) -> None:
    size = file.fields.get("size")
    if isinstance(size, list) and len(size) == 2:
        for name, value in zip(("height", "width"), size, strict=True):
            file.put(f"size: the {name}", name, value)
    elif "size" in file.fields:
        file.problems.append(
            f"size must be [height, width] such as [480, 832], got {looks.shown(size)}"
        )
    file.take("target_width", "width")
    file.take("target_height", "height")
    if file.task == "i2v":
        _size_rule(file)


def _size_rule(file: _File) -> None:
    mode, resolution = file.get("resize_mode"), file.get("resolution")
    if mode is not None:
        if not isinstance(mode, str) or mode not in _SIZE_RULES:
            file.problems.append(
                f"resize_mode is {looks.shown(mode)}: of LightX2V's modes "
                '"adaptive" and "fixed_shape" are supported; '
                "without the key a video has the image's aspect"
            )
            return
        file.values["size_rule"] = _SIZE_RULES[mode]
    if resolution is None:
        return
    if mode != "adaptive":
        file.notes["resolution"] = 'only resize_mode "adaptive" reads it'
    elif not isinstance(resolution, str) or resolution not in looks.LANDSCAPE:
        names = " or ".join(looks.shown(name) for name in looks.LANDSCAPE)
        file.problems.append(f"resolution must be {names}, got {looks.shown(resolution)}")
    else:
        for key in file.fields.keys() & {"target_width", "target_height", "size"}:
            file.notes[key] = 'with resize_mode "adaptive", resolution decides the size'
        file.values["width"], file.values["height"] = looks.LANDSCAPE[resolution]


def _transformer(file: _File) -> None:
    given = {key: file.get(key) for key in _CHECKPOINT_KEYS if file.get(key) is not None}
    if len(given) > 1:
        file.problems.append(f"{' and '.join(given)} both name the transformer: keep one")
    for key, path in given.items():
        file.put(key, "transformer", path)
    is_quantized, quantization = _quantization(file)
    if not is_quantized:
        for key in ("dit_quantized_ckpt", *_EXPERT_KEYS[2:]):
            if file.get(key) is not None:
                file.problems.append(
                    f"{key} is given but dit_quantized is not true: set it, or remove {key}"
                )
        return
    file.values["quantization"] = quantization
    if unquantized := [key for key in given if key != "dit_quantized_ckpt"]:
        file.problems.append(
            f"dit_quantized is true but {unquantized[0]} names unquantized weights: "
            "name them as dit_quantized_ckpt, or remove dit_quantized"
        )
    if given or any(file.get(key) is not None for key in _EXPERT_KEYS):
        return
    if quantization is None:
        file.problems.append(
            "dit_quantized needs dit_quant_scheme, such as fp8-sgl, or dit_quantized_ckpt"
        )
        return
    # What a LoRA in the preset is applied to was not distilled before.
    folder = quantization if file.loras_given else f"distill_{quantization}"
    root = PurePosixPath(file.model_path, folder)
    if file.is_moe:
        for side in ("high", "low"):
            file.values[f"{side}_noise_transformer"] = str(root / f"{side}_noise_model")
    else:
        file.values["transformer"] = str(root)


def _quantization(file: _File) -> tuple[bool, str | None]:
    """Whether the preset says that its weights are quantized, and how, if it says."""
    schemes = {}
    if (scheme := file.get("dit_quant_scheme")) not in (None, "Default"):
        schemes["dit_quant_scheme"] = scheme
    if (mm_type := _mm_type(file)) is not None:
        schemes["mm_config"] = mm_type
    is_quantized = file.is_on("dit_quantized") or (
        "mm_config" in schemes and file.fields.get("dit_quantized") is None
    )
    if not is_quantized:
        if "mm_config" in schemes:
            file.problems.append(
                f"mm_config is {looks.shown(mm_type)} but dit_quantized is false: keep one"
            )
        if "dit_quant_scheme" in schemes:
            file.notes["dit_quant_scheme"] = "dit_quantized is not true"
        return False, None
    kinds = {_kind_of_scheme(file, key, scheme) for key, scheme in schemes.items()} - {None}
    if len(kinds) > 1:
        file.problems.append("dit_quant_scheme and mm_config say different things: keep one")
    return True, min(kinds, key=str, default=None)


def _mm_type(file: _File) -> object:
    config = file.get("mm_config")
    if config is None:
        return None
    if not isinstance(config, dict) or config.keys() - {"mm_type", "weight_auto_quant"}:
        file.problems.append(
            f'mm_config must be {{"mm_type": "..."}}, got {looks.shown(config)}: '
            "use dit_quantized and dit_quant_scheme instead"
        )
        return None
    if not preset_keys.is_off(config.get("weight_auto_quant")):
        file.problems.append(
            "mm_config.weight_auto_quant: weights are not quantized while they are loaded; "
            "use a quantized checkpoint"
        )
    mm_type = config.get("mm_type")
    return None if mm_type in (None, "Default") else mm_type


def _kind_of_scheme(file: _File, key: str, scheme: object) -> str | None:
    kind = re.match(r"(?:W-)?(fp8|int8)-", scheme) if isinstance(scheme, str) else None
    if kind is None:
        file.problems.append(
            f"{key} is {looks.shown(scheme)}: fp8 and int8 weights are supported "
            "(fp8-..., int8-...), NVFP4, MXFP and GGUF are not; use the fp8 checkpoint"
        )
        return None
    return kind[1]


def _experts(file: _File) -> None:
    file.take("boundary_step_index", "boundary_step_index")
    for side in ("high", "low"):
        keys = [f"{side}_noise_original_ckpt", f"{side}_noise_quantized_ckpt"]
        given = [key for key in keys if file.get(key) is not None]
        if len(given) > 1:
            file.problems.append(f"{' and '.join(given)} name the same network: keep one")
        for key in given:
            file.put(key, f"{side}_noise_transformer", file.get(key))


def _loras(file: _File) -> None:
    paths, configs = file.get("lora_path"), file.get("lora_configs")
    if paths is not None and configs is not None:
        file.problems.append("lora_path and lora_configs are the same thing: keep one")
    if "strength_model" in file.fields and paths is None:
        file.notes["strength_model"] = "it belongs to lora_path: lora_configs has its own strength"
    if paths is not None:
        uses = _from_paths(file, paths)
        file.put("lora_path", "loras", uses)
    if configs is not None:
        uses = list(_from_configs(file, configs))
        file.put("lora_configs", "loras", uses)
    networks = file.values.keys() & {"transformer", "high_noise_transformer"}
    if file.loras_given and not networks:
        # As in LightX2V: a LoRA in the preset is the distillation, made for the plain model.
        file.values["base"] = "original"


def _from_paths(file: _File, paths: object) -> list[dict[str, object]]:
    strength = file.fields.get("strength_model")
    entries = paths if isinstance(paths, list) else [paths]
    if file.is_moe:
        file.problems.append(
            "lora_path cannot say which of Wan2.2's networks is meant: use lora_configs"
        )
    return [
        {"path": path} | ({} if strength is None else {"strength": strength}) for path in entries
    ]


def _from_configs(file: _File, configs: object) -> Iterator[dict[str, object]]:
    if not isinstance(configs, list):
        file.problems.append(
            'lora_configs must be a list such as [{"path": "loras/film.safetensors", '
            f'"strength": 1.0}}], got {looks.shown(configs)}'
        )
        return
    for number, config in enumerate(configs, 1):
        if not isinstance(config, dict) or not config.keys() <= {
            "path",
            "strength",
            "name",
            "alpha",
        }:
            file.problems.append(
                f"lora_configs: entry {number} must have path, strength and name only, "
                f"got {looks.shown(config)}"
            )
            continue
        if "alpha" in config:
            file.notes["lora_configs.alpha"] = "alpha is read from the LoRA file"
        if file.is_moe and config.get("name") is None:
            names = " or ".join(looks.shown(name) for name in looks.EXPERTS)
            file.problems.append(f"lora_configs: entry {number} name must be {names}")
        yield {key: value for key, value in config.items() if key != "alpha"}


def _memory(file: _File) -> None:
    granularity = file.get("offload_granularity")
    if granularity not in (None, "model", "block", "phase"):
        file.problems.append(
            f'offload_granularity must be "model" or "block", got {looks.shown(granularity)}'
        )
    if file.is_on("cpu_offload"):
        file.values["offload"] = "model" if granularity == "model" else "block"
        if granularity == "phase":
            file.notes["offload_granularity"] = "parts of a block are not moved alone: as block"
    elif "offload_granularity" in file.fields:
        file.notes["offload_granularity"] = "cpu_offload is not true"
    default = file.is_on("cpu_offload")  # as in LightX2V
    encoders = {"t5_cpu_offload": "text_encoder_on_cpu", "vae_cpu_offload": "vae_on_cpu"}
    if file.task == "i2v" and not file.is_moe:
        encoders["clip_cpu_offload"] = "image_encoder_on_cpu"
    elif file.task == "i2v" and "clip_cpu_offload" in file.fields:
        file.notes["clip_cpu_offload"] = "Wan2.2 has no image encoder"
    for key, name in encoders.items():
        file.values[name] = default if file.fields.get(key) is None else file.is_on(key)
    file.values["vae_tiling"] = file.is_on("use_tiling_vae")
    file.take("vae_dtype", "vae_dtype")
    unloads = ("unload_modules", "lazy_load", "t5_lazy_load")
    file.values["unload_encoders"] = any(file.is_on(key) for key in unloads)


# What is wrong, and what has no effect.


def _unknown_keys(fields: dict[str, Any]) -> Iterator[str]:
    for key in sorted(fields.keys() - preset_keys.KEYS)[:5]:
        close = difflib.get_close_matches(key[:64], preset_keys.KEYS, n=1)
        guess = f", did you mean {close[0]}?" if close else ": remove it, see docs/presets.md"
        yield f"unknown key {looks.shown(key)}{guess}"


def _has_no_image(file: _File, key: str) -> bool:
    return file.task != "i2v" and key in preset_keys.IMAGE_KEYS


def _unsupported(file: _File) -> Iterator[str]:
    for key, limited in preset_keys.LIMITED_KEYS.items():
        if key not in file.fields or _has_no_image(file, key):
            continue
        if not limited.allows(file.fields[key]):
            yield f"{key} is {looks.shown(file.fields[key])}: {limited.otherwise}"
    for key in _FLAGS:
        value = None if _has_no_image(file, key) else file.fields.get(key)
        if value not in (None, True, False) or type(value) in (int, float):
            yield f"{key} must be true or false, got {looks.shown(value)}"


def _contradictions(file: _File) -> Iterator[str]:
    """What two keys say together, and the keys that are checked only."""
    fields = file.fields
    if fields.get("enable_cfg", False) is not False:
        yield (
            f"enable_cfg must be false, got {looks.shown(fields['enable_cfg'])}: "
            "distilled models render without CFG, with it their videos blur"
        )
    steps = fields.get("denoising_step_list", list(looks.DEFAULT_STEPS))
    num_steps = len(steps) if isinstance(steps, list) else None
    if "infer_steps" in fields and num_steps not in (None, fields["infer_steps"]):
        yield (
            f"infer_steps is {looks.shown(fields['infer_steps'])} but denoising_step_list has "
            f"{num_steps} entries: {num_steps} would do, or remove infer_steps"
        )
    if "num_frames" in fields and "target_video_length" in fields:
        yield "num_frames and target_video_length are the same thing: keep one"
    if "size" in fields and fields.keys() & {"target_width", "target_height"}:
        yield "size is [target_height, target_width]: keep one form"
    description = fields.get("description", "")
    if not isinstance(description, str) or not description.isprintable():
        yield f"description must be one line of text, got {looks.shown(description)}"
    yield from _wrong_model(file)


def _wrong_model(file: _File) -> Iterator[str]:
    model_cls = file.fields.get("model_cls", WAN22_CLASS if file.is_moe else WAN21_CLASS)
    if model_cls not in (WAN21_CLASS, WAN22_CLASS):
        yield (
            f"model_cls is {looks.shown(model_cls)}: step-distilled Wan2.1 and Wan2.2 are "
            f'supported; use "{WAN21_CLASS}" or "{WAN22_CLASS}"'
        )
    elif model_cls == WAN22_CLASS and file.fields.get("boundary_step_index") is None:
        if not any(file.get(key) is not None for key in _EXPERT_KEYS):  # else the look says so
            yield f'"{WAN22_CLASS}" needs boundary_step_index: 2 would do for 4 steps'
    elif model_cls == WAN21_CLASS and file.is_moe:
        yield (
            f'model_cls "{WAN21_CLASS}" has one network: use "{WAN22_CLASS}", '
            "or remove boundary_step_index and the high_noise and low_noise keys"
        )
    if file.task != "i2v":
        return
    if not file.is_moe and file.fields.get("use_image_encoder") is False:
        yield (
            "use_image_encoder is false: Wan2.1's image-to-video model needs the image encoder; "
            "remove the key"
        )
    if file.is_moe and file.fields.get("use_image_encoder") is True:
        yield "use_image_encoder is true: Wan2.2 has no image encoder; remove the key"


def _without_effect(file: _File) -> Iterator[tuple[str, str]]:
    for key in file.fields:
        if _has_no_image(file, key):
            yield key, preset_keys.NO_IMAGE
        elif key in preset_keys.KEYS_WITHOUT_EFFECT:
            yield key, preset_keys.KEYS_WITHOUT_EFFECT[key]
        elif key in preset_keys.LIMITED_KEYS:
            yield key, preset_keys.LIMITED_KEYS[key].while_harmless
