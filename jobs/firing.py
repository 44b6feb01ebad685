"""Makes the batches of schedules whose time has come: each fire time once, however many do this.

A fire time, its batch and the schedule's next time are written in one transaction, which begins by
locking the schedule and looking whether the fire time is still the next one.
"""

import contextlib
import dataclasses
import io
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta
from pathlib import Path

import structlog
from pydantic import ValidationError
from sqlalchemy import or_, select
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.orm import Session

from jobs import (
    broker,
    database,
    errors,
    inputs,
    looks,
    outbox,
    presets,
    safety,
    schedules,
    settings,
    states,
    storage,
    store_mark,
    stores,
    submission,
    templates,
)
from jobs.schema import Firing, Schedule

log = structlog.get_logger()

BUSY = timedelta(minutes=2)  # a large file with images; longer, and another dispatcher joins in
AGAIN_SECONDS = 30.0  # after the database or the object store failed
MAX_REASON_CHARS = 2_000
MAX_URL_BYTES = 256 << 20
PATIENCE = timedelta(hours=1)  # with what was due in time, such as for servers of images
LATER = (storage.StorageUnavailable, safety.CheckBroken, inputs.ImageAway)
"""Nobody's prompts are to blame: the fire time is tried again."""
OUTAGES = (database.DatabaseUnavailable, storage.StorageDenied, *LATER)


class Overtaken(errors.RushesError):
    """Another batch of the schedule was made in the same moment."""

    def __init__(self, name: str) -> None:
        super().__init__(f"schedule {name!r} fires just now: try again")


class FromLaterVersion(errors.RushesError):
    """A schedule was stored with something that this version does not know."""

    def __init__(self, name: str, what: str) -> None:
        super().__init__(f"schedule {name!r}: {looks.UNREADABLE}: {what}; upgrade this machine")


