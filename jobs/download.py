"""Videos of a batch into a folder: verified, never outside of it, resumed where it stopped."""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import threading
import time
import unicodedata
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import structlog
from sqlalchemy.exc import InterfaceError, OperationalError

from jobs import database, errors, queries, requests, results, retries, storage
from jobs.schema import Attempt, Batch, Job

log = structlog.get_logger()

THREADS = 4
FETCH_TRIES = 8  # about a minute
RETRY_SECONDS = 1.0
LONGEST_RETRY_SECONDS = 20.0
WATCH_SECONDS = 5.0
IDLE_PER_LOOK = 9.0  # a tenth of the time, at most, is spent looking for new videos
LONGEST_PAUSE_SECONDS = 60.0  # while the database or the store is away
MAX_NAME_BYTES = 150  # file systems end at 255; ours adds an end and a prefix while it writes
POSITION_DIGITS = 5
OWNER_FILE = ".rushes-batch"
RESULT_FILES = (results.OUTPUT, results.ERRORS, results.MANIFEST)
RESERVED_NAMES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # Windows
KEPT_CHARS = frozenset(" ._-#+=@,()")


class Status(StrEnum):
    """What became of one file."""

    DOWNLOADED = "downloaded"
    THERE = "there"
    """Already there with the right size and checksum."""
    DELETED = "deleted"
    """Nowhere any more: OpenAI's API was asked to delete it."""
    FAILED = "failed"


class DiskUnusable(errors.RushesError):
    """A folder takes no more files; those that are there are whole."""

    def __init__(self, folder: Path, error: OSError) -> None:
        super().__init__(
            f"{folder}: {error.strerror or error}; what is there is whole, and the same command "
            "fetches the rest when there is room"
        )


class FolderBusy(errors.RushesError):
    """Another download writes the same names there now."""

    def __init__(self, folder: Path) -> None:
        super().__init__(
            f"{folder}: another download works in this folder; wait for its end, or give another "
            "folder"
        )


@dataclass(frozen=True, kw_only=True)
class Item:
    """A finished video and the name it gets."""

    job_id: int
    custom_id: str | None
    name: str
    """Without its end."""
    key: str
    sidecar_key: str
    size_bytes: int
    sha256: str
    is_deleted: bool
    """In the store; what was fetched before lies here still."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One video, or a result file (then without job)."""

    file: str
    status: Status
    size_bytes: int
    job_id: int | None = None
    custom_id: str | None = None
    error: str | None = None


class Names:
    """File names of a batch: the same at every call, because every job is asked in order."""

    def __init__(self) -> None:
        # A sidecar must not take the name of a result file.
        self._taken = {Path(name).stem for name in RESULT_FILES}

    def of(self, position: int, custom_id: str | None) -> str:
        """The custom_id, as far as it can be a file name everywhere; else the position."""
        number = f"{position:0{POSITION_DIGITS}}"
        name = safe_name(custom_id or "") or number
        if not _is_written_here(name):
            name = number
        while _folded(name) in self._taken:
            name = f"{name}-{number}"
        self._taken.add(_folded(name))
        return name


def safe_name(text: str) -> str:
    """One path component, harmless on every system and in a shell; may be empty."""
    normal = unicodedata.normalize("NFC", text)
    kept = "".join(char if char.isalnum() or char in KEPT_CHARS else "_" for char in normal)
    name = kept.lstrip(" .-").encode()[:MAX_NAME_BYTES].decode(errors="ignore").rstrip(" .")
    if not name.strip("_"):
        return ""
    return f"_{name}" if RESERVED_NAMES.fullmatch(name) else name


def _is_written_here(name: str) -> bool:
    """Not where the locale is older than UTF-8 and has no such letters."""
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return True


def items(db: database.Database, batch_id: str) -> Iterator[Item]:
    """Every finished video of the batch, in the order of the file."""
    return (item for _, item in _named(db, batch_id) if item is not None)


