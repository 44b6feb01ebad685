"""Where the weights of a transformer lie: in one file, in shards, or in a file per block.

    {name}.safetensors | .pt                                   all of it
    {name}.safetensors.index.json                              the shards that it lists
    block_0.safetensors, block_1..., non_block.safetensors     LightX2V's split

Nothing is opened but an index, and files are never put together for lying in one folder.
"""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from models import errors

STEM = "diffusion_pytorch_model"
DISTILLED_FILES = (
    Path("distill_models") / "distill_model.safetensors",
    Path("distill_models") / "distill_model.pt",
    Path("distill_model.safetensors"),
    Path("distill_model.pt"),
)
"""A complete distilled transformer, first match wins; LightX2V has put it in both places."""
QUANTIZED_FOLDERS = (Path("distill_fp8"), Path("distill_int8"))
"""LightX2V's 8-bit copies of it."""
PUBLISHED_NAME = re.compile(r"wan2\.[12]_(?!.*lora).*lightx2v_4step.*")
"""The single files and `_split` folders of its Distill-Models; the LoRAs are named alike."""
EXPERTS = ("high_noise_model", "low_noise_model")
"""Of Wan2.2: the folder of the transformer for the first steps, and of that for the last."""

INDEX_ENDING = ".safetensors.index.json"
REST_OF_SPLIT = "non_block.safetensors"
BLOCK_OF_SPLIT = re.compile(r"block_(\d+)\.safetensors")

Files = tuple[Path, ...]


@dataclass(frozen=True)
class Candidate:
    """What one could mean by the transformer of a folder: how to name it, and its files."""

    path: Path
    files: Files


def named(path: Path) -> Files:
    """The files behind a path that a person gave: a file, an index, or a folder with just one."""
    if path.is_dir():
        return in_folder(path)
    if not path.is_file():
        raise errors.MissingFileError(path.parent, f"the transformer at {path}")
    return shards(path) if path.name.endswith(INDEX_ENDING) else (path,)


def in_folder(folder: Path) -> Files:
    """The one transformer that lies in a folder, whatever its name."""
    candidates = _candidates(folder)
    if len(candidates) > 1:
        raise errors.AmbiguousFilesError(folder, "transformer", [c.path for c in candidates])
    if not candidates:
        expected = f"a transformer: a .safetensors or .pt file, *{INDEX_ENDING}, or block_0..."
        raise errors.MissingFileError(folder, expected)
    return candidates[0].files


def distilled(root: Path) -> Files | None:
    """The distilled transformer of a model folder; None: it has only a base model.

    A file comes before 8-bit copies in folders, which the same repository may ship beside it, and
    which `rushes quantize` makes of it.
    """
    for relative in DISTILLED_FILES:
        if (root / relative).is_file():
            return ((root / relative),)
    published = [*_published(root), *_published(root / "distill_models")]
    copies = [root / folder for folder in QUANTIZED_FOLDERS if (root / folder).is_dir()]
    found = published or copies
    if len(found) > 1:
        raise errors.AmbiguousFilesError(root, "distilled transformer", found)
    return named(found[0]) if found else None


def base(root: Path, *, what: str = "transformer", stem: str = STEM) -> Files:
    """`stem.safetensors`, or the shards that `stem.safetensors.index.json` lists. Never a guess."""
    single, index = root / f"{stem}.safetensors", root / f"{stem}{INDEX_ENDING}"
    if single.is_file() and index.is_file():
        raise errors.AmbiguousFilesError(root, what, [single, index])
    if single.is_file():
        return (single,)
    if index.is_file():
        return shards(index)
    others = sorted(path.name for path in root.glob("*.safetensors"))
    hint = f"other files there are not merged by guess: {', '.join(others)}" if others else ""
    expected = f"the {what} as {single.name}, or as shards with {index.name}"
    raise errors.MissingFileError(root, expected, hint=hint)


def expert_folders(root: Path, *, base: bool = False) -> tuple[Path, Path] | None:
    """The folders of Wan2.2's transformers for high and for low noise; None: not such a model.

    Distilled ones come first, in distill_models or as its only 8-bit copy, unless `base`.
    """
    distilled = (root / "distill_models", *(root / folder for folder in QUANTIZED_FOLDERS))
    pairs = {parent: _experts_in(parent) for parent in (*(() if base else distilled), root)}
    found = {parent: pair for parent, pair in pairs.items() if pair is not None}
    copies = [root / folder for folder in QUANTIZED_FOLDERS if root / folder in found]
    if len(copies) > 1 and root / "distill_models" not in found:
        raise errors.AmbiguousFilesError(root, "distilled transformers", copies)
    return next(iter(found.values()), None)


def _experts_in(parent: Path) -> tuple[Path, Path] | None:
    high, low = (parent / name for name in EXPERTS)
    if high.is_dir() != low.is_dir():
        missing = low if high.is_dir() else high
        raise errors.MissingFileError(parent, f"the folder {missing.name}/ beside its counterpart")
    return (high, low) if high.is_dir() else None


def shards(index: Path) -> Files:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        paths = tuple(index.parent / name for name in sorted(set(weight_map.values())))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise errors.ConfigError(index, f"is no index of shards: {error!r}") from error
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise errors.MissingFileError(index.parent, f"the shards {missing} that {index.name} lists")
    return paths


def _candidates(folder: Path) -> list[Candidate]:
    indexes = [Candidate(path, shards(path)) for path in sorted(folder.glob(f"*{INDEX_ENDING}"))]
    found = indexes + _split(folder)
    taken = {path for candidate in found for path in candidate.files}
    singles = sorted([*folder.glob("*.safetensors"), *folder.glob("*.pt")])
    found += [Candidate(path, (path,)) for path in singles if path not in taken]
    return _distinct(found)


def _split(folder: Path) -> list[Candidate]:
    blocks = {}
    for path in folder.glob("block_*.safetensors"):
        match = BLOCK_OF_SPLIT.fullmatch(path.name)
        if match:
            blocks[int(match[1])] = path
    rest = folder / REST_OF_SPLIT
    if not blocks and not rest.is_file():
        return []
    expected = [folder / f"block_{number}.safetensors" for number in range(max(blocks, default=0))]
    missing = [path.name for path in (*expected, rest) if not path.is_file()]
    if missing or not blocks:
        raise errors.MissingFileError(folder, f"all files of the split by block, not {missing}")
    ordered = tuple(blocks[number] for number in sorted(blocks))
    return [Candidate(rest, (*ordered, rest))]


def _distinct(candidates: Iterable[Candidate]) -> list[Candidate]:
    """An index that lists exactly the files of a split means the same as the split."""
    by_files: dict[frozenset[Path], Candidate] = {}
    for candidate in candidates:
        by_files.setdefault(frozenset(candidate.files), candidate)
    return list(by_files.values())


def _published(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    paths = (path for path in folder.iterdir() if PUBLISHED_NAME.fullmatch(path.name))
    return sorted(path for path in paths if path.is_dir() or path.suffix in (".safetensors", ".pt"))
