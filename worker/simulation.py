"""A device that sleeps instead of computing, to rehearse a farm: `--devices sim:8`.

All but the networks is real: processes, messages, leases, disk, uploads. It renders only looks
whose `model_path` begins with `simulated`, so that it can never answer for a real model, and each
sidecar says `"simulated": true`. Loads no torch.
"""

import functools
import hashlib
import json
import os
import signal
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import lifecycle, looks, queues, reports
from worker import (
    errors,
    h264,
    heartbeat,
    host_memory,
    provenance,
    scratch,
    sidecar,
    stopwatch,
    video,
)
from worker.settings import WorkerSettings

FAULT = "simulate"
"""Name in a job's metadata: what goes wrong with it."""
LOAD_STEPS = 5.0  # as long as so many denoising steps, as with a 14B model on a warm disk
TEXT_STEPS = 0.2
DECODE_STEPS = 1.0
CARD_SECONDS = 60.0
HANG_SECONDS = 24 * 3600.0


@dataclass
class SimulatedRenderer:
    """Takes as long as a device would whose denoising step takes `sim_step_seconds`."""

    worker_settings: WorkerSettings
    _loaded: str | None = None
    _loads: int = 0

    def render(
        self,
        claim: lifecycle.Claim,
        folder: scratch.AttemptFolder,
        heart: heartbeat.Progress,
        *,
        ran_out: str | None = None,
    ) -> Callable[[], None]:
        """What is left leaves a test card in the folder: of the look's size, the seed's own."""
        look = claim.spec.look
        if not queues.is_simulated(look.model_path):
            raise errors.WeightsAbsent(
                f"this worker only simulates; {look.model_path} needs a real device"
            )
        timings = stopwatch.Timings()
        folder.make()
        heart.reached("load", 0, 1)
        if self._loaded != look.weights:
            self._take(timings, "load", LOAD_STEPS)
            self._loaded = look.weights
            self._loads += 1
        heart.reached("text", 0, 1)
        self._take(timings, "text", TEXT_STEPS)
        steps = len(look.denoising_step_list)
        for step in range(steps):
            heart.reached("denoise", step, steps)
            self._take(timings, "denoise", 1.0)
            if step == 0:
                _go_wrong((claim.meta or {}).get(FAULT), ran_out)
                _go_wrong(_fault_of_device(self.worker_settings), ran_out)
        heart.reached("decode", 0, 1)
        self._take(timings, "decode", DECODE_STEPS)
        return functools.partial(self._finish, claim, folder, heart, timings, ran_out)

    def _finish(
        self,
        claim: lifecycle.Claim,
        folder: scratch.AttemptFolder,
        heart: heartbeat.Progress,
        timings: stopwatch.Timings,
        ran_out: str | None,
    ) -> None:
        heart.reached("mux", 0, 1)
        with timings.stage("mux"):
            info, card = self._card(claim.spec.look, folder.root)
        origin = provenance.Origin.of(claim, source_type=provenance.ALGORITHMIC)
        with scratch.disk_errors():
            folder.video.write_bytes(card + _mark(claim.spec))
            provenance.mark(folder.video, origin)
        rendering = sidecar.Rendering(
            video=info,
            timings=timings,
            worker=self.worker_settings.worker_name,
            memory="simulated",
            ran_out=ran_out,
            peak_memory_bytes=None,
            device={"device": "simulated", "simulated": True},
        )
        folder.finish(sidecar.of(claim, folder, rendering))

    def step_down(self, _look: looks.Look) -> str | None:
        return "simulated, smaller"

    def num_waiting(self) -> int:
        return 0

    def hurry(self) -> None:
        """Waits for nothing."""

    def report(self, *, renders: int) -> reports.Report:
        return reports.Report(
            renders=renders,
            loads=self._loads,
            lora_switches=0,
            resident=(),
            device_used_bytes=None,
            host_used_bytes=host_memory.process_bytes(),
        )

    def _card(self, look: looks.Look, root: Path) -> tuple[video.VideoInfo, bytes]:
        size = (look.width, look.height, look.num_frames, look.fps)
        if self.worker_settings.sim_encodes:
            return _encode_card(root, *size, h264.options(h264.X264, self.worker_settings))
        return _card(root, *size)

    def _take(self, timings: stopwatch.Timings, stage: str, steps: float) -> None:
        with timings.stage(stage):
            time.sleep(steps * self.worker_settings.sim_step_seconds)


