"""What can be wrong with a model folder: one class per thing a person would do differently."""

from collections.abc import Mapping, Sequence
from pathlib import Path

SHOWN_NAMES = 4  # enough to recognise the pattern, few enough for one line


def _some(names: Sequence[str]) -> str:
    rest = len(names) - SHOWN_NAMES
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {rest} more" if rest > 0 else "")


class CheckpointError(ValueError):
    """A model folder or a file in it cannot be used."""


class MissingFileError(CheckpointError):
    """A file that the folder's layout needs is not there."""

    def __init__(self, root: Path, expected: str, *, hint: str = "") -> None:
        super().__init__(f"{root}: expected {expected}" + (f"; {hint}" if hint else ""))
        self.root = root
        self.expected = expected


class MissingLoraError(MissingFileError):
    """A LoRA that was asked for is not there; the model's folder is not to blame."""

    def __init__(self, root: Path, path: Path) -> None:
        super().__init__(root, f"the LoRA at {path}")
        self.path = path


class AmbiguousFilesError(CheckpointError):
    """Several files could be meant, and the choice changes the result."""

    def __init__(self, root: Path, what: str, candidates: Sequence[Path]) -> None:
        listed = ", ".join(str(path.relative_to(root)) for path in candidates)
        super().__init__(f"{root}: several files could be the {what}: {listed}. Keep one of them.")
        self.root = root
        self.candidates = tuple(candidates)


class ConfigError(CheckpointError):
    """A config file is broken, or says something that these networks cannot do."""

    def __init__(
        self, path: Path, problem: str, *, key: str | None = None, against: Path | None = None
    ) -> None:
        super().__init__(f"{path}: " + (f"key {key!r} " if key else "") + problem)
        self.path = path
        self.key = key
        self.against = against
        """The transformer, or a config beside it, that says otherwise."""


class WrongTaskError(ConfigError):
    """A model for another task, or of more or fewer transformers, than was asked for.

    Nothing is wrong with it.
    """


class UnreadableWeightsError(CheckpointError):
    """A weight file is truncated, not of its format, or holds more than float tensors."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: cannot be read as weights: {reason}")
        self.path = path
        self.reason = reason


def unknown_dtype(name: str, dtype: object) -> str:
    return f"{name} is {dtype}; quantised weights are not supported here"


class WeightsChangedError(CheckpointError):
    """A weight file is another one than when it was loaded: the model must be loaded anew."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path}: has changed since it was loaded")
        self.path = path


class WeightsMismatchError(CheckpointError):
    """The tensors in the files are not exactly those of the network that the config describes."""

    def __init__(
        self,
        path: Path,
        *,
        missing: Sequence[str] = (),
        unused: Sequence[str] = (),
        wrong_shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
    ) -> None:
        self.path = path
        self.missing = tuple(missing)
        self.unused = tuple(unused)
        self.wrong_shapes = dict(wrong_shapes or {})
        super().__init__(f"{path}: " + "; ".join(self._problems()))

    def _problems(self) -> list[str]:
        problems = []
        if self.missing:
            problems.append(f"{len(self.missing)} missing tensors ({_some(self.missing)})")
        if self.unused:
            problems.append(f"{len(self.unused)} tensors no network uses ({_some(self.unused)})")
        if self.wrong_shapes:
            shapes = [
                f"{name} is {list(found)}, expected {list(expected)}"
                for name, (found, expected) in self.wrong_shapes.items()
            ]
            problems.append(f"{len(shapes)} tensors of another shape ({_some(shapes)})")
        return problems


class UnfitLoraError(CheckpointError):
    """A LoRA is of no use to this network, although nothing is wrong with the copy of its file."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(f"{path}: {problem}")
        self.path = path


class LoraMismatchError(UnfitLoraError):
    """A LoRA file does not fit the network, or is not understood to its last key."""

    def __init__(
        self,
        path: Path,
        *,
        matched: int,
        unused: Sequence[str] = (),
        incomplete: Sequence[str] = (),
        not_finite: Sequence[str] = (),
        wrong_shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] | None = None,
        hint: str = "",
    ) -> None:
        self.matched = matched
        self.unused = tuple(unused)
        self.incomplete = tuple(incomplete)
        self.not_finite = tuple(not_finite)
        self.wrong_shapes = dict(wrong_shapes or {})
        problems = "; ".join(self._problems())
        super().__init__(path, problems + (f". {hint}" if hint else ""))

    def _problems(self) -> list[str]:
        problems = [f"{self.matched} keys match the network"]
        if self.unused:
            problems.append(f"{len(self.unused)} keys do not ({_some(self.unused)})")
        if self.incomplete:
            found = _some(self.incomplete)
            problems.append(f"{len(self.incomplete)} layers lack one half of their pair ({found})")
        if self.not_finite:
            found = _some(self.not_finite)
            problems.append(f"{len(self.not_finite)} tensors hold NaN or infinity ({found})")
        if self.wrong_shapes:
            shapes = [
                f"{name} changes {list(found)}, the network has {list(expected)}"
                for name, (found, expected) in self.wrong_shapes.items()
            ]
            problems.append(f"{len(shapes)} of another shape ({_some(shapes)})")
        return problems


class QuantizedWeightsError(CheckpointError):
    """Quantized tensors and their scales do not make weights that are known here."""

    def __init__(self, path: Path, problem: str, *, names: Sequence[str] = ()) -> None:
        listed = f" ({_some(names)})" if names else ""
        super().__init__(f"{path}: {problem}{listed}")
        self.path = path
        self.names = tuple(names)
