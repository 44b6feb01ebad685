"""Checkpoints of a training: written whole or not at all, read back to the bit.

checkpoints/update_000120/      the newest ones, by finished updates; a name without dot is complete
    training.json               method, counters, and what else decides the numbers
    .metadata, __0_0.distcp     tensors, in shares of the processes (torch.distributed.checkpoint)
    __0.sha256                  of the files of each process, as `sha256sum -c` takes them
.update_000120.replaced/        one that is written anew; has its name back where we were killed
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from models.distillation import method, processes, trainer

FOLDER = "checkpoints"
FACTS_FILE = "training.json"
MAX_SHOWN = 60  # characters of a value that differs
NAME = re.compile(r"update_(\d{6,})")
REPLACED = ".replaced"
# What a training may be continued with a different value of.
FREE = (
    "prompts",
    "batch",
    "accumulate",
    "gradient_checkpointing",
    *(f"{who}.{key}" for who in ("student", "critic") for key in ("learning_rate", "clip")),
)


class SavingError(Exception):
    """A checkpoint could not be written; the ones before it are untouched."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path} could not be written: {reason}")
        self.path = path


class ResumeError(Exception):
    """A checkpoint cannot be continued with this method, or with these weights."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path


def save(train: trainer.Trainer, output: Path, *, keep: int = 2) -> Path:
    """Write a checkpoint and remove all but the newest `keep`. Called by every process.

    Raises SavingError, as for a full disk: in every process if one of them could not write.
    """
    final = output / FOLDER / f"update_{train.updates:06}"
    part = final.with_name(f".{final.name}.part")
    steps: tuple[Callable[[], None], ...] = (
        lambda: _clear(final.parent),
        lambda: part.mkdir(parents=True, exist_ok=True),
        lambda: _write_tensors(train, part),
        lambda: _publish(train, part, final),
    )
    for step in steps:
        failure = _failure_of(step)
        reason = "another process failed"
        if failure is not None:  # the space before what was written is removed
            reason = f"{_reason(failure)}{_space(train, output)}"
        if processes.is_true_anywhere(failure is not None, train.device):
            shutil.rmtree(part, ignore_errors=True)
            raise SavingError(final, reason) from failure
    if processes.is_first():
        for path in complete(output)[:-keep]:
            shutil.rmtree(path, ignore_errors=True)
    return final


def complete(output: Path) -> list[Path]:
    """The checkpoints of a training, oldest first."""
    _give_back(output / FOLDER)
    found = [path for path in (output / FOLDER).glob("update_*") if NAME.fullmatch(path.name)]
    return sorted(found, key=_updates)


def check(
    path: Path,
    how: method.Method,
    *,
    origin: Mapping[str, str | int | None],
    latent_shape: Sequence[int],
) -> list[str]:
    """The keys that differ from a checkpoint's and may; its tensors are not looked at.

    Raises ResumeError where it was trained otherwise, or does not say how.
    """
    asked = {**origin, "latent_shape": list(latent_shape)}
    return _check(path, _read_facts(path), how, asked)


def load(train: trainer.Trainer, path: Path) -> None:
    """Continue from a checkpoint: the next update is the one that would have come anyway.

    Raises ResumeError where it is damaged or was trained otherwise. Called by every process.
    """
    facts = _read_facts(path)
    _check(path, facts, train.how, {**train.origin, "latent_shape": [*train.data.latent_shape]})
    _check_sums(path, train.device)
    try:
        with _alone_without_warning() as alone:
            state_dict_loader.load(_tensors(train), checkpoint_id=path, no_dist=alone)
    except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
        raise _damaged(path, f"it cannot be read: {_reason(error)}") from error
    train.updates = int(facts["updates"])
    train.underway = trainer.Underway(**facts["underway"])


def method_facts(how: method.Method) -> dict[str, Any]:
    """The method as JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(how)))
    return found


def _failure_of(step: Callable[[], None]) -> BaseException | None:
    try:
        step()
    except (OSError, RuntimeError, CheckpointException) as error:
        return error
    return None


def _clear(folder: Path) -> None:
    """Remove what processes that were killed left: a checkpoint may have hundreds of gigabytes."""
    if processes.is_first():
        _give_back(folder)
        for part in (*folder.glob(".update_*.part"), *folder.glob(f".update_*{REPLACED}")):
            shutil.rmtree(part, ignore_errors=True)


def _give_back(folder: Path) -> None:
    """Their name to checkpoints in whose place none came: any process may do it."""
    for replaced in folder.glob(f".update_*{REPLACED}"):
        final = folder / replaced.name.removeprefix(".").removesuffix(REPLACED)
        if not final.exists():
            with contextlib.suppress(FileNotFoundError):  # another process has
                replaced.rename(final)