def prove(worker_settings: WorkerSettings) -> dict[str, Any]:
    """The self-test of a simulated device: a broken one does what it does to a job."""
    _go_wrong(_fault_of_device(worker_settings), None)
    return {"device": "simulated"}


def _fault_of_device(worker_settings: WorkerSettings) -> str | None:
    """Read each time: a device may break and be mended while its process runs."""
    path = worker_settings.sim_bad_devices
    try:
        lines = [] if path is None else path.read_text().splitlines()
    except FileNotFoundError:
        return None
    words = [line.split() for line in lines]
    return next((w[1] for w in words if len(w) == 2 and w[0] == worker_settings.worker_name), None)


def _go_wrong(fault: str | None, ran_out: str | None) -> None:
    """What the job's metadata or the device's state asks for, in the middle of a render."""
    if fault == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "hang":
        time.sleep(HANG_SECONDS)
    elif fault == "device":
        raise errors.DeviceFault("simulated: the device fell off the bus")
    elif fault == "out_of_memory" or (fault == "tight_memory" and ran_out is None):
        raise errors.DeviceOutOfMemory("simulated: too little memory")
    elif fault == "internal":
        raise AssertionError("simulated: a defect")


@functools.lru_cache(maxsize=8)
def _card(
    root: Path, width: int, height: int, num_frames: int, fps: int
) -> tuple[video.VideoInfo, bytes]:
    """A test card as mp4, encoded once per size."""
    options = ("-preset", "ultrafast", *h264.SAME_EVERYWHERE)
    return _encode_card(root, width, height, num_frames, fps, options)


def _encode_card(
    root: Path, width: int, height: int, num_frames: int, fps: int, options: Sequence[str]
) -> tuple[video.VideoInfo, bytes]:
    source = f"testsrc=size={width}x{height}:rate={fps}"
    with (
        scratch.disk_errors(),
        tempfile.TemporaryDirectory(prefix="rushes-card-", dir=root) as folder,
    ):
        path = Path(folder) / "card.mp4"
        command = [
            h264.ffmpeg(),
            *("-hide_banner", "-loglevel", "error", "-f", "lavfi", "-i", source),
            *("-frames:v", str(num_frames), "-c:v", "libx264", *options),
            *("-pix_fmt", "yuv420p", "-movflags", "+faststart", str(path)),
        ]
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=CARD_SECONDS)  # noqa: S603  # our own argument list, no shell
            info = video.check(path, width=width, height=height, num_frames=num_frames, fps=fps)
            return info, path.read_bytes()
        except subprocess.CalledProcessError as error:
            words = error.stderr.decode(errors="replace")[-500:]
            message = f"ffmpeg ended with {error.returncode}: {words}"
            if video.is_of_disk(words):
                raise errors.DiskUnusable(message) from error
            raise errors.EncodingFailed(message) from error
        except (OSError, subprocess.TimeoutExpired) as error:
            raise errors.EncodingFailed(f"no test card: {error}") from error


def _mark(spec: looks.RenderSpec) -> bytes:
    """An mp4 box that players skip: says what this file is, and makes it the seed's own."""
    told = {
        "simulated": True,
        "seed": spec.seed,
        "prompt_sha256": hashlib.sha256(spec.prompt.encode()).hexdigest(),
    }
    payload = json.dumps(told).encode()
    return struct.pack(">I4s", 8 + len(payload), b"free") + payload