class Clockwork:
    """Fires what is due. Holds nothing that another one could not go on without."""

    def __init__(
        self,
        config: settings.Settings,
        *,
        db: database.Database,
        clock: Callable[[Session], datetime] = database.now,
    ) -> None:
        self._config = config
        self._db = db
        self._clock = clock
        self._since: datetime | None = None
        """The first tick: servers that were away before it have not been asked yet."""
        self._in_time: dict[int, datetime] = {}
        """Schedule -> its latest fire time that was found due before it was late."""
        self._left_until: dict[int, float] = {}
        """Schedule -> until when (monotonic) it is left to dispatchers that can fire it."""
        submission.prompt_check(config)  # one that cannot be loaded is told now

    def run(self, stop: threading.Event) -> None:
        """Look every `tick_seconds` until told to stop."""
        while not stop.is_set():
            pause = self._config.tick_seconds
            try:
                if self.tick():
                    broker.Broker(self._config).kick()
            except Exception as error:  # one schedule that meets a defect must not end dispatch
                is_defect = not isinstance(error, (DBAPIError, OSError, sqlite3.Error, *OUTAGES))
                log.error("schedule.delayed", error=str(error)[:300], exc_info=is_defect)
                pause = min(AGAIN_SECONDS, 5 * pause)
            stop.wait(pause)

    def tick(self) -> int:
        """Everything that is due now; how many batches were made.

        Raises what kept one of them back, such as one of LATER, after the others.
        """
        made = 0
        delayed: Exception | None = None
        for schedule_id in self._due():
            try:
                while (batch_id := self._fire_next(schedule_id)) is not None:
                    made += batch_id != ""
            except Exception as error:
                delayed = error
        if delayed is not None:
            raise delayed
        return made

    def _due(self) -> list[int]:
        with self._db.reading() as session:
            now = self._clock(session)
            self._since = self._since or now
            found = session.execute(
                select(Schedule.id, Schedule.next_fire_at)
                .where(Schedule.next_fire_at <= now)
                .where(or_(Schedule.busy_until.is_(None), Schedule.busy_until < now))
                .order_by(Schedule.next_fire_at)
            ).all()
        for schedule_id, fire_at in found:
            if fire_at is not None and fire_at >= now - schedules.LATE:
                self._in_time[schedule_id] = fire_at
        left = {each for each, until in self._left_until.items() if until > time.monotonic()}
        return [schedule_id for schedule_id, _ in found if schedule_id not in left]

    def _fire_next(self, schedule_id: int) -> str | None:
        """One fire time: the batch's id, "" for none; None when nothing is due (for us)."""
        with self._db.transaction() as session:
            schedule, now = _locked(session, schedule_id), self._clock(session)
            if schedule is None or schedule.next_fire_at is None or schedule.next_fire_at > now:
                return None
            if schedule.busy_until is not None and schedule.busy_until >= now:
                return None
            is_open = schedules.has_open_batch(session, schedule_id)
            # The schedules before it, or a server that was away, took their time: here, or for
            # another dispatcher, which has left its mark.
            is_taken_up = schedule.busy_until is not None
            is_in_time = (
                is_taken_up or self._in_time.get(schedule_id) == schedule.next_fire_at
            ) and now - schedule.next_fire_at < PATIENCE
            try:
                _preset_of(schedule)
                due = schedules.decide(schedule, now, has_open_batch=is_open, is_in_time=is_in_time)
            except Exception as error:  # such as a zone or a look that this host does not know
                log.error("schedule.delayed", schedule=schedule.name, error=_told(error))
                self._leave(schedule, now, is_in_time=is_in_time)
                return None
            if due.skipped is not None:
                _advance(schedule, due)
                state = states.FiringState.SKIPPED
                _record(session, schedule_id, due.fire_at, state=state, reason=due.skipped)
                log.warning("schedule.skipped", schedule=schedule.name, reason=due.skipped)
                return ""
            schedule.busy_until = now + BUSY
        asked_since = max(due.fire_at, self._since or now)
        return self._make(schedule, due, may_wait=now - asked_since < PATIENCE)

    def _make(self, schedule: Schedule, due: schedules.Due, *, may_wait: bool) -> str | None:
        def record(session: Session, batch_id: str) -> None:
            locked = _locked(session, schedule.id)
            if locked is None or not _is_as_planned(locked, schedule):
                raise Overtaken(schedule.name)
            _advance(locked, due)
            locked.counter += 1
            _record(session, schedule.id, due.fire_at, batch_id=batch_id)

        try:
            with prompt_file(self._config, schedule, due.fire_at, may_wait=may_wait) as file:
                submitted = submission.submit(self._db, file, beside=record)
        except (Overtaken, IntegrityError):
            return None  # this fire time has its row already, or will have it in a moment
        except store_mark.OtherStore:
            with self._db.transaction() as session:
                locked = _locked(session, schedule.id)
                if locked is not None and _is_as_planned(locked, schedule):
                    self._leave(locked, self._clock(session), is_in_time=True)
            raise
        except storage.StorageDenied as error:
            if may_wait:  # for new keys, or rights on the bucket
                raise
            return self._failed(schedule, due, str(error))
        except (DBAPIError, OSError, sqlite3.Error, *OUTAGES):
            raise
        except errors.RushesError as error:
            return self._failed(schedule, due, str(error))
        except Exception as error:  # one that cannot be read must not end the others
            return self._failed(schedule, due, _told(error))
        skipped = len(submitted.plan.skipped)
        log.info(
            "schedule.fired",
            schedule=schedule.name,
            batch_id=submitted.batch_id,
            lines_skipped=skipped,
        )
        return submitted.batch_id

    def _leave(self, schedule: Schedule, now: datetime, *, is_in_time: bool) -> None:
        """To a dispatcher that can fire it: free at once for others, and not looked at here."""
        self._left_until[schedule.id] = time.monotonic() + BUSY.total_seconds()
        # In the past: it was taken up in time, and nobody is at it.
        schedule.busy_until = now - timedelta(seconds=1) if is_in_time else None

    def _failed(self, schedule: Schedule, due: schedules.Due, reason: str) -> str | None:
        reason = database.storable(reason)
        with self._db.transaction() as session:
            locked = _locked(session, schedule.id)
            if locked is None or not _is_as_planned(locked, schedule):
                return None
            _advance(locked, due)
            state = states.FiringState.FAILED
            _record(session, schedule.id, due.fire_at, state=state, reason=reason)
            data = {"schedule": schedule.name, "owner": schedule.owner, "reason": reason}
            data["fire_at"] = due.fire_at.isoformat()
            outbox.tell(session, outbox.SCHEDULE_FAILED, owner=schedule.owner, data=data)
        log.error("schedule.failed", schedule=schedule.name, reason=reason)
        return ""


def add(
    config: settings.Settings, db: database.Database, new: schedules.NewSchedule
) -> tuple[Schedule, submission.Plan]:
    """Store a schedule whose prompts are good for its first firing. InvalidInput otherwise."""
    with db.reading() as session:
        schedule = schedules.draft(new, now=database.now(session))
    first = schedule.next_fire_at or schedule.created_at
    with prompt_file(config, schedule, first) as file:
        checked = submission.plan(file)
    with db.transaction() as session:
        schedules.add(session, schedule)
    return schedule, checked


