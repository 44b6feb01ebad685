"""`rushes distill`."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from jobs import parts, settings, sizes
from jobs.cli import exits, options, output, torchrun

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_SECONDS = 60.0  # between lines where there is no terminal


@click.command("distill")
@click.argument("config", metavar="CONFIG", type=options.NamedPath(path_type=Path))
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check the file and say what memory and time the training would take; no weights needed.",
)
@click.option(
    "--processes",
    type=options.Whole(min=1),
    default=1,
    show_default=True,
    help="With --dry-run: how many GPUs share the work.",
)
@options.output
def distill(config: Path, dry_run: bool, processes: int, as_json: bool) -> int:
    """Train a 4-step student from a many-step model.

    CONFIG says what: see docs/distillation.md and examples/distill. Goes on from the last
    checkpoint in its output folder. The first Ctrl-C stops after a checkpoint, the second at once.
    On several GPUs: TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800 torchrun --nproc-per-node N --no-python
    rushes distill CONFIG.
    """
    known = settings.load()
    plan = parts.READ_TRAINING.load()(config)
    if dry_run:
        cost = parts.TRAINING_COST.load()(plan, known, processes=processes)
        _tell_cost(cost, as_json=as_json)
        return exits.OK
    if processes != 1:
        raise options.misused("--processes is for --dry-run; torchrun starts several processes")
    with _shown(as_json=as_json) as told:
        done = parts.TRAIN.load()(plan, known, parts.TRAINING_LISTENER.load()(**told))
    if not torchrun.is_beside_the_first():
        _tell_end(done, plan, as_json=as_json)
    return exits.OK if done.updates >= plan.student_updates else exits.INTERRUPTED


def _tell_end(done: Any, plan: Any, *, as_json: bool) -> None:
    if as_json:
        output.emit(
            {
                "updates": done.updates,
                "weights": None if done.weights is None else str(done.weights.resolve()),
                "preset": None if done.preset is None else str(done.preset.resolve()),
            }
        )
    elif done.weights is not None:
        output.line(f"{done.weights}: {sizes.words(done.weights.stat().st_size)}")
        output.line(f"render it with: rushes submit PROMPTS --preset {done.preset}")
    if done.updates < plan.student_updates:
        output.note(
            f"stopped after {done.updates} of {plan.student_updates} updates; "
            "the same command goes on from there"
        )


def _tell_cost(cost: Any, *, as_json: bool) -> None:
    if as_json:
        output.emit({**asdict(cost), "device_bytes": cost.device_bytes})
        return
    trained = ", ".join(f"{name} {count:,}" for name, count in cost.trained_parameters.items())
    memory = [(name, sizes.words(count)) for name, count in cost.static_bytes.items()]
    rates = [
        (f"at {rate} TFLOP/s", f"{output.duration(seconds)} per update, {cost.hours[rate]:,.1f} h")
        for rate, seconds in cost.seconds_per_update.items()
    ]
    output.facts(
        [
            ("parameters", f"{cost.parameters:,}"),
            ("trained", trained),
            ("tokens", f"{cost.tokens:,} per sample"),
            ("forward", f"{cost.flops_per_forward / 1e12:,.4g} TFLOP per sample"),
            ("update", f"{cost.forwards_per_update:g} forwards per sample"),
            ("processes", str(cost.processes)),
            *memory,
            ("activations", sizes.words(cost.activation_bytes)),
            ("memory", f"{sizes.words(cost.device_bytes)} per process"),
            *rates,
        ]
    )
    output.note("counted, not measured: workspace of kernels and of the device come on top")


Told = dict[str, Callable[..., None]]


@contextmanager
def _shown(*, as_json: bool) -> Iterator[Told]:
    """A bar on a terminal, else a line a minute on stderr."""
    if not as_json and sys.stderr.isatty() and not torchrun.is_beside_the_first():
        with _bar() as progress:
            yield _told_by_bar(progress)
    else:
        yield _told_by_lines()


def _bar() -> "Progress":
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} of {task.total:.0f}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )
    return Progress(*columns, console=output.console(stderr=True))


def _told_by_bar(progress: "Progress") -> Told:
    task: TaskID = progress.add_task("starting", total=1, facts="")

    def on_stage(stage: str) -> None:
        progress.update(task, description=stage, facts="")

    def on_part(done: int, count: int) -> None:
        progress.update(task, completed=done, total=count)

    def on_update(update: Any, count: int) -> None:
        progress.update(task, completed=update.number, total=count, facts=_facts(update))

    def on_note(text: str) -> None:
        progress.console.print(output.plain(text), markup=False, highlight=False)

    return {
        "on_stage": on_stage,
        "on_part": on_part,
        "on_update": on_update,
        "on_note": on_note,
    }


def _told_by_lines() -> Told:
    told_at = -LINE_SECONDS

    def is_time() -> bool:
        nonlocal told_at
        if time.monotonic() - told_at < LINE_SECONDS:
            return False
        told_at = time.monotonic()
        return True

    def on_part(done: int, count: int) -> None:
        if is_time():
            output.note(f"{done} of {count}")

    def on_update(update: Any, count: int) -> None:
        if is_time() or update.number == count:
            output.note(f"update {update.number} of {count}: {_facts(update)}")

    return {
        "on_stage": output.note,
        "on_part": on_part,
        "on_update": on_update,
        "on_note": output.note,
    }


def _facts(update: Any) -> str:
    """What moves on while it trains; neither loss says how good the student is."""
    facts = asdict(update)
    names = ("score_gap", "latent_std", "critic_loss")
    said = ", ".join(f"{name.replace('_', ' ')} {facts[name]:.4g}" for name in names)
    return f"{said}, {output.duration(facts['seconds'])} per update"
