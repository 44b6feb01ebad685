"""Which files of a model folder are used: found without torch and without reading weights.

Two layouts are known. Native (Wan2.1 as released, LightX2V):

    config.json
    distill_models/distill_model.safetensors | .pt     the distilled transformer, used if there,
    wan2.1_..._lightx2v_4step.safetensors              also under its published name;
    distill_fp8/ or distill_int8/                      else its only 8-bit copy
    diffusion_pytorch_model.safetensors                else one file,
    diffusion_pytorch_model.safetensors.index.json     or shards listed by this index
    models_t5_umt5-xxl-enc-bf16.pth
    Wan2.1_VAE.pth
    google/umt5-xxl/tokenizer.json
    t5_config.json, vae_config.json                    only where these differ from Wan2.1

Diffusers: `model_index.json` and the folders transformer, vae, text_encoder, tokenizer. A distilled
transformer may lie there as in the native layout, and then comes before transformer/.

An image-to-video model has one network more, in the root or in image_encoder/:

    models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth
    clip_config.json                                   only where it differs from Wan2.1

Wan2.2's models have two transformers: high_noise_model/ and low_noise_model/ with a config.json and
weights each, or transformer/ and transformer_2/.
"""

import enum
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models import config, config_files, errors, foreign_files, transformer_files

TRANSFORMER_STEM = transformer_files.STEM
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "Wan2.1_VAE.pth"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_FOLDER = Path("google") / "umt5-xxl"
TOKENIZER_FILE = "tokenizer.json"
WHERE_TOKENIZER = (
    f"Wan-AI's repositories have it in {TOKENIZER_FOLDER}/, those for diffusers in tokenizer/"
)
END_BYTES = 100  # read of each end of it; spaces may come before or after its braces
QUANTIZED_FOLDER_NAMES = ("distill_fp8", "distill_int8", "fp8", "int8")
BOTH_LAYOUTS = (
    "a model folder in the native layout (config.json, diffusion_pytorch_model*.safetensors or "
    f"{transformer_files.DISTILLED_FILES[0]}, {TEXT_ENCODER_FILE}, {VAE_FILE}, "
    f"{TOKENIZER_FOLDER}/) or in the diffusers layout (model_index.json, transformer/, vae/, "
    f"text_encoder/, tokenizer/); image-to-video needs {IMAGE_ENCODER_FILE} or image_encoder/ too"
)


class Layout(enum.Enum):
    NATIVE = "native"
    """Files and tensor names as Wan2.1 and LightX2V release them."""
    DIFFUSERS = "diffusers"
    """Folders and tensor names of a diffusers pipeline."""


class Task(enum.Enum):
    TEXT_TO_VIDEO = "text-to-video"
    """Takes a prompt."""
    IMAGE_TO_VIDEO = "image-to-video"
    """Takes a prompt and the picture that the video starts with."""


TASKS = {"t2v": Task.TEXT_TO_VIDEO, "i2v": Task.IMAGE_TO_VIDEO}
"""As presets, LightX2V and native configs call them."""


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files that make one model."""

    root: Path
    layout: Layout
    task: Task
    transformer_config: Path
    transformer: tuple[Path, ...]
    """One file, the shards of one index, or the files of a split by block, in either naming."""
    vae_config: Path | None
    """None: Wan2.1's own dimensions."""
    vae: tuple[Path, ...]
    text_encoder_config: Path | None
    """None: UMT5-XXL."""
    text_encoder: tuple[Path, ...]
    tokenizer: Path
    """A folder."""
    image_encoder_config: Path | None = None
    """None: CLIP ViT-H/14, or no image encoder."""
    image_encoder: tuple[Path, ...] = ()
    """Empty for text-to-video."""
    quantized_config: Path | None = None
    """A config.json beside weights that lie apart from the root: it may add keys to the root's."""
    low_noise_transformer: tuple[Path, ...] = ()
    """The second transformer of Wan2.2; `transformer` is then the one for high noise."""
    low_noise_config: Path | None = None

    @property
    def experts(self) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
        """The files of the transformer for high noise, or of the only one; those for low noise."""
        return self.transformer, self.low_noise_transformer

    @property
    def weights(self) -> tuple[Path, ...]:
        transformers = self.transformer + self.low_noise_transformer
        return transformers + self.vae + self.text_encoder + self.image_encoder

    @property
    def configs(self) -> tuple[Path, ...]:
        """What decides beside the weights what is rendered: dimensions, and the tokenizer."""
        paths = (
            self.transformer_config,
            self.low_noise_config,
            self.quantized_config,
            self.vae_config,
            self.text_encoder_config,
            self.image_encoder_config,
            *sorted(self.tokenizer.glob("*.json")),
        )
        return tuple(dict.fromkeys(path for path in paths if path is not None and path.is_file()))

    @property
    def transformers_can_be_read_again(self) -> bool:
        """Tensor by tensor, so that a LoRA needs no copies of what it changes."""
        paths = self.transformer + self.low_noise_transformer
        return all(path.suffix == ".safetensors" for path in paths)

    @property
    def sizes_bytes(self) -> Mapping[Path, int]:
        return {path: path.stat().st_size for path in self.weights}