def fire_now(
    config: settings.Settings, db: database.Database, name: str, *, key: str | None = None
) -> tuple[str, bool]:
    """A batch at once, beside the rule, whatever the policies say and even while paused.

    Its id, and whether it is new: with the `key` of an earlier one it is that one. Overtaken.
    """
    with db.reading() as session:
        schedule, moment = schedules.find(session, name), database.now(session)

    def record(session: Session, batch_id: str) -> None:
        locked = schedules.find(session, name, lock=True)
        if locked.counter != schedule.counter:
            raise Overtaken(name)  # the counter stands in the prompts
        locked.counter += 1
        _record(session, locked.id, moment, batch_id=batch_id, is_manual=True)

    try:
        with prompt_file(config, schedule, moment, key=key) as file:
            made = submission.submit(db, file, beside=record)
    except errors.IdempotencyConflict as conflict:
        return conflict.batch_id, False  # of another minute, which stands in its name
    return made.batch_id, made.is_new


@contextmanager
def prompt_file(
    config: settings.Settings,
    schedule: Schedule,
    moment: datetime,
    *,
    may_wait: bool = False,
    key: str | None = None,
) -> Iterator[submission.PromptFile]:
    """The prompts of the firing at `moment`, with its variables filled in.

    With `may_wait`, `inputs.ImageAway` where the server of an image does not answer, or a store
    refuses our keys.
    """
    rule = schedules.rule_of(schedule)
    wall = moment.astimezone(rule.zone)
    variables = templates.Variables(
        moment=wall,
        counter=schedule.counter + 1,
        schedule=schedule.name,
        lists=schedule.lists,
    )
    preset = _preset_of(schedule)
    # Any dispatcher may come to read them: no images from the files of one machine.
    images = inputs.InputImages(
        config=config, base=None, store=stores.open_store(config), may_wait=may_wait
    )
    with contextlib.closing(images):
        yield submission.PromptFile(
            stream=io.BytesIO(_prompts(config, schedule)),
            source=schedule.prompts_url or f"prompts of schedule {schedule.name}",
            format=schedule.format,  # type: ignore[arg-type]  # it was one when it was stored
            options=submission.Options(
                preset=preset,
                name=f"{schedule.name} {wall:%Y-%m-%d %H:%M}",
                owner=schedule.owner,
                max_queued=config.max_queued_per_owner,
                idempotency_key=key,
                **schedule.options,
            ),
            images=images,
            check=submission.prompt_check(config),
            fill=variables.row,
        )


def _preset_of(schedule: Schedule) -> presets.Preset:
    """FromLaterVersion where its look, or an option beside it, says what we do not know."""
    known = {field.name for field in dataclasses.fields(submission.Options)}
    if unknown := sorted(schedule.options.keys() - known):
        raise FromLaterVersion(schedule.name, ", ".join(unknown))
    try:
        look = looks.Look.model_validate(schedule.look)
    except ValidationError as error:
        raise FromLaterVersion(schedule.name, looks.unreadable(error)) from error
    return presets.Preset(
        name=schedule.preset, path=Path(), description=None, look=look, keys_without_effect=()
    )


def read_url(config: settings.Settings, url: str) -> bytes:
    """A prompt file in a bucket.

    InvalidInput when it can never be read, StorageUnavailable or KeysRefused when it may be later.
    """
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not url.startswith("s3://") or not bucket or not key:
        raise errors.invalid(url, "must be s3://bucket/key")
    store = stores.open_bucket(config, bucket)
    try:
        head = store.head(key)
        if head is None:
            raise errors.invalid(url, "there is no such object")
        if head.size_bytes > MAX_URL_BYTES:
            raise errors.invalid(url, f"is larger than {MAX_URL_BYTES >> 20} MiB")
        return store.read_bytes(key)
    except (storage.StorageUnavailable, storage.KeysRefused):
        raise
    except storage.StorageError as error:
        raise errors.invalid(url, str(error)) from error


def _prompts(config: settings.Settings, schedule: Schedule) -> bytes:
    if schedule.prompts is not None:
        return schedule.prompts.encode()
    assert schedule.prompts_url is not None
    return read_url(config, schedule.prompts_url)


def _record(
    session: Session,
    schedule_id: int,
    fire_at: datetime,
    *,
    state: states.FiringState = states.FiringState.MADE,
    reason: str | None = None,
    batch_id: str | None = None,
    is_manual: bool = False,
) -> None:
    session.add(
        Firing(
            schedule_id=schedule_id,
            fire_at=fire_at,
            state=state,
            reason=None if reason is None else reason[:MAX_REASON_CHARS],
            batch_id=batch_id,
            is_manual=is_manual,
            created_at=database.now(session),
        )
    )
    session.flush()


def _locked(session: Session, schedule_id: int) -> Schedule | None:
    return session.scalar(select(Schedule).where(Schedule.id == schedule_id).with_for_update())


def _advance(schedule: Schedule, due: schedules.Due) -> None:
    schedule.next_fire_at = due.next_fire_at
    schedule.busy_until = None


def _is_as_planned(now: Schedule, planned: Schedule) -> bool:
    return now.next_fire_at == planned.next_fire_at and now.counter == planned.counter


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:MAX_REASON_CHARS]
