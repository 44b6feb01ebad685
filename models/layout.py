"""Which files of a model folder are used: found without torch and without reading weights.

Two layouts are known. Native (Wan2.1 as released, LightX2V):

    config.json
    distill_models/distill_model.safetensors | .pt     the distilled transformer, used if there
    diffusion_pytorch_model.safetensors                else one file,
    diffusion_pytorch_model.safetensors.index.json     or shards listed by this index
    models_t5_umt5-xxl-enc-bf16.pth
    Wan2.1_VAE.pth
    google/umt5-xxl/                                   tokenizer
    t5_config.json, vae_config.json                    only where these differ from Wan2.1

Diffusers: `model_index.json` and the folders transformer, vae, text_encoder, tokenizer.

An image-to-video model has one network more, in the root or in image_encoder/:

    models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth
    clip_config.json                                   only where it differs from Wan2.1
"""

import enum
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from models import config_files, errors

TRANSFORMER_STEM = "diffusion_pytorch_model"
TEXT_ENCODER_FILE = "models_t5_umt5-xxl-enc-bf16.pth"
VAE_FILE = "Wan2.1_VAE.pth"
IMAGE_ENCODER_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
TOKENIZER_FOLDER = Path("google") / "umt5-xxl"
DISTILLED_FILES = (
    Path("distill_models") / "distill_model.safetensors",
    Path("distill_models") / "distill_model.pt",
    Path("distill_model.safetensors"),
    Path("distill_model.pt"),
)
"""A complete distilled transformer, first match wins; LightX2V has put it in both places."""