def find(
    root: Path,
    *,
    transformer_file: Path | None = None,
    low_noise_file: Path | None = None,
    base: bool = False,
    task: Task | None = None,
) -> ModelFiles:
    """Say which files of a folder would be used.

    `transformer_file` (file, index or folder) replaces the transformer, `low_noise_file` the second
    of a model that has two; `base` passes over distilled ones, for a LoRA that distils by itself.
    Raises CheckpointError: MissingFileError where one is not there, AmbiguousFilesError where
    several would do, ConfigError where the model is for another task than `task` or its tokenizer
    is damaged. No weight file is opened.
    """
    if not root.is_dir():
        raise errors.MissingFileError(root, BOTH_LAYOUTS, hint="there is no such folder")
    markers = [path for path in (root / "model_index.json", root / "config.json") if path.is_file()]
    if not markers and transformer_files.expert_folders(root, base=base) is None:
        raise errors.MissingFileError(root, BOTH_LAYOUTS)
    if len(markers) > 1:
        raise errors.AmbiguousFilesError(root, "start of its layout", markers)
    is_diffusers = bool(markers) and markers[0].name == "model_index.json"
    asked = _Asked(transformer_file, low_noise_file, base=base, task=task)
    found = (_diffusers if is_diffusers else _native)(root, asked)
    if low_noise_file and not found.low_noise_transformer:
        raise errors.CheckpointError(f"{root}: this model has one transformer, not two")
    return found


@dataclass(frozen=True)
class _Asked:
    """What a caller wants otherwise than the folder says."""

    transformer: Path | None
    low_noise: Path | None
    base: bool
    task: Task | None


def is_distilled(files: ModelFiles) -> bool:
    """Whether the folder says so of its transformer: `base` would find another one, or none."""
    try:
        return find(files.root, base=True).experts != files.experts
    except errors.CheckpointError:
        return True


def transformer_sizes(files: ModelFiles, path: Path) -> config.TransformerConfig:
    """What one of a model's transformer configs says. Raises ConfigError."""
    if files.layout is Layout.DIFFUSERS:
        return config_files.diffusers_transformer(path)
    return config_files.native_transformer(
        path, more=files.quantized_config, has_image_encoder=bool(files.image_encoder)
    )


def vae_sizes(files: ModelFiles) -> config.VAEConfig:
    """Raises ConfigError."""
    return config_files.vae(files.vae_config) if files.vae_config else config.WAN_VAE


def text_encoder_sizes(files: ModelFiles) -> config.TextEncoderConfig:
    """Raises ConfigError."""
    path = files.text_encoder_config
    return config_files.text_encoder(path) if path else config.UMT5_XXL


def weight_hashes(files: ModelFiles) -> dict[str, str]:
    """sha256 of every weight file, config and file of the tokenizer by its path under the root.

    Reads them all: keep the answer.
    """
    hashes = {}
    for path in files.weights + files.configs:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        hashes[_relative(path, files.root)] = digest
    return hashes


