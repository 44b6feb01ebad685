"""A training from where it stands to its end: updates, checkpoints, probes, metrics."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from models.distillation import course, metrics, probe, processes, saving, trainer


@dataclass(frozen=True, kw_only=True)
class Watcher:
    """Who is told what, in the first process only."""

    on_update: Callable[[trainer.Update], None]
    on_saved: Callable[[Path], None]
    on_trouble: Callable[[str], None]
    """Something failed that the training can do without for now."""
    on_probe: Callable[[int, int, Tensor], None]
    """(update, number of the prompt, latents)"""
    asks_to_stop: Callable[[], bool] = trainer.never
    """Asked before each batch and after each update, in every process."""


def run(train: trainer.Trainer, plan: course.Course, watcher: Watcher) -> bool:
    """Train until `plan.student_updates`; False if it was stopped before, with a checkpoint.

    A checkpoint or a probe that cannot be written is reported, and the training goes on; only the
    last checkpoint has to succeed. Called by every process.
    """
    lines = _metrics(train, plan, watcher)

    def asks_to_stop() -> bool:
        return processes.is_true_anywhere(watcher.asks_to_stop(), train.device)

    saved = train.updates, train.underway.actions  # loaded so, or nothing is done yet
    while not is_done(train, plan):
        try:
            update = train.step(asks_to_stop)
        except trainer.Stopped:
            if saved != (train.updates, train.underway.actions):
                _save(train, plan, watcher, must_succeed=True)
            return False
        is_last = train.updates >= plan.student_updates
        if processes.is_first():
            _tell(update, lines, watcher)
        stops = asks_to_stop()
        is_due = is_last or stops or train.updates % plan.save_every == 0
        if is_due and _save(train, plan, watcher, must_succeed=is_last or stops):
            saved = train.updates, 0
        if plan.probe_every and (is_last or train.updates % plan.probe_every == 0):
            _probe(train, plan, watcher)
        if stops and not is_last:
            return False
    return True


def is_done(train: trainer.Trainer, plan: course.Course) -> bool:
    """An update that was begun is ended: half of one is no student."""
    return train.updates >= plan.student_updates and not train.underway.actions


def _metrics(
    train: trainer.Trainer, plan: course.Course, watcher: Watcher
) -> metrics.Metrics | None:
    if not processes.is_first():
        return None
    try:
        plan.output.mkdir(parents=True, exist_ok=True)
        return metrics.Metrics(plan.output, updates=train.updates)
    except OSError as error:
        watcher.on_trouble(f"no metrics are written: {error}")
        return None


def _tell(update: trainer.Update, lines: metrics.Metrics | None, watcher: Watcher) -> None:
    watcher.on_update(update)
    try:
        if lines is not None:
            lines.add(update)
    except OSError as error:
        watcher.on_trouble(f"the metrics of update {update.number} are lost: {error}")


def _save(
    train: trainer.Trainer, plan: course.Course, watcher: Watcher, *, must_succeed: bool
) -> bool:
    """Whether there is a checkpoint now."""
    try:
        path = saving.save(train, plan.output, keep=plan.keep)
    except saving.SavingError as error:
        if must_succeed:
            raise
        if processes.is_first():
            watcher.on_trouble(f"{error}; the training goes on")
        return False
    if processes.is_first():
        watcher.on_saved(path)
    return True


def _probe(train: trainer.Trainer, plan: course.Course, watcher: Watcher) -> None:
    for place in range(min(plan.probes, len(train.data))):
        latents = probe.latents(train, place)
        if processes.is_first():
            watcher.on_probe(train.updates, place, latents)
