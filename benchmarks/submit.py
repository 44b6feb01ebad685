"""How long `rushes submit` takes, and how much memory: python -m benchmarks.submit

Each submit is a process of its own, as a person starts it.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks import common


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--times", type=int, default=1)
    arguments = parser.parse_args()
    print(common.machine())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        common.write_prompts(path, arguments.jobs)
        print(f"{arguments.jobs:,} rows, {path.stat().st_size / 1e6:.0f} MB")
        for kind in common.kinds(arguments):
            for _ in range(arguments.times):
                with common.database_url(kind) as url:
                    seconds, cpu_seconds, peak_bytes = submit(url, path)
                print(
                    f"{kind}: {seconds:.1f} s ({arguments.jobs / seconds:,.0f} jobs/s), "
                    f"{cpu_seconds:.1f} s of them computing here, peak {peak_bytes / 1e6:.0f} MB, "
                    f"load {os.getloadavg()[0]:.1f}"
                )


def submit(url: str, path: Path) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and peak resident bytes of one `rushes submit`."""
    environment = os.environ | {
        "DATABASE_URL": url,
        "CELERY_BROKER_URL": "redis://127.0.0.1:1/0",
        "RUSHES_HOME": str(path.parent / "home"),
    }
    command = [sys.executable, "-m", "jobs", "submit", str(path), "--preset", str(common.PRESET)]
    began = time.perf_counter()
    process = subprocess.Popen([*command, "-q"], env=environment)
    watched, peak, cpu = psutil.Process(process.pid), 0, 0.0
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_info().rss)
            times = watched.cpu_times()
            cpu = times.user + times.system
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    assert process.wait() == 0
    return time.perf_counter() - began, cpu, peak


if __name__ == "__main__":
    main()
