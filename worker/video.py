"""Frames -> mp4, as they come; then the file is read back and compared with what was asked for."""

import contextlib
import re
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self

import psutil

from worker import errors, h264, words
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from torch import Tensor

END_SECONDS = 120.0  # of standstill, in the last frames or the move of the index to the front
LOOK_SECONDS = 5.0
LEAST_WORK_SECONDS = 1.0  # of a processor, in END_SECONDS; one that only waits takes 0.02
PROBE_SECONDS = 120.0
# Players take small videos for BT.601 unless told; convert and say the same. Said of the frames,
# since ffmpeg lets what they say, be it "unknown", go before its own options.
TO_BT709 = "scale=in_range=pc:out_range=tv:out_color_matrix=bt709"
SAY_BT709 = "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
DISK_COMPLAINTS = (  # as the C library words them, and ffmpeg repeats
    "No space left on device",
    "Disk quota exceeded",
    "Read-only file system",
    "Input/output error",
)


@dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What a video file holds, from decoding all of it."""

    width: int
    height: int
    num_frames: int
    fps: float
    codec: str
    pixel_format: str


class Mp4Writer:
    """ffmpeg, fed chunk by chunk: H.264 yuv420p, BT.709, index at the front."""

    def __init__(
        self,
        path: Path,
        *,
        width: int,
        height: int,
        fps: int,
        worker_settings: WorkerSettings,
        comment: str = "",
    ) -> None:
        self._path = path
        self._shape = (height, width, 3)
        self.encoder = h264.encoder(worker_settings, width=width, height=height)
        quality = h264.options(self.encoder, worker_settings)
        command = _encode_command(path, width, height, fps, [self.encoder, *quality], comment)
        try:
            self._process = subprocess.Popen(  # noqa: S603  # our own argument list, no shell
                command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
            )
        except OSError as error:
            raise h264.failure(f"ffmpeg does not start: {error}", self.encoder) from error
        assert self._process.stderr is not None
        self._words = words.LastWords(self._process.stderr)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()
        if self._process.stdin is not None and not self._process.stdin.closed:
            with contextlib.suppress(BrokenPipeError):  # it died with frames in the pipe
                self._process.stdin.close()
        self._words.end()

    def write(self, frames_THWC: "Tensor") -> None:
        """Append frames: uint8 RGB on the CPU."""
        assert frames_THWC.element_size() == 1
        assert tuple(frames_THWC.shape[1:]) == self._shape
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(frames_THWC.contiguous().numpy().data)
        except BrokenPipeError:
            self._wait()
            raise self._failure() from None

    def finish(self, *, on_progress: Callable[[], None] = lambda: None) -> None:
        """Wait for the end of the file; DiskUnusable, or what `h264.failure` says.

        Many frames may still be to encode: `on_progress` hears now and then that it goes on.
        """
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the exit status below tells why
            self._process.stdin.close()
        if self._wait(on_progress) != 0:
            raise self._failure()

    def _wait(self, on_progress: Callable[[], None] = lambda: None) -> int:
        """Its exit status. It may take as long as it likes, while it does something."""
        seconds, written_at, moved_at = 0.0, 0, time.monotonic()
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self._process.wait(LOOK_SECONDS)
            work = self._work()
            if work[0] >= seconds + LEAST_WORK_SECONDS or work[1] != written_at:
                (seconds, written_at), moved_at = work, time.monotonic()
                on_progress()
            elif time.monotonic() - moved_at > END_SECONDS:
                message = f"ffmpeg has done nothing for {END_SECONDS:.0f} s"
                raise h264.failure(message, self.encoder)

    def _work(self) -> tuple[float, int]:
        """What ffmpeg has used of processors, in seconds; when its file was last written, in ns."""
        used = psutil.Process(self._process.pid).cpu_times()
        written_at = self._path.stat().st_mtime_ns if self._path.exists() else 0
        return used.user + used.system, written_at

    def _failure(self) -> errors.RenderError:
        told = self._words.text()[-2000:]
        message = f"ffmpeg ended with {self._process.returncode}: {told or 'no words'}"
        is_too_large = self._process.returncode == -signal.SIGXFSZ  # for `ulimit -f`
        if is_too_large or is_of_disk(told):
            return errors.DiskUnusable(message)
        return h264.failure(message, self.encoder)


def is_of_disk(told: str) -> bool:
    """Whether ffmpeg's words are about the disk that it writes to."""
    return any(complaint in told for complaint in DISK_COMPLAINTS)


def check(path: Path, *, width: int, height: int, num_frames: int, fps: int) -> VideoInfo:
    """Decode the whole file; EncodingFailed unless it is what was asked for. Raises as `probe`."""
    info = probe(path)
    asked = VideoInfo(
        width=width,
        height=height,
        num_frames=num_frames,
        fps=float(fps),
        codec="h264",
        pixel_format="yuv420p",
    )
    if info != asked:
        raise errors.EncodingFailed(f"asked for {asked}, the file has {info}")
    return info


def probe(path: Path) -> VideoInfo:
    """What is in a video file; EncodingFailed if it cannot be decoded. EncoderBroken."""
    command = [
        h264.ffmpeg(),
        *("-hide_banner", "-nostdin", "-nostats", "-xerror", "-err_detect", "explode"),
        *("-i", str(path), "-map", "0:v:0", "-fps_mode", "passthrough", "-f", "framemd5", "-"),
    ]
    try:
        done = subprocess.run(  # noqa: S603  # our own argument list, no shell
            command,
            capture_output=True,
            timeout=PROBE_SECONDS,
            check=False,
            encoding="utf-8",
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise h264.failure(f"{path.name} cannot be checked: {error}") from error
    stream = re.search(r"Stream #0.*Video: (\w+).*?, (yuv\w+|rgb\w+|gbrp\w*)", done.stderr)
    fps = re.search(r"([\d.]+) fps", done.stderr)
    size = re.search(r"#dimensions 0: (\d+)x(\d+)", done.stdout)
    if done.returncode != 0 or not stream or not fps or not size:
        raise errors.EncodingFailed(f"{path.name} cannot be decoded: {done.stderr[-1000:].strip()}")
    frames = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    return VideoInfo(
        width=int(size[1]),
        height=int(size[2]),
        num_frames=len(frames),
        fps=float(fps[1]),
        codec=stream[1],
        pixel_format=stream[2],
    )


def _encode_command(
    path: Path, width: int, height: int, fps: int, encoder: list[str], comment: str
) -> list[str]:
    return [
        h264.ffmpeg(),
        *("-hide_banner", "-nostats", "-loglevel", "error", "-y"),
        *("-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}", "-r", str(fps)),
        *("-i", "pipe:0", "-an"),
        *("-vf", f"{TO_BT709},{SAY_BT709}", "-c:v", *encoder, "-pix_fmt", "yuv420p"),
        *("-metadata", f"comment={comment}"),
        *("-movflags", "+faststart", "-f", "mp4", str(path)),
    ]
