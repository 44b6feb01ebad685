"""`rushes download`."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import click

from jobs import database, download, errors, queries, settings, sizes, storage, stores
from jobs.cli import connections, exits, options, output
from jobs.schema import Batch


@click.command("download")
@click.argument("batch")
@click.argument("folder", metavar="[DIR]", required=False, type=options.NamedPath(path_type=Path))
@click.option(
    "--include",
    multiple=True,
    type=click.Choice(["sidecar"]),
    help="sidecar: beside each video, a JSON file that says how it was made.",
)
@click.option(
    "--watch", is_flag=True, help="Fetch each video when it is finished, until the batch is."
)
@options.output
def download_batch(
    batch: str, folder: Path | None, include: tuple[str, ...], watch: bool, as_json: bool
) -> int:
    """Fetch the finished videos of a batch.

    Into DIR, by default a new folder named like the batch. A file is named by its custom_id, or by
    its place in the batch. What is there already and whole is not fetched again.
    """
    config = settings.load()
    db = connections.open_database(config)
    with db.reading() as session:
        row = queries.find_batch(session, batch)
    if row.results_expired_at is not None:
        raise errors.BatchExpired(row.id, what="results", when=row.results_expired_at)
    target = folder or Path(row.id)
    store = stores.open_store(config)
    sidecars = "sidecar" in include
    fetched = _fetched(db, store, row, target, sidecars=sidecars, watch=watch)
    try:
        with download.taken(db, row.id, target, sidecars=sidecars):
            outcomes = _with_progress(fetched, length=row.total if watch else row.succeeded)
    except storage.StorageUnavailable as error:
        rest = "what is there is whole, and the same command fetches the rest"
        raise errors.RushesError(f"{error}; {rest}") from error
    with db.reading() as session:
        row = queries.find_batch(session, row.id)
    if as_json:
        output.emit(_shape(row, target, outcomes))
    else:
        _tell(row, target, outcomes)
    return exits.ERROR if _count(outcomes, download.Status.FAILED) else exits.OK


def _fetched(
    db: database.Database,
    store: storage.ObjectStore,
    row: Batch,
    target: Path,
    *,
    sidecars: bool,
    watch: bool,
) -> Iterator[download.Outcome]:
    if watch:
        return download.follow(db, store, row.id, target, sidecars=sidecars)
    return chain(
        download.fetch(store, download.items(db, row.id), target, sidecars=sidecars),
        download.fetch_result_files(db, store, row, target),
    )


def _with_progress(
    fetched: Iterable[download.Outcome], *, length: int
) -> Sequence[download.Outcome]:
    outcomes = []
    with click.progressbar(
        length=length, label="downloading", file=sys.stderr, hidden=not sys.stderr.isatty()
    ) as bar:
        for outcome in fetched:
            outcomes.append(outcome)
            if outcome.job_id is not None:
                bar.update(1)
    return outcomes


def _tell(row: Batch, target: Path, outcomes: Sequence[download.Outcome]) -> None:
    for outcome in outcomes:
        if outcome.status is download.Status.FAILED:
            output.note(f"{outcome.file}: {outcome.error}")
    videos = [outcome for outcome in outcomes if outcome.job_id is not None]
    there = _count(videos, download.Status.THERE)
    new = [outcome for outcome in videos if outcome.status is download.Status.DOWNLOADED]
    size = sizes.words(sum(outcome.size_bytes for outcome in new))
    said = [f"{output.count(len(new), 'video')} ({size}) downloaded"]
    if there:
        said.append(f"{there:,} already there")
    if deleted := _count(videos, download.Status.DELETED):
        said.append(f"{deleted:,} deleted")
    if failed := _count(outcomes, download.Status.FAILED):
        said.append(f"{failed:,} failed")
    output.line(f"{output.plain(str(target))}: {', '.join(said)}")
    without = {"failed job": row.failed, "cancelled job": row.cancelled}
    if told := [output.count(number, kind) for kind, number in without.items() if number]:
        output.note(f"no video of {' and '.join(told)}")
    if left := row.queued + row.running:
        output.note(f"{output.count(left, 'job')} not finished yet: run this again later")
    elif row.manifest_at is None:
        output.note("the result files are not written yet: run this again in a moment")


def _shape(row: Batch, target: Path, outcomes: Sequence[download.Outcome]) -> dict[str, Any]:
    videos = [outcome for outcome in outcomes if outcome.job_id is not None]
    return {
        "batch_id": row.id,
        "folder": str(target.absolute()),
        "downloaded": _count(videos, download.Status.DOWNLOADED),
        "already_there": _count(videos, download.Status.THERE),
        "deleted": _count(videos, download.Status.DELETED),
        "failed": _count(outcomes, download.Status.FAILED),
        "not_finished": row.queued + row.running,
        "files": [asdict(outcome) for outcome in outcomes],
    }


def _count(outcomes: Sequence[download.Outcome], status: download.Status) -> int:
    return sum(outcome.status is status for outcome in outcomes)
