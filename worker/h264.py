"""Which of ffmpeg's encoders makes H.264: the processor's x264, or the GPU's own where it has one.

x264 makes the same bytes on every host with processors of one family, such as x86, since
SAME_EVERYWHERE is given to it. NVENC spares a host's cores, for more bytes and others on each kind
of GPU; A100, H100 and H200 have none.
"""

import functools
import subprocess

import imageio_ffmpeg

from jobs import programs
from worker import errors
from worker.settings import WorkerSettings

X264, NVENC = "libx264", "h264_nvenc"
NVENC_LEAST = 160  # pixels, both ways: it takes none below 145x49
TRIAL_SECONDS = 60.0
SAME_EVERYWHERE = ("-threads", "8", "-x264-params", "cpu-independent=1")
"""For x264, which else takes as many threads as there are cores and cuts its search for each; and
whose fastest code for some processors rounds otherwise. 8 keep up with a device."""


def ffmpeg() -> str:
    """Its path; EncoderBroken when there is none."""
    try:
        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except RuntimeError as error:
        raise errors.EncoderBroken(f"no ffmpeg on this machine: {error}") from error


def failure(message: str, name: str = X264) -> errors.RenderError:
    """EncodingFailed where this encoder makes a test picture on this host, else EncoderBroken.

    A GPU's that no longer does is not taken again: `auto` goes on with x264.
    """
    if name == NVENC:
        why_no_nvenc.cache_clear()  # it worked when this was asked
        why = why_no_nvenc(ffmpeg())
    else:
        why = _why_not(ffmpeg(), name)
    if why is None:
        return errors.EncodingFailed(message)
    return errors.EncoderBroken(f"{message}; nor does {name} encode a test picture: {why}")


def encoder(worker_settings: WorkerSettings, *, width: int, height: int) -> str:
    """ffmpeg's name of the one that encodes videos of this size.

    EncoderBroken where NVENC was asked for and does not work.
    """
    wanted = worker_settings.encoder
    if wanted == "x264" or (wanted == "auto" and min(width, height) < NVENC_LEAST):
        return X264
    why = why_no_nvenc(ffmpeg())
    if why is not None and wanted == "nvenc":
        why_no_nvenc.cache_clear()  # the next video asks again: it may have been mended
        raise errors.EncoderBroken(
            f"RUSHES_ENCODER is nvenc, and it does not work here: {why}. auto would take x264"
        )
    return NVENC if why is None else X264


def options(name: str, worker_settings: WorkerSettings) -> list[str]:
    """Speed and quality of an encoder, as ffmpeg's arguments."""
    quality = str(worker_settings.x264_crf)
    if name == NVENC:  # its scale of quality is much like x264's
        return ["-preset", "p5", "-rc", "vbr", "-cq", quality, "-b:v", "0"]
    return ["-preset", worker_settings.x264_preset, "-crf", quality, *SAME_EVERYWHERE]


@functools.cache
def why_no_nvenc(program: str) -> str | None:
    """What ffmpeg says when it tries, once per process unless a video fails; None: it works."""
    return _why_not(program, NVENC)


def _why_not(program: str, name: str) -> str | None:
    command = [
        program,
        *("-hide_banner", "-nostdin", "-loglevel", "error"),
        *("-f", "lavfi", "-i", "color=size=256x256:rate=25:duration=0.2"),
        *("-c:v", name, "-pix_fmt", "yuv420p", "-f", "null", "-"),
    ]
    try:
        done = programs.run(command, seconds=TRIAL_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[0].rpartition("] ")[2] if lines else f"ffmpeg ended with {done.returncode}"