def _write_tensors(train: trainer.Trainer, part: Path) -> None:
    with _alone_without_warning() as alone:
        state_dict_saver.save(_tensors(train), checkpoint_id=part, no_dist=alone)
    own = sorted(part.glob(f"__{processes.rank()}_*"))
    if processes.is_first():
        own.append(part / ".metadata")
    sums = "".join(f"{_sha256(path)}  {path.name}\n" for path in own)
    _write_text(part / f"__{processes.rank()}.sha256", sums)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _publish(train: trainer.Trainer, part: Path, final: Path) -> None:
    """What the first process does when the tensors of all are there."""
    if not processes.is_first():
        return
    _write_facts(train, part)
    replaced = part.with_name(f".{final.name}{REPLACED}")
    with contextlib.suppress(FileNotFoundError):
        final.rename(replaced)
    try:
        part.rename(final)
    except OSError:
        _give_back(final.parent)
        raise
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_facts(train: trainer.Trainer, part: Path) -> None:
    facts = {
        "updates": train.updates,
        "method": method_facts(train.how),
        "latent_shape": train.data.latent_shape,
        "origin": train.origin,
        "underway": dataclasses.asdict(train.underway),
    }
    _write_text(part / FACTS_FILE, json.dumps(facts, indent=2))


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _alone_without_warning() -> Iterator[bool]:
    """Whether this is the only process, which torch need not warn of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield processes.count() == 1


def _tensors(train: trainer.Trainer) -> dict[str, Tensor]:
    found = {f"student.{name}": tensor for name, tensor in train.student.tensors()}
    found |= {f"critic.{name}": tensor for name, tensor in train.critic.tensors()}
    if train.average is not None:
        found |= {f"average.{name}": tensor for name, tensor in train.average.tensors.items()}
    return found


def _read_facts(path: Path) -> dict[str, Any]:
    try:
        facts: dict[str, Any] = json.loads((path / FACTS_FILE).read_text(encoding="utf-8"))
        kinds = {"method": dict, "updates": int, "origin": dict, "underway": dict}
        facts = {"origin": {}, "underway": {}} | facts  # older ones have none
        if wrong := [key for key, kind in kinds.items() if not isinstance(facts[key], kind)]:
            raise TypeError(f"{wrong[0]} is of another kind")
        trainer.Underway(**facts["underway"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(path, f"{FACTS_FILE} cannot be read: {error!r}") from error
    return facts


def _check_sums(path: Path, device: torch.device) -> None:
    """Each process reads its share of the files; older checkpoints have no sums."""
    reason = None
    try:
        files = sorted(path.glob("__*.sha256"))
        lines = [line for file in files for line in file.read_text("ascii").splitlines()]
        for line in lines[processes.rank() :: processes.count()]:
            told, _, name = line.partition("  ")
            if _sha256(path / name) != told:
                reason = f"it cannot be read: {name} is not what was written"
    except (OSError, ValueError) as error:
        reason = f"it cannot be read: {_reason(error)}"
    if processes.is_true_anywhere(reason is not None, device):
        raise _damaged(path, reason or "it cannot be read by another process")


def _damaged(path: Path, reason: str) -> ResumeError:
    older = [each for each in complete(path.parent.parent) if _updates(each) < _updates(path)]
    then = f"go on from {older[-1].name}" if older else "begin anew"
    return ResumeError(path, f"{reason}. If it is damaged, remove that folder to {then}")


def _updates(path: Path) -> int:
    return int(path.name.removeprefix("update_"))


def _check(
    path: Path, facts: dict[str, Any], how: method.Method, asked: dict[str, Any]
) -> list[str]:
    """The keys that differ from a checkpoint's facts and may."""
    told = facts["origin"] | facts
    saved = {key: told.get(key, value) for key, value in asked.items()}  # older ones do not say all
    before, now = _by_key(saved | facts["method"]), _by_key(asked | method_facts(how))
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    refused = [key for key in changed if key not in FREE]
    if refused:
        told = "; ".join(
            f"{key} was {_shown(before.get(key))}, now {_shown(now.get(key))}" for key in refused
        )
        raise ResumeError(path, f"it was trained otherwise: {told}. Use another output folder")
    return changed


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def _by_key(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Those of student and critic as `student.rank`."""
    found: dict[str, Any] = {}
    for key, value in facts.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": each for name, each in value.items()}
        else:
            found[key] = value
    return found


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _space(train: trainer.Trainer, output: Path) -> str:
    size = sum(tensor.numel() * tensor.element_size() for tensor in _tensors(train).values())
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(output).free
        return f" (a checkpoint takes {size:,} bytes, {free:,} are free there)"
    return ""


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # of one or several processes
        error = next(iter(error.failures.values()))[0]
    return (str(error) or repr(error)).strip().splitlines()[0][:300]