def _named(db: database.Database, batch_id: str) -> Iterator[tuple[str, Item | None]]:
    """The name of each job's video, also of those that are not finished."""
    names = Names()
    after = -1
    while True:
        with db.reading() as session:
            page = queries.jobs_with_results(session, batch_id, after=after)
            finished = [job for job, attempt in page if attempt is not None]
            deleted = requests.deleted_videos(session, batch_id, finished)
        for job, attempt in page:
            name = names.of(job.position, job.custom_id)
            if attempt is None:
                yield name, None
            else:
                yield name, _item(job, attempt, name, is_deleted=job.id in deleted)
        if not page:
            return
        after = page[-1][0].position


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = "is a file" if folder.is_file() else f"cannot be made: {error.strerror}"
        raise errors.FileUnusable(f"{folder} {why}; give another folder") from error


@contextmanager
def taken(db: database.Database, batch_id: str, folder: Path, *, sidecars: bool) -> Iterator[None]:
    """Alone in the folder, which is marked as this batch's. FolderBusy while another download is.

    InvalidInput when it holds another batch's files, with equal names, or a person's own.
    """
    _is_marked(folder, batch_id)
    _make(folder)
    with _alone_in(folder):
        if not _is_marked(folder, batch_id):
            if not _batch_of_manifest(folder):
                _refuse_own(db, batch_id, folder, sidecars=sidecars)
            _mark(folder, batch_id)
        yield


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """The kernel lets go of the folder when we end, however that happens."""
    with contextlib.ExitStack() as stack:
        try:
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderBusy(folder) from None
        except OSError:  # some network file systems have no locks
            pass
        yield


def _is_marked(folder: Path, batch_id: str) -> bool:
    """As this batch's. InvalidInput when its files may not be replaced by ours."""
    mark = folder / OWNER_FILE
    marked = mark.read_text("utf-8").strip() if mark.is_file() else ""
    owner = marked or _batch_of_manifest(folder)
    if owner and owner != batch_id:
        raise _not_ours(folder, f"holds batch {owner}:")
    if not owner and (own := [name for name in RESULT_FILES if (folder / name).exists()]):
        raise _not_ours(folder, _replaced(folder / own[0]))
    return bool(marked)


def _refuse_own(db: database.Database, batch_id: str, folder: Path, *, sidecars: bool) -> None:
    """InvalidInput for a video that another one would replace, now or once its job is finished."""
    if next(folder.glob("[!.]*"), None) is None:
        return  # a new folder, mostly: then the names of a million jobs need not be read
    for name, item in _named(db, batch_id):
        video, sidecar = folder / f"{name}.mp4", folder / f"{name}.json"
        if video.exists() and not (item and _is_there(video, item)):
            raise _not_ours(folder, _replaced(video))
        if sidecars and sidecar.exists() and not (item and _is_sidecar(sidecar, item)):
            raise _not_ours(folder, _replaced(sidecar))


def _replaced(file: Path) -> str:
    return f"holds a {file.name} of no batch, which would be replaced: remove it,"


def _not_ours(folder: Path, why: str) -> errors.InvalidInput:
    message = f"{why} give another folder, or none for one named like the batch"
    return errors.invalid(str(folder), message)


