"""How long a claim takes with many workers: python -m benchmarks.claim

First paced, each client a few seconds apart as workers are; then each as fast as it can, which
tells what the database and this machine carry.
"""

import itertools
import json
import os
import subprocess
import sys
import threading
import time

from benchmarks import common
from jobs import database, lifecycle

PROCESSES = 4


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--pause", type=float, default=2.0, help="of a client between two claims")
    parser.add_argument("--part", nargs=5, help="one process of several; used by itself")
    arguments = parser.parse_args()
    if arguments.part:
        url, threads, pause, seconds, first = arguments.part
        part(url, int(threads), float(pause), float(seconds), int(first))
        return
    print(common.machine())
    for kind in common.kinds(arguments):
        with common.database_url(kind) as url:
            common.fill(url, arguments.jobs)
            first = 1
            # SQLite lets one process write at a time, and those who wait sleep in between.
            clients = 8 if kind == "sqlite" else arguments.clients
            for pause in (arguments.pause, 0.0):
                found = measure(url, clients, pause, arguments.seconds, first)
                first += arguments.jobs // 2
                print(
                    f"{kind}, {arguments.jobs:,} jobs, {clients} clients, "
                    f"{pause:g} s apart: {len(found) / arguments.seconds:,.0f} claims/s, "
                    f"{common.spread(found)}, load {os.getloadavg()[0]:.1f}"
                )


def measure(url: str, clients: int, pause: float, seconds: float, first: int) -> list[float]:
    """Seconds of each claim, by processes of several threads."""
    command = [sys.executable, "-m", "benchmarks.claim", "--part", url, str(clients // PROCESSES)]
    started = [
        subprocess.Popen(
            [*command, str(pause), str(seconds), f"{first + number}"],
            stdout=subprocess.PIPE,
        )
        for number in range(PROCESSES)
    ]
    found: list[float] = []
    for process in started:
        told, _ = process.communicate()
        assert process.returncode == 0
        found += json.loads(told)
    return found


def part(url: str, threads: int, pause: float, seconds: float, first: int) -> None:
    db = database.Database(url)
    lock, found = threading.Lock(), []
    next_id = itertools.count(first, PROCESSES)

    def client(number: int) -> None:
        time.sleep(pause * number / threads)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            with lock:
                job_id = next(next_id)
            began = time.perf_counter()
            claimed = db.write(
                lifecycle.claim, job_id, worker=f"gpu{number}@bench", lease_seconds=60
            )
            took = time.perf_counter() - began
            assert claimed is not None
            with lock:
                found.append(took)
            time.sleep(pause)

    started = [threading.Thread(target=client, args=(number,)) for number in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