def _native(root: Path, asked: _Asked) -> ModelFiles:
    folders = transformer_files.expert_folders(root, base=asked.base)
    has_two = folders is not None or asked.low_noise is not None
    configs = [_expert_config(root, number, folders) for number in range(2)] if has_two else []
    transformer_config = configs[0] if has_two else root / "config.json"
    task = _task(transformer_config, asked.task)
    # Wan2.2 sees its first frame in the latents only.
    has_image = task is Task.IMAGE_TO_VIDEO and not has_two
    tokenizer = root / TOKENIZER_FOLDER
    if not tokenizer.is_dir():
        raise errors.MissingFileError(root, f"the tokenizer folder {TOKENIZER_FOLDER}/")
    check_tokenizer(tokenizer)
    if has_two:
        transformer = _expert(root, 0, folders, asked.transformer)
    else:
        transformer = _only_transformer(root, asked, plain=root)
    return ModelFiles(
        root=root,
        layout=Layout.NATIVE,
        task=task,
        transformer_config=transformer_config,
        transformer=transformer,
        vae_config=_if_there(root / "vae_config.json"),
        vae=(_beside(root, VAE_FILE),),
        text_encoder_config=_if_there(root / "t5_config.json"),
        text_encoder=(_beside(root, TEXT_ENCODER_FILE),),
        tokenizer=tokenizer,
        image_encoder_config=_if_there(root / "clip_config.json") if has_image else None,
        image_encoder=(_beside(root, IMAGE_ENCODER_FILE),) if has_image else (),
        quantized_config=_config_of_quantized(transformer[0].parent, root),
        low_noise_transformer=_expert(root, 1, folders, asked.low_noise) if has_two else (),
        low_noise_config=configs[1] if has_two else None,
    )


def check_tokenizer(folder: Path) -> None:
    """By the ends of `tokenizer.json`: all of it is some 17 MB. Raises CheckpointError.

    Nothing is made of `spiece.model` in its place: the ids of some tokens would be others.
    """
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise errors.MissingFileError(folder, TOKENIZER_FILE, hint=WHERE_TOKENIZER)
    try:
        with path.open("rb") as stream:
            beginning = stream.read(END_BYTES).lstrip()
            stream.seek(max(path.stat().st_size - END_BYTES, 0))
            end = stream.read().rstrip()
    except OSError as error:
        raise errors.ConfigError(path, f"cannot be read: {error}") from error
    if not beginning.startswith(b"{") or not end.endswith(b"}"):
        problem = foreign_files.told(path) or "it is damaged"
        raise errors.ConfigError(path, f"is no usable tokenizer: {problem}; {WHERE_TOKENIZER}")


def _only_transformer(root: Path, asked: _Asked, *, plain: Path) -> tuple[Path, ...]:
    """The one that was asked for, else a distilled one, else the one that lies in `plain`."""
    if asked.transformer:
        return transformer_files.named(asked.transformer)
    distilled = None if asked.base else transformer_files.distilled(root)
    return distilled or transformer_files.base(plain)


def _expert(
    root: Path, number: int, folders: tuple[Path, Path] | None, asked: Path | None
) -> tuple[Path, ...]:
    if asked:
        return transformer_files.named(asked)
    if folders is None:
        name = transformer_files.EXPERTS[number]
        raise errors.MissingFileError(root, f"the folder {name}/, or a file in its place")
    return transformer_files.in_folder(folders[number])


def _expert_config(root: Path, number: int, folders: tuple[Path, Path] | None) -> Path:
    """Beside the expert's weights; else the root's, or that of the expert as released."""
    places = [*([folders[number]] if folders else []), root]
    places.append(root / transformer_files.EXPERTS[number])
    there = [folder / "config.json" for folder in places if (folder / "config.json").is_file()]
    return there[0] if there else places[0] / "config.json"


