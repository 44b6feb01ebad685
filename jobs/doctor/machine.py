"""What a worker needs of this machine, but for its devices."""

import os
import shutil
import subprocess
from collections.abc import Iterator

from jobs import errors, programs, semaphores, settings, workers
from jobs.doctor import checks

MIN_SCRATCH_BYTES = 2_000_000_000  # a few hundred videos that wait for upload


def check_ffmpeg(_config: settings.Settings) -> Iterator[checks.Check]:
    advice = "pip install --force-reinstall imageio-ffmpeg, or set IMAGEIO_FFMPEG_EXE"
    try:
        import imageio_ffmpeg

        program = imageio_ffmpeg.get_ffmpeg_exe()
        version = _said([program, "-version"]).splitlines()[0]
        encoders = _said([program, "-hide_banner", "-encoders"])
    except (ImportError, RuntimeError, OSError, subprocess.SubprocessError, IndexError) as error:
        yield checks.fail("ffmpeg", errors.first_line(error), advice)
        return
    short = " ".join(version.split()[:3])
    if "libx264" not in encoders:
        yield checks.fail("ffmpeg", f"{program} has no libx264", advice)
    else:
        yield checks.ok("ffmpeg", f"{short} with libx264: {program}")


def _said(command: list[str]) -> str:
    done = programs.run(command, seconds=checks.PROGRAM_SECONDS)
    done.check_returncode()
    return done.stdout


def check_scratch(config: settings.Settings) -> Iterator[checks.Check]:
    folder = config.scratch_dir
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    advice = "set RUSHES_SCRATCH_DIR to a folder on a disk with room"
    if not nearest.is_dir() or not os.access(nearest, os.W_OK | os.X_OK):
        yield checks.fail("scratch", f"{nearest} cannot be written", advice)
        return
    free = shutil.disk_usage(nearest).free
    seen = f"{folder}: {free / 1e9:.1f} GB free"
    if free < workers.MIN_FREE_BYTES:
        yield checks.fail("scratch", f"{seen}: its workers take no jobs", advice)
    elif free < MIN_SCRATCH_BYTES:
        yield checks.warn("scratch", seen, advice)
    else:
        yield checks.ok("scratch", seen)


def check_shared_memory(_config: settings.Settings) -> Iterator[checks.Check]:
    if refusal := semaphores.refusal():
        yield checks.fail("shared memory", f"{refusal}: no worker can start", semaphores.ADVICE)
    else:
        yield checks.ok("shared memory", "has room for semaphores")
