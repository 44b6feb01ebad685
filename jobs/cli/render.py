"""`rushes render`."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from jobs import (
    errors,
    logs,
    parts,
    presets,
    queues,
    readers,
    settings,
    standalone,
    submission,
    unqueued,
)
from jobs.cli import exits, options, output, prompt_files, torchrun

NOTHING = unqueued.Orders(claims={}, notes=(), sources={})


@click.command()
@click.argument("file", metavar="FILE|-")
@click.option("--preset", metavar="NAME|FILE", help="The look: `rushes presets` lists them.")
@click.option(
    "--to",
    "target",
    required=True,
    type=options.NamedPath(path_type=Path, file_okay=False),
    help="Folder for the videos; made if it is not there.",
)
@prompt_files.format_option
@options.output
def render(
    file: str,
    preset: str | None,
    target: Path,
    format_name: readers.Format | None,
    as_json: bool,
) -> int:
    """Render the prompts of a file here and now, without queue, database and store.

    Several GPUs render each video together, sooner than one would:
    torchrun --standalone --nproc-per-node N --no-python rushes render ...
    """
    config = settings.load()
    logs.configure(config, level="WARNING")
    if torchrun.is_beside_the_first():  # which tells this one what to do
        _run(NOTHING, target, config, on_begin=_not_told, on_video=_not_told)
        return exits.OK
    chosen = prompt_files.preset(preset, config)
    orders = _read(file, chosen, config, format_name)
    orders.refuse_others(target)
    for text in orders.notes:
        output.note(f"note: {text}")
    if not all((target / f"{name}.mp4").exists() for name in orders.claims):
        if chosen.look.model_path in standalone.TINY_MODELS:
            standalone.place_tiny_models(config, output.note, [chosen.look.model_path])
        _require_model(chosen, config)
    _make_folder(target)
    videos: list[dict[str, object]] = []
    begun: set[str] = set()

    def on_begin(name: str) -> None:
        output.note(f"rendering {name}")
        begun.add(name)

    def on_video(name: str, video: Path) -> None:
        if name not in begun:
            output.note(f"{video} is there already: passed over")
        videos.append(
            {
                "file": str(video),
                "custom_id": orders.claims[name].custom_id,
                "status": "rendered" if name in begun else "there",
            }
        )
        if not as_json:
            output.line(str(video))

    with _sigterm_as_ctrl_c():
        _run(orders, target, config, on_begin=on_begin, on_video=on_video)
    for path in orders.mixed_files(target):
        output.note(f"note: {path} was replaced: not all of these videos were made with the same")
    if as_json:
        output.emit({"videos": videos})
    return exits.OK


def _run(
    orders: unqueued.Orders,
    target: Path,
    config: settings.Settings,
    *,
    on_begin: Callable[[str], None],
    on_video: Callable[[str, Path], None],
) -> None:
    parts.RENDER_ALONE.load()(
        orders.claims,
        target,
        config,
        read_image=orders.read_image,
        on_begin=on_begin,
        on_video=on_video,
    )


def _not_told(*_: object) -> None:
    """The first one hears of it."""


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """What is unfinished is removed also when torchrun ends this process for another's failure."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _read(
    file: str,
    preset: presets.Preset,
    config: settings.Settings,
    format_name: readers.Format | None,
) -> unqueued.Orders:
    with prompt_files.opened(file) as (stream, source):
        return unqueued.read(
            submission.PromptFile(
                stream=stream,
                source=source,
                format=format_name or prompt_files.detected(stream, source),
                options=submission.Options(preset=preset),
                check=submission.prompt_check(config),
                images=prompt_files.images(config, file, preset, check_only=True),
            )
        )


def _require_model(preset: presets.Preset, config: settings.Settings) -> None:
    """Told before anything is made."""
    if queues.is_simulated(preset.look.model_path):
        raise errors.RushesError(
            f"preset {preset.name} renders nothing: it is for devices that only sleep, those of "
            "`rushes up --devices sim:N`, and for `rushes submit`"
        )
    try:
        parts.FIND_WEIGHTS.load()(preset.look, config.models_dir)
    except ValueError as error:
        advice = "put the model there; docs/weights.md says which file where"
        raise errors.RushesError(f"{error}: {advice}") from None


def _make_folder(target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.FileUnusable(f"{target}: cannot be made: {error.strerror}") from None