def _config_of_quantized(folder: Path, root: Path) -> Path | None:
    """LightX2V's 8-bit folders bring a config.json of their own."""
    if folder.name not in QUANTIZED_FOLDER_NAMES:
        return None
    return _if_there(folder / "config.json") if folder != root else None


def _beside(root: Path, name: str) -> Path:
    """Encoders lie in the root; LightX2V's repositories also ship them in distill_models."""
    for path in (root / name, root / "distill_models" / name):
        if path.is_file():
            return path
    raise errors.MissingFileError(root, name)


def _diffusers(root: Path, asked: _Asked) -> ModelFiles:
    names = ("transformer", "vae", "text_encoder", "tokenizer")
    folders = {name: _folder(root, name) for name in names}
    check_tokenizer(folders["tokenizer"])
    task = _task(folders["transformer"] / "config.json", asked.task)
    takes_tokens = config_files.read_json(folders["transformer"] / "config.json").get("image_dim")
    clip = _folder(root, "image_encoder") if takes_tokens is not None else None
    transformer, low_noise = _diffusers_transformers(root, asked)
    return ModelFiles(
        root=root,
        layout=Layout.DIFFUSERS,
        task=task,
        transformer_config=folders["transformer"] / "config.json",
        transformer=transformer,
        vae_config=folders["vae"] / "config.json",
        vae=transformer_files.base(folders["vae"], what="autoencoder"),
        text_encoder_config=folders["text_encoder"] / "config.json",
        text_encoder=_shipped(folders["text_encoder"], "text encoder"),
        tokenizer=folders["tokenizer"],
        image_encoder_config=clip / "config.json" if clip else None,
        image_encoder=_shipped(clip, "image encoder") if clip else (),
        low_noise_transformer=low_noise,
        low_noise_config=root / "transformer_2" / "config.json" if low_noise else None,
    )


def _diffusers_transformers(root: Path, asked: _Asked) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """The only one or that for high noise; that for low noise, if there are two."""
    plain = (root / "transformer", root / "transformer_2")
    if not plain[1].is_dir():
        return _only_transformer(root, asked, plain=plain[0]), ()
    distilled = None if asked.base else transformer_files.expert_folders(root)
    if distilled and distilled[0].parent == root:
        raise errors.AmbiguousFilesError(root, "transformers", [*distilled, *plain])
    high, low = (
        transformer_files.named(own) if own else _in_either(distilled, plain, number)
        for number, own in enumerate((asked.transformer, asked.low_noise))
    )
    return high, low


def _in_either(
    distilled: tuple[Path, Path] | None, plain: tuple[Path, Path], number: int
) -> tuple[Path, ...]:
    if distilled is None:
        return transformer_files.base(plain[number])
    return transformer_files.in_folder(distilled[number])


def _shipped(folder: Path, what: str) -> tuple[Path, ...]:
    """Networks of transformers, which names their files otherwise than diffusers."""
    return transformer_files.base(folder, what=what, stem="model")


def _folder(root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        raise errors.MissingFileError(root, f"the folder {name}/", hint=BOTH_LAYOUTS)
    return root / name


def _task(transformer_config: Path, wanted: Task | None) -> Task:
    """What the transformer takes; whether its config makes sense is seen when it is read."""
    values = config_files.read_json(transformer_config, hint=config_files.WHERE_CONFIG)
    is_native_image = values.get("model_type") in ("i2v", "flf2v")
    # Wan2.2 in diffusers' words: no image tokens, but a condition beside the noise.
    has_condition = _more(values.get("in_channels"), values.get("out_channels"))
    takes_image = is_native_image or values.get("image_dim") is not None or has_condition
    task = Task.IMAGE_TO_VIDEO if takes_image else Task.TEXT_TO_VIDEO
    if wanted is not None and wanted is not task:
        problem = f"does not fit the task: {task.value} model, not {wanted.value}"
        raise errors.WrongTaskError(transformer_config, problem)
    return task


def _more(channels_in: object, channels_out: object) -> bool:
    both_given = isinstance(channels_in, int) and isinstance(channels_out, int)
    return both_given and channels_in > channels_out  # type: ignore[operator]  # checked above


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
