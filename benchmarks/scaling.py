"""Many devices that sleep, one dispatcher, queue and database: python -m benchmarks.scaling

Jobs per hour of N devices against N times those of one, for each of `--devices`. Every device has
its real processes (Celery's parent and child), so that a small machine has more to do than a farm's
hosts together: choose `--job-seconds` so long that its processors are not what is measured, and
read their load beside each number. Counted is the time in which every device had work: from the
begin of the last first job to that of the first last one. One device alone, which the others are
compared with, renders `--base-jobs`.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import farm, steady

START_SECONDS = 60.0  # for one device, and
MORE_SECONDS = 8.0  # for each further one on two processors
SIZE = "64x64x5"  # each process encodes a test card once: half a second of processor at 480p


def main() -> None:
    arguments = parse()
    print(f"{farm.machine()}; {arguments.database}, {arguments.job_seconds:g} s a job")
    print("devices  jobs an hour  of N times one  idle  gaps between jobs  cores busy, ours")
    alone: float | None = None
    for number in arguments.devices:
        facts = measure(arguments, number)
        alone = alone or facts["jobs_per_hour"] / number
        facts["efficiency"] = facts["jobs_per_hour"] / (number * alone)
        print(
            f"{number:7}  {facts['jobs_per_hour']:12.0f}  {facts['efficiency']:14.1%}  "
            f"{facts['gap_share']:.2%}  {facts['gaps']}  "
            f"{facts['cores_busy']:.2f}, {facts['cores_ours']:.2f}",
            flush=True,
        )
        if arguments.json:
            with arguments.json.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(facts) + "\n")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--jobs", type=int, default=4, help="for each device, and one to warm up")
    parser.add_argument("--base-jobs", type=int, default=12, help="the same of one device alone")
    parser.add_argument("--job-seconds", type=float, default=30.0)
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="postgresql")
    parser.add_argument("--folder", type=Path, help="where the temporary files go")
    parser.add_argument("--seconds", type=float, default=3_600.0, help="give up after these")
    parser.add_argument("--json", type=Path, help="append each row as a line of JSON")
    return parser.parse_args()


def measure(arguments: argparse.Namespace, number: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rushes-scaling-", dir=arguments.folder) as folder:
        home = Path(folder)
        step_seconds = arguments.job_seconds / steady.SIM_STEPS
        environment = {"RUSHES_SIM_STEP_SECONDS": f"{step_seconds:.6f}"}
        preset = steady.write_preset(home / "scaling.json", "simulated", SIZE)
        with farm.running(
            home,
            devices=f"sim:{number}",
            database_kind=arguments.database,
            environment=environment,
        ) as running:
            running.wait_for_children(number, seconds=START_SECONDS + MORE_SECONDS * number)
            load = farm.Load()
            jobs = arguments.jobs if number > 1 else max(arguments.jobs, arguments.base_jobs)
            batch_id = running.submit(number * (1 + jobs), preset)
            running.wait(batch_id, seconds=arguments.seconds)
            cores_busy, cores_ours = load.cores()
            worked = running.worked(batch_id)
    return {
        "devices": number,
        "cores_busy": cores_busy,
        "cores_ours": cores_ours,
        **rates(worked, number),
    }


def rates(worked: Sequence[farm.Worked], number: int) -> dict[str, Any]:
    """Of the time in which every device has begun its first job and not yet its last."""
    by_worker: dict[str, list[farm.Worked]] = defaultdict(list)
    for each in worked:
        by_worker[each.worker].append(each)
    if len(by_worker) < number:
        raise SystemExit(f"only {len(by_worker)} of {number} devices took part")
    since = max(jobs[0].began for jobs in by_worker.values())
    until = min(jobs[-1].began for jobs in by_worker.values())
    gaps = [
        later.began - earlier.ended
        for jobs in by_worker.values()
        for earlier, later in itertools.pairwise(jobs)
        if earlier.ended < until and later.began > since
    ]
    if until <= since or not gaps:
        raise SystemExit("no time in which all devices had work: more --jobs")
    within = [max(0.0, min(job.ended, until) - max(job.began, since)) for job in worked]
    done = sum(part / (job.ended - job.began) for part, job in zip(within, worked, strict=True))
    return {
        "jobs_per_hour": done / (until - since) * 3600,
        "gaps": steady.told_gaps(gaps),
        "gap_median": statistics.median(gaps),
        "gap_p99": steady.p99(gaps),
        "gap_most": max(gaps),
        "gap_share": 1 - sum(within) / (len(by_worker) * (until - since)),
    }


if __name__ == "__main__":
    main()
    sys.stdout.flush()
