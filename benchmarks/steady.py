"""One device in steady state: python -m benchmarks.steady

A batch through the real worker (Celery's parent and child, dispatcher, publisher, Redis, database,
store), and from the sidecars of its videos: how long the stages took that use the device, and how
long it stood idle between the last work for one job and the first for the next. The device sleeps
(`--device sim`, like one that needs `--job-seconds` for a job), or is real: `cpu` with the tiny
model, `cuda` with the sizes of Wan2.1 and random weights. Each `--size` is a batch of its own, one
after the other. Stages are times of the host: text is split into tokens in them, kernels are
launched and frames copied. How long a GPU ran kernels beside that is told by its driver.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import farm, gpu_busy
from models import config
from worker import gpus

STEPS = (1000, 750, 500, 250)
SIM_STEPS = 0.2 + len(STEPS) + 1.0  # text, denoising and decoding of a simulated job, in steps
GOAL = 0.02  # of a job
SAMPLES = "kernels.csv"
MODELS = {"1.3b": config.WAN_T2V_1_3B, "14b": config.WAN_T2V_14B}


def main() -> None:
    arguments = parse()
    print(farm.machine())
    # Not below the repository: a checkout's settings would be found there.
    with tempfile.TemporaryDirectory(prefix="rushes-steady-", dir=arguments.folder) as folder:
        measure(arguments, Path(folder))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["sim", "cpu", "cuda"], default="sim")
    parser.add_argument(
        "--jobs", type=int, nargs="+", default=[20], help="of each size, beside those to warm up"
    )
    parser.add_argument("--warm-up", type=int, default=2, help="jobs that are not counted")
    parser.add_argument("--job-seconds", type=float, default=12.0, help="of a sleeping device")
    parser.add_argument("--cards", action="store_true", help="sim: encode no video for each job")
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--size", nargs="+", help="WIDTHxHEIGHTxFRAMES; else the model's own")
    parser.add_argument("--model", choices=MODELS, default="1.3b", help="cuda: whose sizes")
    parser.add_argument("--text-layers", type=int, default=24, help="cuda: of UMT5-XXL's 24")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--seconds", type=float, default=3_600.0, help="give up after these")
    parser.add_argument("--json", type=Path, help="append the numbers of each as a line of JSON")
    arguments = parser.parse_args()
    if len(arguments.jobs) not in (1, len(arguments.size or [1])):
        parser.error("--jobs is one number, or one for each --size")
    return arguments


def measure(arguments: argparse.Namespace, home: Path) -> None:
    began = time.monotonic()
    devices, environment, presets = prepare(arguments, home)
    print(f"model written after {time.monotonic() - began:.0f} s", flush=True)
    with farm.running(
        home,
        devices=devices,
        database_kind=arguments.database,
        environment=environment,
    ) as running:
        running.wait_for_workers(1, seconds=120)
        print(f"worker there after {time.monotonic() - began:.0f} s", flush=True)
        numbers = arguments.jobs * (len(presets) if len(arguments.jobs) == 1 else 1)
        for preset, jobs in zip(presets, numbers, strict=True):
            with (
                gpu_busy.sampled(devices, home / SAMPLES)
                if arguments.device == "cuda"
                else contextlib.nullcontext()
            ):
                worked = render(running, arguments, preset, jobs)
            kernels = None
            if arguments.device == "cuda":
                since, until = worked[0].began, worked[-1].began
                kernels = gpu_busy.share(home / SAMPLES, since=since, until=until)
            report(arguments, preset.stem, worked, kernels=kernels)


def render(
    running: farm.Farm, arguments: argparse.Namespace, preset: Path, jobs: int
) -> list[farm.Worked]:
    """A batch; those that warm up are left out of what is told."""
    began, load = time.monotonic(), farm.Load()
    batch_id = running.submit(arguments.warm_up + jobs, preset)
    running.wait(batch_id, seconds=arguments.seconds)
    took, told = time.monotonic() - began, load.told()
    worked = running.worked(batch_id)
    print(
        f"{arguments.device}, {preset.read_text().strip()}\n"
        f"{arguments.database}, store: {running.store_kind}; {len(worked)} jobs in "
        f"{took:.1f} s, {running.attempts(batch_id)} attempts; {told}\n"
        f"the first, with all that it had to compile: {worked[0].ended - worked[0].began:.1f} s"
    )
    return worked[arguments.warm_up :]


def prepare(arguments: argparse.Namespace, home: Path) -> tuple[str, dict[str, str], list[Path]]:
    """Devices of the launcher, its environment, and what is rendered, one after the other."""
    models = home / "models"
    environment = {"RUSHES_MODELS_DIR": str(models)}
    if arguments.device == "sim":
        model, size, devices = "simulated", "832x480x81", "sim:1"
        step_seconds = arguments.job_seconds / SIM_STEPS
        environment["RUSHES_SIM_STEP_SECONDS"] = f"{step_seconds:.6f}"
        environment["RUSHES_SIM_ENCODES"] = "false" if arguments.cards else "true"
    elif arguments.device == "cpu":
        from models.tiny import shipped

        model, size, devices = "tiny", "48x48x17", "cpu"
        shipped.copy("tiny", models / "tiny")
    else:
        from benchmarks import random_model

        model, size, devices = "random", "832x480x81", _first_gpu()
        random_model.write(
            models / model, text_layers=arguments.text_layers, sizes=MODELS[arguments.model]
        )
    sizes = arguments.size or [size]
    return devices, environment, [write_preset(home / f"{s}.json", model, s) for s in sizes]


def _first_gpu() -> str:
    """As `rushes worker --devices` calls it; a slice where the GPU is cut into slices."""
    found = gpus.find()
    if not found:
        raise SystemExit("there is no GPU here: look at nvidia-smi")
    return found[0].number


def write_preset(path: Path, model: str, size: str) -> Path:
    width, height, num_frames = map(int, size.split("x"))
    look = {
        "model_path": model,
        "denoising_step_list": STEPS,
        "step_rule": "euler",
        "sample_shift": 5,
        "target_width": width,
        "target_height": height,
        "target_video_length": num_frames,
        "fps": 16,
    }
    path.write_text(json.dumps(look))
    return path


def report(
    arguments: argparse.Namespace,
    size: str,
    worked: Sequence[farm.Worked],
    *,
    kernels: float | None = None,
) -> None:
    """`kernels`: the share of the time in which a GPU ran any."""
    gaps = [later.began - earlier.ended for earlier, later in itertools.pairwise(worked)]
    jobs = [later.began - earlier.began for earlier, later in itertools.pairwise(worked)]
    job, gap = statistics.median(jobs), statistics.median(gaps)
    facts = {
        "device": arguments.device,
        "model": arguments.model if arguments.device == "cuda" else None,
        "size": size,
        "database": arguments.database,
        "jobs": len(worked),
        "job_seconds": job,
        "jobs_per_hour": 3600 / statistics.fmean(jobs),
        "gap_median": gap,
        "gap_p99": p99(gaps),
        "gap_most": max(gaps),
        "gap_share": sum(gaps) / sum(jobs),
        "between_stages_share": sum(w.ended - w.began - w.busy for w in worked[:-1]) / sum(jobs),
        "in_stages_share": sum(w.busy for w in worked[:-1]) / sum(jobs),
        "kernels_share": kernels,
        "stages": {
            stage: statistics.median(w.seconds.get(stage, 0.0) for w in worked)
            for stage in dict.fromkeys(name for w in worked for name in w.seconds)
        },
        **worked[-1].told,
    }
    print(
        f"job {job:.3f} s, {facts['jobs_per_hour']:.0f} an hour\n"
        f"gap between jobs: {told_gaps(gaps)}; {facts['gap_share']:.2%} of the time "
        f"(goal: {GOAL:.0%})\n"
        f"in stages {facts['in_stages_share']:.2%} (times of the host), between the stages of a "
        f"job {facts['between_stages_share']:.2%}"
        + ("\n" if kernels is None else f"; kernels ran {kernels:.1%} of the time\n")
        + "stages: "
        + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in facts["stages"].items())
        + "\n"
        + ", ".join(f"{name}: {value}" for name, value in worked[-1].told.items())
    )
    if arguments.json:
        with arguments.json.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def told_gaps(gaps: Sequence[float]) -> str:
    high = p99(gaps)
    return (
        f"median {statistics.median(gaps) * 1e3:.0f} ms, "
        + ("" if high is None else f"p99 {high * 1e3:.0f} ms, ")
        + f"most {max(gaps) * 1e3:.0f} ms of {len(gaps)}"
    )


def p99(values: Sequence[float]) -> float | None:
    """None of fewer than a hundred: it would be the largest."""
    if len(values) < 100:
        return None
    return sorted(values)[int(len(values) * 0.99)]


if __name__ == "__main__":
    main()