BOTH_LAYOUTS = (
    "a model folder in the native layout (config.json, diffusion_pytorch_model*.safetensors or "
    f"{DISTILLED_FILES[0]}, {TEXT_ENCODER_FILE}, {VAE_FILE}, {TOKENIZER_FOLDER}/) or in the "
    "diffusers layout (model_index.json, transformer/, vae/, text_encoder/, tokenizer/)"
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


@dataclass(frozen=True, kw_only=True)
class ModelFiles:
    """The files that make one model."""

    root: Path
    layout: Layout
    task: Task
    transformer_config: Path
    transformer: tuple[Path, ...]
    """One file, or the shards of one index."""
    transformer_is_native: bool
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

    @property
    def weights(self) -> tuple[Path, ...]:
        return self.transformer + self.vae + self.text_encoder + self.image_encoder

    @property
    def sizes_bytes(self) -> Mapping[Path, int]:
        return {path: path.stat().st_size for path in self.weights}


def find(
    root: Path, *, transformer_file: Path | None = None, task: Task | None = None
) -> ModelFiles:
    """Say which files of a folder would be used; `transformer_file` replaces the transformer.

    Raises CheckpointError: MissingFileError where one is not there, AmbiguousFilesError where
    several would do, ConfigError where the model is for another task than `task`. No weight file
    is opened.
    """
    if not root.is_dir():
        raise errors.MissingFileError(root, BOTH_LAYOUTS, hint="there is no such folder")
    markers = [path for path in (root / "model_index.json", root / "config.json") if path.is_file()]
    if not markers:
        raise errors.MissingFileError(root, BOTH_LAYOUTS)
    if len(markers) > 1:
        raise errors.AmbiguousFilesError(root, "start of its layout", markers)
    is_diffusers = markers[0].name == "model_index.json"
    if transformer_file is not None and not transformer_file.is_file():
        raise errors.MissingFileError(root, f"the transformer at {transformer_file}")
    return (_diffusers if is_diffusers else _native)(root, transformer_file, task)


def weight_hashes(files: ModelFiles) -> dict[str, str]:
    """sha256 of every weight file by its path under the root. Reads them all: keep the answer."""
    hashes = {}
    for path in files.weights:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        hashes[_relative(path, files.root)] = digest
    return hashes


def _native(root: Path, transformer_file: Path | None, wanted: Task | None) -> ModelFiles:
    task = _task(root / "config.json", wanted)
    has_image = task is Task.IMAGE_TO_VIDEO
    tokenizer = root / TOKENIZER_FOLDER
    if not tokenizer.is_dir():
        raise errors.MissingFileError(root, f"the tokenizer folder {TOKENIZER_FOLDER}/")
    return ModelFiles(
        root=root,
        layout=Layout.NATIVE,
        task=task,
        transformer_config=root / "config.json",
        transformer=(transformer_file,) if transformer_file else _native_transformer(root),
        transformer_is_native=True,
        vae_config=_if_there(root / "vae_config.json"),
        vae=(_beside(root, VAE_FILE),),
        text_encoder_config=_if_there(root / "t5_config.json"),
        text_encoder=(_beside(root, TEXT_ENCODER_FILE),),
        tokenizer=tokenizer,
        image_encoder_config=_if_there(root / "clip_config.json") if has_image else None,
        image_encoder=(_beside(root, IMAGE_ENCODER_FILE),) if has_image else (),
    )


def _native_transformer(root: Path) -> tuple[Path, ...]:
    for relative in DISTILLED_FILES:
        if (root / relative).is_file():
            return (root / relative,)
    return _one_or_sharded(root, TRANSFORMER_STEM, what="transformer")


def _beside(root: Path, name: str) -> Path:
    """Encoders lie in the root; LightX2V's repositories also ship them in distill_models."""
    for path in (root / name, root / "distill_models" / name):
        if path.is_file():
            return path
    raise errors.MissingFileError(root, name)


def _diffusers(root: Path, transformer_file: Path | None, wanted: Task | None) -> ModelFiles:
    names = ("transformer", "vae", "text_encoder", "tokenizer")
    folders = {name: _folder(root, name) for name in names}
    task = _task(folders["transformer"] / "config.json", wanted)
    clip = _folder(root, "image_encoder") if task is Task.IMAGE_TO_VIDEO else None
    if transformer_file is None:
        transformer = _one_or_sharded(folders["transformer"], TRANSFORMER_STEM, what="transformer")
    else:
        transformer = (transformer_file,)
    return ModelFiles(
        root=root,
        layout=Layout.DIFFUSERS,
        task=task,
        transformer_config=folders["transformer"] / "config.json",
        transformer=transformer,
        transformer_is_native=transformer_file is not None,
        vae_config=folders["vae"] / "config.json",
        vae=_one_or_sharded(folders["vae"], TRANSFORMER_STEM, what="autoencoder"),
        text_encoder_config=folders["text_encoder"] / "config.json",
        text_encoder=_one_or_sharded(folders["text_encoder"], "model", what="text encoder"),
        tokenizer=folders["tokenizer"],
        image_encoder_config=clip / "config.json" if clip else None,
        image_encoder=_one_or_sharded(clip, "model", what="image encoder") if clip else (),
    )


def _folder(root: Path, name: str) -> Path:
    if not (root / name).is_dir():
        raise errors.MissingFileError(root, f"the folder {name}/", hint=BOTH_LAYOUTS)
    return root / name


def _task(transformer_config: Path, wanted: Task | None) -> Task:
    """What the transformer takes; whether its config makes sense is seen when it is read."""
    values = config_files.read_json(transformer_config)
    is_native_image = values.get("model_type") in ("i2v", "flf2v")
    takes_image = is_native_image or values.get("image_dim") is not None
    task = Task.IMAGE_TO_VIDEO if takes_image else Task.TEXT_TO_VIDEO
    if wanted is not None and wanted is not task:
        problem = f"does not fit the task: {task.value} model, not {wanted.value}"
        raise errors.ConfigError(transformer_config, problem)
    return task


def _one_or_sharded(folder: Path, stem: str, *, what: str) -> tuple[Path, ...]:
    """`stem.safetensors`, or the shards that `stem.safetensors.index.json` lists. Never a guess."""
    single, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if single.is_file() and index.is_file():
        raise errors.AmbiguousFilesError(folder, what, [single, index])
    if single.is_file():
        return (single,)
    if index.is_file():
        return _shards(index)
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    hint = f"other files there are not merged by guess: {', '.join(others)}" if others else ""
    expected = f"the {what} as {single.name}, or as shards with {index.name}"
    raise errors.MissingFileError(folder, expected, hint=hint)


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise errors.ConfigError(index, f"is no index of shards: {error!r}") from error
    shards = tuple(index.parent / name for name in names)
    missing = [path.name for path in shards if not path.is_file()]
    if missing or not shards:
        raise errors.MissingFileError(index.parent, f"the shards {missing} that {index.name} lists")
    return shards


def _if_there(path: Path) -> Path | None:
    return path if path.is_file() else None


def _relative(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)
