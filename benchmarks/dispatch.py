"""How long a tick of the dispatcher takes, and how large Redis is: python -m benchmarks.dispatch

A million jobs in many batches of several owners; the workers take what is sent.
"""

import os
import tempfile
import time
from pathlib import Path

import redis
from sqlalchemy import text

from benchmarks import common
from jobs import database, dispatch, presets, queues, servers, settings, workers


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--batches", type=int, default=2_000)
    parser.add_argument("--owners", type=int, default=20)
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--ticks", type=int, default=50)
    arguments = parser.parse_args()
    print(common.machine())
    for kind in common.kinds(arguments):
        with common.database_url(kind) as url, tempfile.TemporaryDirectory() as folder:
            common.fill(url, arguments.jobs)
            db = database.Database(url)
            spread(db, arguments.batches, arguments.owners)
            with servers.RedisServer.start(Path(folder)) as server:
                seconds, sent, redis_bytes = measure(db, url, server, arguments)
            db.close()
            print(
                f"{kind}, {arguments.jobs:,} jobs in {arguments.batches:,} batches of "
                f"{arguments.owners} owners, {arguments.workers} workers: a tick that sends "
                f"{sent / len(seconds):.0f}: {common.spread(seconds)}; "
                f"Redis {redis_bytes / 1e6:.1f} MB, load {os.getloadavg()[0]:.1f}"
            )


def spread(db: database.Database, batches: int, owners: int) -> None:
    """The jobs of the one batch over many."""
    with db.transaction() as session:
        columns = [name for (name,) in session.execute(text(_COLUMNS[db.is_sqlite])).all()]
        kept = ", ".join(c for c in columns if c not in ("id", "owner", "idempotency_key"))
        old = session.scalar(text("SELECT id FROM batches"))
        for number in range(batches):
            session.execute(
                text(
                    f"INSERT INTO batches (id, owner, {kept}) "  # noqa: S608  # names of ours
                    f"SELECT :new, :owner, {kept} FROM batches WHERE id = :old"
                ),
                {"new": f"b{number:06}", "owner": f"o{number % owners}", "old": old},
            )
        number_of = "printf('b%06d', id % :n)" if db.is_sqlite else _PADDED
        session.execute(text(f"UPDATE jobs SET batch_id = {number_of}"), {"n": batches})  # noqa: S608
        session.execute(text("DELETE FROM batches WHERE id = :old"), {"old": old})
    common.tidy(db)


_PADDED = "'b' || lpad((id % :n)::text, 6, '0')"
_COLUMNS = {
    True: "SELECT name FROM pragma_table_info('batches')",
    False: "SELECT column_name FROM information_schema.columns WHERE table_name = 'batches'",
}


def measure(
    db: database.Database, url: str, server: servers.RedisServer, arguments: object
) -> tuple[list[float], int, int]:
    config = settings.load(database_url=url, broker_url=server.url)
    queue = queues.of_model(presets.load(str(common.PRESET)).look.model_path)
    with redis.Redis.from_url(server.url) as client:
        dispatcher = dispatch.Dispatcher(config, db=db)
        seconds, sent = [], 0
        for _ in range(arguments.ticks):  # type: ignore[attr-defined]  # of argparse
            for number in range(arguments.workers):  # type: ignore[attr-defined]
                db.write(workers.register, _registration(f"gpu{number}@bench", queue))
            began = time.perf_counter()
            sent += dispatcher.tick().sent
            seconds.append(time.perf_counter() - began)
            client.ltrim(queue, 8, -1)  # eight workers take a job each
        return seconds, sent, int(client.info("memory")["used_memory"])  # type: ignore[index]


def _registration(name: str, queue: str) -> workers.Registration:
    return workers.Registration(
        name=name,
        host="bench",
        device="none",
        memory_bytes=None,
        queues=(queue,),
        version="0",
        pid=1,
        restarts=0,
        launcher="benchmark",
    )


if __name__ == "__main__":
    main()
