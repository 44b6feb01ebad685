"""Prompts and a preset -> one batch with its jobs. Seeds and looks are fixed here, for ever."""

import contextlib
import hashlib
import json
import math
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, BinaryIO

from pydantic import ValidationError
from sqlalchemy import URL, func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.orm import Session

from jobs import (
    bulk,
    database,
    errors,
    inputs,
    looks,
    one_line,
    presets,
    prompt_row,
    queues,
    readers,
    safety,
    schema,
    settings,
)
from jobs.looks import Look, LoraUse
from jobs.schema import Batch, Owner

LORA_FOLDER = "loras"
MAX_PROBLEMS = 100_000  # are told: some 30 MB of memory, and two seconds
MAX_REPEAT = 10_000
MAX_LOOKS = 1_000  # in one file; each is a row that its jobs share
MAX_REMEMBERED = 10_000  # spellings of looks, good and bad
SEED_BITS = 32  # drawn seeds are as wide as other tools take; given ones may be wider
REPETITION = re.compile(r"#\d+$")
BATCH_ID_ALPHABET = "0123456789abcdefghjkmnpqrstvwxyz"  # no i l o u: read over the phone
NOT_UTF8 = re.compile("[\udc80-\udcff]")  # what Python makes of an argument's bytes it cannot read
NOT_UTF8_HINT = ", and it was not read as UTF-8: set LC_ALL=C.UTF-8 in this terminal"
LOOK_AGAIN_SECONDS = (0.0, 0.5, 1.0, 2.0, 4.0)  # a server that is started anew is back by then


class AnswerLost(database.DatabaseUnavailable):
    """Whether the batch is stored is not known: its COMMIT was sent, and no answer came."""

    def __init__(self, url: URL, batch_id: str) -> None:
        self.batch_id = batch_id
        super().__init__(
            url,
            f"it went away before it said whether batch {batch_id} is stored: once it is back, "
            f"`rushes show {batch_id}` tells. With --idempotency-key a submit may be repeated",
        )


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `rushes submit` was asked for beside the prompts."""

    preset: presets.Preset
    name: str | None = None
    priority: int = 0
    """For rows that name none; higher goes first."""
    owner: str = ""
    deadline: datetime | timedelta | None = None
    """A moment, or how long after the submit; what is not finished then is given up."""
    max_queued: int | None = None
    """Of the owner, with this batch."""
    repeat: int = 1
    """Videos per prompt: with seed, seed + 1, ..."""
    idempotency_key: str | None = None
    skip_invalid: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A prompt file that was read to its end and found good (or good enough)."""

    prompts: int
    jobs: int
    looks: dict[str, int]
    """Look id -> jobs."""
    fingerprint: str
    """Of the file, its images and the options."""
    skipped: tuple[errors.Problem, ...]
    num_skipped: int
    """Of very many, `skipped` tells the first ones."""
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Submission:
    """The batch that now holds these prompts; `is_new` is false for a repeated submit."""

    batch_id: str
    jobs: int
    is_new: bool
    plan: Plan


