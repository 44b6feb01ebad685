"""What `rushes show` and a status page read of a huge batch: python -m benchmarks.show"""

import os
import subprocess
import sys
import time
from functools import partial

from sqlalchemy import update
from starlette.testclient import TestClient

from benchmarks import common
from jobs import database, queries, settings, states, watch
from jobs.schema import Batch, Job
from jobs.web import app, server


def main() -> None:
    arguments = common.parser(__doc__ or "").parse_args()
    print(common.machine())
    for kind in common.kinds(arguments):
        with common.database_url(kind) as url:
            batch_id = common.fill(url, arguments.jobs)
            db = database.Database(url)
            half_way(db, batch_id, arguments.jobs)
            asked = {
                "look at a batch (show, watch, status page)": partial(watch.look, db, batch_id),
                "its failed jobs": partial(failed, db, batch_id),
                "the newest batches": partial(listed, db),
            }
            for name, ask in asked.items():
                seconds = common.timed(ask, times=50)
                print(f"{kind}, {arguments.jobs:,} jobs: {name}: {common.spread(seconds)}")
            tell_pages(kind, db, batch_id)
            db.close()
            seconds = [command(url, batch_id) for _ in range(5)]
            print(
                f"{kind}: `rushes show`, a process each: {common.spread(seconds)}, "
                f"load {os.getloadavg()[0]:.1f}"
            )


def tell_pages(kind: str, db: database.Database, batch_id: str) -> None:
    """Whole answers of the web service, in this process: no time of a network."""
    address = "http://127.0.0.1:8000"
    config = settings.load(web_rate="off")
    client = TestClient(app.make(server.make_service(config, db)), base_url=address)
    for path in (f"/batches/{batch_id}", "/batches", f"/api/batches/{batch_id}"):
        assert client.get(path).is_success, path
        seconds = common.timed(partial(client.get, path), times=50)
        print(f"{kind}: GET {path.replace(batch_id, 'BATCH')}: {common.spread(seconds)}")


def half_way(db: database.Database, batch_id: str, jobs: int) -> None:
    """Half succeeded, a thousandth failed."""
    half, failed_from = jobs // 2, jobs // 2 - jobs // 1000
    with db.transaction() as session:
        now = database.now(session)
        succeeded = update(Job).where(Job.position < failed_from)
        session.execute(
            succeeded.values(state=states.JobState.SUCCEEDED, started_at=now, finished_at=now)
        )
        failed = update(Job).where(Job.position >= failed_from, Job.position < half)
        session.execute(
            failed.values(state=states.JobState.FAILED, error="it broke", finished_at=now)
        )
        counts = {"queued": jobs - half, "succeeded": failed_from, "failed": half - failed_from}
        session.execute(update(Batch).where(Batch.id == batch_id).values(counts))
    common.tidy(db)


def failed(db: database.Database, batch_id: str) -> None:
    with db.reading() as session:
        queries.jobs(session, batch_id, states_wanted=(states.JobState.FAILED,), limit=20)


def listed(db: database.Database) -> None:
    with db.reading() as session:
        queries.batches(session, limit=20)


def command(url: str, batch_id: str) -> float:
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-m", "jobs", "show", batch_id],
        env=os.environ | {"DATABASE_URL": url},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        check=True,
    )
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
