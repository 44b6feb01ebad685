"""The file and the preset that `rushes submit`, `estimate` and `render` are given."""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, get_args

import click

from jobs import errors, inputs, presets, readers, settings, stores
from jobs.cli import options, output

STDIN = "-"

format_option = click.option(
    "--format",
    "format_name",
    type=click.Choice(get_args(readers.Format)),
    help="Default: by the file's name, else by how it begins.",
)


def preset(name: str | None, config: settings.Settings) -> presets.Preset:
    if name is None:
        known = presets.available(config.presets_dir)
        names = ", ".join(each.name for each in known if isinstance(each, presets.Preset))
        message = f"--preset is missing: give one of {names}, or the path of a preset file"
        raise options.misused(message)
    return presets.load(name, folder=config.presets_dir)


def images(
    config: settings.Settings, file: str, preset: presets.Preset, *, check_only: bool
) -> inputs.InputImages | None:
    """Paths in the file start at its folder. None: the preset needs none."""
    if not preset.look.needs_image:
        return None
    return inputs.InputImages(
        config=config,
        base=(Path.cwd() if file == STDIN else Path(file).resolve().parent),
        store=None if check_only else stores.open_store(config),
    )


@contextmanager
def opened(file: str) -> Iterator[tuple[BinaryIO, str]]:
    """A seekable stream and what it is called; a pipe is kept in a temporary file."""
    if file == STDIN:
        if sys.stdin.isatty():
            output.note("reading prompts from the terminal, one per line; end with Ctrl-D")
        with _kept(sys.stdin.buffer) as stream:
            yield stream, "stdin"
        return
    try:
        opened = Path(file).open("rb")  # noqa: SIM115  # closed by the with below
    except (OSError, ValueError) as error:
        raise unreadable(file, error) from None
    with opened:
        mode = os.fstat(opened.fileno()).st_mode
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not opened.isatty()):
            raise errors.invalid(file, "is a device: give a file")
        if opened.seekable():
            yield opened, file
            return
        with _kept(opened) as stream:
            yield stream, file


@contextmanager
def _kept(source: BinaryIO) -> Iterator[BinaryIO]:
    with tempfile.TemporaryFile(prefix="rushes-") as stream:
        shutil.copyfileobj(source, stream)
        stream.seek(0)
        yield stream


def unreadable(file: str, error: OSError | ValueError) -> errors.InvalidInput:
    if isinstance(error, IsADirectoryError):
        reason = "is a folder: give a file"
    elif isinstance(error, FileNotFoundError):
        reason = "there is no such file"
    else:
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
    return errors.invalid(file, reason)


def detected(stream: BinaryIO, source: str) -> readers.Format:
    stream.seek(0)
    return readers.detect_format(source, stream.read(readers.HEAD_BYTES))