def _batch_of_manifest(folder: Path) -> str:
    """Whose files lie in a folder that lost its mark, as by a copy of what is not hidden."""
    try:
        manifest = json.loads((folder / results.MANIFEST).read_text("utf-8"))
        return str(manifest["batch_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _mark(folder: Path, batch_id: str) -> None:
    try:
        with _replacing(folder / OWNER_FILE) as part:
            part.write_text(f"{batch_id}\n", "utf-8")
    except OSError as error:
        raise DiskUnusable(folder, error) from error


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A file beside it to write: at the end it takes its place, and after an error it is gone."""
    part = target.with_name(f".{target.name}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def fetch(
    store: storage.ObjectStore, wanted: Iterator[Item], folder: Path, *, sidecars: bool
) -> Iterator[Outcome]:
    """Fetch what is not there yet, a few at once; outcomes in order.

    A single bad object is an outcome. A store that is out of reach ends it: StorageError; so does
    a disk that takes no more: DiskUnusable.
    """
    _make(folder)
    pool, stop = ThreadPoolExecutor(THREADS), threading.Event()
    under_way: deque[Future[Outcome]] = deque()
    try:
        for item in wanted:
            under_way.append(pool.submit(_fetch, store, item, folder, stop, sidecars=sidecars))
            if len(under_way) > 2 * THREADS:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)


def follow(
    db: database.Database,
    store: storage.ObjectStore,
    batch_id: str,
    folder: Path,
    *,
    sidecars: bool,
) -> Iterator[Outcome]:
    """Fetch each video when it is there, until the batch is finished and its files are written.

    Waits through outages of the database and of the store.
    """
    good: set[int] = set()
    bad: set[int] = set()
    pause = WATCH_SECONDS
    while True:
        began = time.monotonic()
        try:
            with db.reading() as session:
                batch = queries.find_batch(session, batch_id)
            is_last = batch.manifest_at is not None
            # What is not to be had is tried once more at the end, not every few seconds.
            known = good if is_last else good | bad
            if batch.succeeded > len(known):
                new = (item for item in items(db, batch_id) if item.job_id not in known)
                for outcome in fetch(store, new, folder, sidecars=sidecars):
                    assert outcome.job_id is not None
                    is_here = outcome.status in (Status.DOWNLOADED, Status.THERE)
                    (good if is_here else bad).add(outcome.job_id)
                    if is_last or is_here:
                        yield outcome
            if is_last:
                yield from fetch_result_files(db, store, batch, folder)
                return
            pause = max(WATCH_SECONDS, IDLE_PER_LOOK * (time.monotonic() - began))
        except (OperationalError, InterfaceError, storage.StorageUnavailable) as error:
            log.warning("download.waits", error=str(error)[:200])
            pause = min(max(2 * pause, WATCH_SECONDS), LONGEST_PAUSE_SECONDS)
        time.sleep(pause)


def fetch_result_files(
    db: database.Database, store: storage.ObjectStore, batch: Batch, folder: Path
) -> Iterator[Outcome]:
    """output.jsonl, errors.jsonl and manifest.json, once they are written. Raises as `fetch` does.

    The lines of output.jsonl are given the names that the videos have here, and the manifest
    seals the files as they lie here.
    """
    if batch.manifest_at is None:
        return
    _make(folder)
    for name in RESULT_FILES:
        target = folder / name
        try:
            _download(store, results.batch_key(batch.id, name), target, threading.Event())
            if name == results.OUTPUT:
                _name_videos(db, batch.id, target)
            if name == results.MANIFEST:
                _seal(folder)
        except (storage.ObjectMissing, ValueError, KeyError) as error:
            yield Outcome(file=name, status=Status.FAILED, size_bytes=0, error=str(error))
        except OSError as error:
            raise DiskUnusable(folder, error) from error
        else:
            size = target.stat().st_size
            yield Outcome(file=name, status=Status.DOWNLOADED, size_bytes=size)


def _name_videos(db: database.Database, batch_id: str, path: Path) -> None:
    """Put `video.file` into each line. The lines and the videos are in the same order."""
    videos = items(db, batch_id)
    with (
        _replacing(path) as part,
        path.open(encoding="utf-8") as lines,
        part.open("w", encoding="utf-8") as named,
    ):
        for line in lines:
            entry = json.loads(line)
            # A batch that was reopened meanwhile may have more videos than lines.
            video = next((v for v in videos if v.job_id == entry["job_id"]), None)
            if video is not None and not _is_gone(video, path.parent):
                entry["video"]["file"] = f"{video.name}.mp4"
            named.write(json.dumps(entry, ensure_ascii=False) + "\n")


def _is_gone(item: Item, folder: Path) -> bool:
    return item.is_deleted and not _is_there(folder / f"{item.name}.mp4", item)


def _seal(folder: Path) -> None:
    """The manifest's size and checksum of output.jsonl: of the file that now lies beside it."""
    target = folder / results.MANIFEST
    manifest = json.loads(target.read_text("utf-8"))
    path = folder / results.OUTPUT
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    manifest["files"][results.OUTPUT] |= {"bytes": path.stat().st_size, "sha256": digest}
    body = json.dumps(manifest, indent=2, ensure_ascii=False)
    with _replacing(target) as part:
        part.write_text(f"{body}\n", "utf-8")


def _item(job: Job, attempt: Attempt, name: str, *, is_deleted: bool) -> Item:
    assert attempt.video_key is not None
    assert attempt.video_bytes is not None
    assert attempt.video_sha256 is not None
    return Item(
        job_id=job.id,
        custom_id=job.custom_id,
        name=name,
        key=attempt.video_key,
        sidecar_key=results.sidecar_key(job.batch_id, job.id, attempt.id),
        size_bytes=attempt.video_bytes,
        sha256=attempt.video_sha256,
        is_deleted=is_deleted,
    )


def _fetch(
    store: storage.ObjectStore, item: Item, folder: Path, stop: threading.Event, *, sidecars: bool
) -> Outcome:
    target = folder / f"{item.name}.mp4"
    status, error = Status.THERE, None
    try:
        if not _is_there(target, item):
            status = Status.DELETED if item.is_deleted else Status.DOWNLOADED
        if status is Status.DOWNLOADED:
            _fetch_video(store, item, target, stop)
        sidecar = folder / f"{item.name}.json"
        wants_sidecar = sidecars and not item.is_deleted
        if wants_sidecar and (status is Status.DOWNLOADED or not _is_sidecar(sidecar, item)):
            _download(store, item.sidecar_key, sidecar, stop)
    except (storage.StorageUnavailable, storage.StorageDenied):
        raise
    except (errors.RushesError, IsADirectoryError) as problem:
        status, error = Status.FAILED, str(problem)
    except OSError as problem:
        raise DiskUnusable(folder, problem) from problem
    return Outcome(
        job_id=item.job_id,
        custom_id=item.custom_id,
        file=target.name,
        status=status,
        size_bytes=item.size_bytes,
        error=error,
    )


def _fetch_video(
    store: storage.ObjectStore, item: Item, target: Path, stop: threading.Event
) -> None:
    with _replacing(target) as part:
        _download(store, item.key, part, stop)
        if not _is_there(part, item):
            address = store.address(item.key)
            raise storage.StorageError(
                address, f"its content is not what was uploaded (sha256 {item.sha256})"
            )


def _download(store: storage.ObjectStore, key: str, path: Path, stop: threading.Event) -> None:
    """Tried again, until told to stop.

    A connection that breaks, or a store that is busy for a moment, must not end a night's download.
    """
    for tries in range(1, FETCH_TRIES):
        try:
            store.download(key, path)
        except storage.StorageUnavailable as error:
            if stop.is_set():
                raise
            wait = retries.growing_wait(RETRY_SECONDS, tries, longest_seconds=LONGEST_RETRY_SECONDS)
            told = {"error": str(error)[:200], "seconds": round(wait, 1)}
            log.warning("download.again", key=key, **told)
            stop.wait(wait)
        else:
            return
    store.download(key, path)


def _is_there(path: Path, item: Item) -> bool:
    try:
        if not path.is_file() or path.stat().st_size != item.size_bytes:
            return False
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest() == item.sha256
    except OSError:  # nobody can say; what is put there says whether it can be replaced
        return False


def _is_sidecar(path: Path, item: Item) -> bool:
    """It can be read and is of this video; no more is known of what it should say."""
    try:
        told = json.loads(path.read_text("utf-8"))
        return bool(told["video"]["sha256"] == item.sha256)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _folded(name: str) -> str:
    """Names that some file system takes for the same."""
    return unicodedata.normalize("NFKC", name).casefold()
