"""Checkpoints of a training: written whole or not at all, read back to the bit.

checkpoints/update_000120/      the newest ones, by finished updates; a name without dot is complete
    training.json               method, counters, and what else decides the numbers
    .metadata, __0_0.distcp     tensors, in shares of the processes (torch.distributed.checkpoint)
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException

from models.distillation import processes, trainer

FOLDER = "checkpoints"
FACTS_FILE = "training.json"
MAX_SHOWN = 60  # characters of a value that differs
NAME = re.compile(r"update_(\d{6,})")
# What a training may be continued with a different value of.
FREE = (
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
        if processes.is_true_anywhere(failure is not None, train.device):
            shutil.rmtree(part, ignore_errors=True)
            reason = "another process failed" if failure is None else _reason(failure)
            raise SavingError(final, f"{reason}{_free_space(output)}") from failure
    if processes.is_first():
        for path in complete(output)[:-keep]:
            shutil.rmtree(path, ignore_errors=True)
    return final


def complete(output: Path) -> list[Path]:
    """The checkpoints of a training, oldest first."""
    found = [path for path in (output / FOLDER).glob("update_*") if NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("update_")))


def load(train: trainer.Trainer, path: Path) -> None:
    """Continue from a checkpoint: the next update is the one that would have come anyway.

    Raises ResumeError where it is damaged or was trained otherwise.
    """
    facts = _read_facts(path)
    asked = train.origin | {"latent_shape": list(train.data.latent_shape)}
    told = facts["origin"] | facts
    saved = {key: told.get(key, value) for key, value in asked.items()}  # older ones do not say all
    _check(path, saved | facts["method"], asked | method_facts(train))
    try:
        with _alone_without_warning() as alone:
            state_dict_loader.load(_tensors(train), checkpoint_id=path, no_dist=alone)
    except (OSError, RuntimeError, ValueError, KeyError, CheckpointException) as error:
        raise ResumeError(path, f"it cannot be read: {_reason(error)}") from error
    train.updates = int(facts["updates"])
    train.underway = trainer.Underway(**facts["underway"])


def method_facts(train: trainer.Trainer) -> dict[str, Any]:
    """The method as JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(train.how)))
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
        for part in folder.glob(".update_*.part"):
            shutil.rmtree(part, ignore_errors=True)


def _write_tensors(train: trainer.Trainer, part: Path) -> None:
    with _alone_without_warning() as alone:
        state_dict_saver.save(_tensors(train), checkpoint_id=part, no_dist=alone)


def _publish(train: trainer.Trainer, part: Path, final: Path) -> None:
    """What the first process does when the tensors of all are there."""
    if not processes.is_first():
        return
    _write_facts(train, part)
    replaced = part.with_name(f".{final.name}.replaced.part")
    with contextlib.suppress(FileNotFoundError):
        final.rename(replaced)
    part.rename(final)
    _sync(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _write_facts(train: trainer.Trainer, part: Path) -> None:
    facts = {
        "updates": train.updates,
        "method": method_facts(train),
        "latent_shape": train.data.latent_shape,
        "origin": train.origin,
        "underway": dataclasses.asdict(train.underway),
    }
    with (part / FACTS_FILE).open("w", encoding="utf-8") as stream:
        json.dump(facts, stream, indent=2)
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
        raise ResumeError(path, f"{FACTS_FILE} cannot be read: {error!r}") from error
    return facts


def _check(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    before, now = _by_key(saved), _by_key(asked)
    changed = sorted(key for key in before.keys() | now.keys() if before.get(key) != now.get(key))
    refused = [key for key in changed if key not in FREE]
    if refused:
        told = "; ".join(
            f"{key} was {_shown(before.get(key))}, now {_shown(now.get(key))}" for key in refused
        )
        raise ResumeError(path, f"it was trained otherwise: {told}. Use another output folder")


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


def _free_space(output: Path) -> str:
    with contextlib.suppress(OSError):
        return f" ({shutil.disk_usage(output).free:,} bytes are free there)"
    return ""


def _reason(error: BaseException) -> str:
    if isinstance(error, CheckpointException):  # of one or several processes
        error = next(iter(error.failures.values()))[0]
    return (str(error) or repr(error)).strip().splitlines()[0][:300]
