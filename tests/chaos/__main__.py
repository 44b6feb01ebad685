"""`make chaos`: a long run with the default leases, and its report."""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from tests.chaos import run, scripts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scale", type=float, default=1.0, help="1: 10,000 jobs, 100 kills")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=4, help="per host; there are two hosts")
    parser.add_argument("--sqlite", action="store_true", help="instead of PostgreSQL")
    parser.add_argument("--short", action="store_true", help="the form inside `make test`")
    parser.add_argument(
        "--minutes", type=float, default=600.0, help="then nothing more is submitted or struck"
    )
    parser.add_argument("--folder", type=Path, help="for logs and report.json; must not exist")
    options = parser.parse_args()
    folder = options.folder or Path(tempfile.mkdtemp(prefix="rushes-chaos-run-"))
    folder.mkdir(parents=True, exist_ok=options.folder is None)
    if options.short:
        script = scripts.short(seed=options.seed, on_sqlite=options.sqlite)
    else:
        script = scripts.long(
            scale=options.scale,
            seed=options.seed,
            workers_per_host=options.workers,
            on_sqlite=options.sqlite,
            minutes=options.minutes,
        )
    verdict = run.run(script, folder.absolute())
    run.tell(verdict)
    if verdict.is_good and options.folder is None:
        shutil.rmtree(folder)
    else:
        sys.stdout.write(f"logs and report.json: {folder}\n")
    return 0 if verdict.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