@dataclass
class PromptFile:
    """A seekable stream of prompts."""

    stream: BinaryIO
    source: str
    format: readers.Format
    options: Options
    looks: dict[str, Look] = field(default_factory=dict)
    """Those of the rows that were good, by id."""
    images: inputs.InputImages | None = None
    """Where rows' images come from; None: from nowhere."""
    check: safety.Check | None = None
    """A user's own, which may refuse a row's prompt."""
    fill: Callable[[prompt_row.PromptRow], prompt_row.PromptRow] | None = None
    """What a schedule does to each row before it is checked; ValueError says what is wrong."""
    _remembered: dict[tuple[Any, ...], Look | str] = field(default_factory=dict)

    def rows(self) -> Generator["Order | errors.Problem"]:
        """Each good row with its look, each bad one as a problem, in the order of the file."""
        self.stream.seek(0)
        read = readers.read(self.stream, format=self.format)
        checked = readers.without_duplicates(map(self._filled, read))
        rows: Generator[prompt_row.PromptRow | errors.Problem] = checked
        if self.images is not None:
            rows = self.images.fetched_ahead(checked, self._source_of_image)
        # Closed also after an error, whose traceback would keep it: threads are at work for it.
        with contextlib.closing(rows):
            for row in rows:
                if isinstance(row, errors.Problem):
                    yield row
                    continue
                try:
                    yield self._order(row)
                except ValueError as error:
                    yield errors.Problem(line=row.line, message=str(error))

    def _source_of_image(self, row: prompt_row.PromptRow | errors.Problem) -> str | None:
        if isinstance(row, errors.Problem) or not self.options.preset.look.needs_image:
            return None
        return row.image

    def _filled(
        self, row: prompt_row.PromptRow | errors.Problem
    ) -> prompt_row.PromptRow | errors.Problem:
        if self.fill is None or isinstance(row, errors.Problem):
            return row
        try:
            return self.fill(row)
        except ValueError as error:
            return errors.Problem(line=row.line, message=str(error))

    def _order(self, row: prompt_row.PromptRow) -> "Order":
        """ValueError says why the row cannot be rendered, and what would do."""
        image = self._image(row)
        look = self._look(row, image)
        self._check_custom_id(row)
        self._check_prompt(row)
        if look.id not in self.looks and len(self.looks) >= MAX_LOOKS:
            raise ValueError(
                f"a file may ask for {MAX_LOOKS:,} different sizes, lengths and frame rates: "
                "use one of those above, or another file"
            )
        self.looks[look.id] = look
        return Order(row=row, look=look, image_key=None if image is None else image.key)

    def fingerprint(self) -> str:
        """SHA-256 of the file's bytes and of every option that changes what is rendered."""
        options = self.options
        digest = hashlib.sha256(
            json.dumps(
                {
                    "format": self.format,
                    "look": options.preset.look.id,
                    "priority": options.priority,
                    "repeat": options.repeat,
                    "skip_invalid": options.skip_invalid,
                    "name": options.name,
                }
            ).encode()
        )
        self.stream.seek(0)
        while block := self.stream.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()

    def _look(self, row: prompt_row.PromptRow, image: inputs.InputImage | None) -> Look:
        pixels = None if image is None else (image.width, image.height)
        asked = (row.width, row.height, row.num_frames, row.seconds, row.fps, row.lora, pixels)
        if asked not in self._remembered:
            if len(self._remembered) >= MAX_REMEMBERED:
                self._remembered.clear()
            try:
                self._remembered[asked] = self._resolve(row, image)
            except ValueError as error:
                self._remembered[asked] = str(error)
        found = self._remembered[asked]
        if isinstance(found, str):
            raise ValueError(found)
        return found

    def _resolve(self, row: prompt_row.PromptRow, image: inputs.InputImage | None) -> Look:
        preset = self.options.preset
        num_frames = row.num_frames
        if row.seconds is not None:
            num_frames = presets.frames_for_seconds(row.seconds, row.fps or preset.look.fps)
        look = preset.look_for(
            width=row.width,
            height=row.height,
            num_frames=num_frames,
            fps=row.fps,
            loras=tuple(_lora_use(lora) for lora in row.lora or ()),
        )
        return look if image is None else look.sized(image.width, image.height)

    def _image(self, row: prompt_row.PromptRow) -> inputs.InputImage | None:
        preset = self.options.preset
        if not preset.look.needs_image:
            if row.image is not None:
                raise ValueError(
                    f"image: preset {preset.name} makes videos from text alone: leave it out, "
                    "or take an image-to-video preset"
                )
            return None
        if row.image is None:
            raise ValueError(
                f"image is missing: preset {preset.name} starts from one; give a path, an "
                "https:// or s3:// address, or a data URL"
            )
        if self.images is None:
            raise ValueError("image: images cannot be fetched here")
        found = self.images.resolve(row.image)
        if isinstance(found, str):
            raise ValueError(f"image: {found}")
        return found

    def _check_prompt(self, row: prompt_row.PromptRow) -> None:
        if self.check is None:
            return
        asked = safety.Prompt(
            prompt=row.prompt, negative_prompt=row.negative_prompt, metadata=row.metadata
        )
        if (reason := self.check.refusal(asked)) is not None:
            raise ValueError(f"prompt: {reason}")

    def _check_custom_id(self, row: prompt_row.PromptRow) -> None:
        if self.options.repeat > 1 and REPETITION.search(row.custom_id or ""):
            raise ValueError(
                f"custom_id {row.custom_id!r}: with repeat the ends #2, #3, ... are given to "
                "the repetitions; choose another custom_id"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Order:
    """A row that can be rendered."""

    row: prompt_row.PromptRow
    look: Look
    image_key: str | None


def plan(file: PromptFile, *, keep: Callable[[Order], None] | None = None) -> Plan:
    """Read the whole file; InvalidInput lists every bad line unless they are to be skipped.

    After MAX_PROBLEMS of them it is not read on. `keep` is given each good row.
    """
    options = file.options
    check_options(options)
    file_fingerprint = file.fingerprint()
    problems: list[errors.Problem] = []
    jobs_of_looks: Counter[str] = Counter()
    bad = prompts = negatives = 0
    fingerprint = hashlib.sha256()
    with contextlib.closing(file.rows()) as rows:
        for row in rows:
            if isinstance(row, errors.Problem):
                bad += 1
                if bad <= MAX_PROBLEMS:
                    problems.append(row)
                elif not options.skip_invalid:
                    break
                continue
            prompts += 1
            negatives += row.row.negative_prompt is not None
            jobs_of_looks[row.look.id] += options.repeat
            # The file names its images; what they show is part of the content as well.
            fingerprint.update((row.image_key or "").encode())
            if keep is not None:
                keep(row)
    if bad > MAX_PROBLEMS:
        more = f"and {bad - MAX_PROBLEMS:,} more bad lines after these"
        if not options.skip_invalid:
            more = f"reading stopped after {MAX_PROBLEMS:,} bad lines: correct these first"
        problems.append(errors.Problem(line=None, message=more))
    if (problems and not options.skip_invalid) or not prompts:
        raise errors.InvalidInput(file.source, problems)
    notes = []
    if negatives:
        notes.append(
            f"negative_prompt of {negatives:,} prompts has no effect: "
            "distilled models render without classifier-free guidance"
        )
    if file.fingerprint() != file_fingerprint:
        message = "the file changed while it was read; submit it again"
        raise errors.invalid(file.source, message)
    fingerprint.update(file_fingerprint.encode())
    return Plan(
        prompts=prompts,
        jobs=prompts * options.repeat,
        looks=dict(jobs_of_looks),
        fingerprint=fingerprint.hexdigest(),
        skipped=tuple(problems),
        num_skipped=bad,
        notes=tuple(notes),
    )


def submit(
    db: database.Database,
    file: PromptFile,
    *,
    beside: Callable[[Session, str], None] | None = None,
) -> Submission:
    """Check the whole file, then store all of it in one transaction, or nothing.

    The rows are kept on disk in between: parsing is slower than storing, and on SQLite nobody
    else writes meanwhile. `beside` gets the id of a new batch, and stores what belongs to it in
    the same transaction; what it raises undoes all. AnswerLost: it may be stored or not.
    """
    room = _Room(db, file.options)
    with bulk.Spool() as spool:

        def keep(order: Order) -> None:
            room.add(file.options.repeat)
            spool.add(_kept(order))

        checked = plan(file, keep=keep)
        room.check()
        if file.images is not None:
            file.images.upload(db)
        # By itself: in the long transaction, another submit of the same look would wait for its
        # end.
        db.write(_store_looks, file.looks)
        db.write(_store_owner, file.options.owner)
        transaction: str | None = None
        try:
            with db.transaction() as session:
                earlier = _earlier(session, file.options.idempotency_key, checked)
                if earlier is not None:
                    return earlier
                batch_id = _store(session, file.options, spool, checked)
                if beside is not None:
                    beside(session, batch_id)
                transaction = _transaction(session)
        except IntegrityError:
            # Another submit with the same key was faster.
            with db.reading() as session:
                earlier = _earlier(session, file.options.idempotency_key, checked)
            if earlier is None:
                raise
            return earlier
        except DBAPIError:
            # Before the COMMIT was sent, all is undone.
            if transaction is None or not _is_stored(db, batch_id, transaction):
                raise
    return Submission(batch_id=batch_id, jobs=checked.jobs, is_new=True, plan=checked)


def prompt_check(config: settings.Settings) -> safety.Check | None:
    """That of this process's settings. InvalidInput when it cannot be loaded."""
    return safety.load(config.prompt_check, setting="RUSHES_PROMPT_CHECK")


def check_options(options: Options) -> None:
    """InvalidInput that names the option."""
    problems = []
    most = prompt_row.MAX_PRIORITY
    if not -most <= options.priority <= most:
        problems.append(f"priority must be -{most} to {most}, got {options.priority}")
    if not 1 <= options.repeat <= MAX_REPEAT:
        problems.append(f"repeat must be 1 to {MAX_REPEAT:,}, got {options.repeat}")
    for option, value, longest in (
        ("name", options.name, 200),
        ("idempotency key", options.idempotency_key, 200),
        ("owner", options.owner or None, 200),
    ):
        if value is not None and not (one_line.is_named(value) and 1 <= len(value) <= longest):
            hint = NOT_UTF8_HINT if NOT_UTF8.search(value) else ""
            problems.append(f"{option} must be 1 to {longest} characters on one line{hint}")
        elif option == "name" and value and one_line.is_blank(value):
            problems.append("name must have a character that can be seen")
    if problems:
        raise errors.invalid("options", *problems)


def _earlier(session: Session, key: str | None, checked: Plan) -> Submission | None:
    batch = _of_key(session, key)
    if batch is None or key is None:
        return None
    if batch.fingerprint != checked.fingerprint:
        raise errors.IdempotencyConflict(key, batch.id)
    return Submission(batch_id=batch.id, jobs=batch.total, is_new=False, plan=checked)


def _of_key(session: Session, key: str | None) -> Batch | None:
    if key is None:
        return None
    return session.scalar(select(Batch).where(Batch.idempotency_key == key))


def new_batch_id(now: datetime) -> str:
    """Unique in the world, and in the order of days."""
    return f"{now:%y%m%d}-" + "".join(secrets.choice(BATCH_ID_ALPHABET) for _ in range(8))


def drawn_seed() -> int:
    return secrets.randbits(SEED_BITS)


def _store(
    session: Session, options: Options, kept: Iterable[tuple[Any, ...]], checked: Plan
) -> str:
    now = database.now(session)
    deadline = options.deadline
    batch_id = new_batch_id(now)
    session.add(
        Batch(
            id=batch_id,
            name=options.name,
            owner=options.owner,
            deadline_at=now + deadline if isinstance(deadline, timedelta) else deadline,
            preset=options.preset.name,
            priority=options.priority,
            idempotency_key=options.idempotency_key,
            fingerprint=checked.fingerprint,
            created_at=now,
            total=checked.jobs,
            queued=checked.jobs,
        )
    )
    session.flush()
    stored = bulk.store(session, _jobs(batch_id, kept, options))
    assert stored == checked.jobs, f"{stored} of {checked.jobs}"
    if options.max_queued is not None:
        _check_quota(session, options.owner, new=checked.jobs, most=options.max_queued)
    return batch_id


def _transaction(session: Session) -> str:
    """What PostgreSQL can be asked about it later; "" on SQLite, where a file says how it ended."""
    if session.get_bind().dialect.name == "sqlite":
        return ""
    return str(session.scalar(text("SELECT pg_current_xact_id()::text")))


def _is_stored(db: database.Database, batch_id: str, transaction: str) -> bool:
    """After a COMMIT without an answer. AnswerLost when this has none either."""
    for wait in LOOK_AGAIN_SECONDS:
        time.sleep(wait)
        with contextlib.suppress(SQLAlchemyError), db.reading() as session:
            # In this order: one that ends between the two is seen.
            if not _is_under_way(session, transaction):
                found = select(Batch.id).where(Batch.id == batch_id)
                return session.scalar(found) is not None
    raise AnswerLost(db.url, batch_id)


def _is_under_way(session: Session, transaction: str) -> bool:
    if not transaction:
        return False
    asked = text("SELECT pg_xact_status(CAST(:id AS xid8))")
    return bool(session.scalar(asked, {"id": transaction}) == "in progress")


class _Room:
    """What the quota leaves, asked before the rest is read, and before images or jobs are stored.

    QuotaExceeded.
    """

    def __init__(self, db: database.Database, options: Options) -> None:
        self._db, self._options = db, options
        self._jobs = 0
        self._left = self._ask(1, is_all=False)

    def add(self, jobs: int) -> None:
        self._jobs += jobs
        if self._jobs > self._left:  # others of the owner's may have begun or ended since
            self._left = self._ask(self._jobs, is_all=False)

    def check(self) -> None:
        """All were added."""
        self._ask(self._jobs, is_all=True)

    def _ask(self, new: int, *, is_all: bool) -> float:
        options, most = self._options, self._options.max_queued
        if most is None:
            return math.inf
        with self._db.reading() as session:
            queued = _queued(session, options.owner)
            if queued + new <= most:
                return most - queued
            if _of_key(session, options.idempotency_key) is not None:
                return math.inf
        raise errors.QuotaExceeded(options.owner, queued=queued, new=new, most=most, is_all=is_all)


def _check_quota(session: Session, owner: str, *, new: int, most: int) -> None:
    """Under a lock on the owner's row, so that two submits at once are counted one by one.

    Once the new jobs are stored: a worker that needs this row to start a job waits for no large
    file.
    """
    session.execute(select(Owner.name).where(Owner.name == owner).with_for_update())
    queued = _queued(session, owner)
    if queued > most:
        raise errors.QuotaExceeded(owner, queued=queued - new, new=new, most=most)


def _queued(session: Session, owner: str) -> int:
    found = session.scalar(
        select(func.sum(Batch.queued)).where(Batch.owner == owner, Batch.finished_at.is_(None))
    )
    return int(found or 0)


def _store_owner(session: Session, name: str) -> None:
    session.execute(database.insert(session, Owner).on_conflict_do_nothing(), [{"name": name}])


def _store_looks(session: Session, known: dict[str, Look]) -> None:
    """Those that are not there yet, in one order for all who do the same at once."""
    rows = [
        {
            "id": look_id,
            "queue": queues.of_model(look.model_path),
            # As short as it can be: what an older worker does not know, and nobody asked for,
            # must not keep it from rendering.
            "body": look.model_dump(mode="json", exclude_defaults=True),
        }
        for look_id, look in sorted(known.items())
    ]
    session.execute(database.insert(session, schema.Look).on_conflict_do_nothing(), rows)


def _kept(order: Order) -> tuple[Any, ...]:
    """What `_jobs` needs of a row."""
    row, look = order.row, order.look
    return (
        row.custom_id,
        look.id,
        row.prompt,
        row.negative_prompt,
        order.image_key,
        row.seed,
        bulk.meta_text(row.metadata),
        row.priority,
        look.model_path,
    )


def _jobs(
    batch_id: str, kept: Iterable[tuple[Any, ...]], options: Options
) -> Iterator[tuple[Any, ...]]:
    """As `bulk.COLUMNS`; seeds and priorities are decided here."""
    position = 0
    queue_of: dict[str, str] = {}
    for custom_id, look_id, prompt, negative, image_key, seed, meta, priority, model_path in kept:
        if model_path not in queue_of:
            queue_of[model_path] = queues.of_model(model_path)
        rank = -(options.priority if priority is None else priority)
        for repetition in range(options.repeat):
            yield (
                batch_id,
                position,
                f"{custom_id}#{repetition + 1}" if repetition and custom_id else custom_id,
                look_id,
                prompt,
                negative,
                image_key,
                # A repetition keeps the prompt's seed, counted on: a drawn one is drawn anew.
                drawn_seed() if seed is None else (seed + repetition) % (looks.MAX_SEED + 1),
                meta,
                rank,
                queue_of[model_path],
            )
            position += 1


def _lora_use(lora: prompt_row.Lora) -> LoraUse:
    """A name is a file in the folder `loras` of the models folder."""
    path = lora.path if lora.path is not None else f"{LORA_FOLDER}/{lora.name}.safetensors"
    try:
        return LoraUse(path=path, strength=lora.strength)
    except ValidationError as error:
        told = "; ".join(text for _, text in looks.messages(error))
        raise ValueError(f"lora {path!r}: {told}") from None
