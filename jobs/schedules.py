"""Schedules: cron rules that submit a batch at each fire time. What is due is made by `firing`."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sqlalchemy import delete, select, true
from sqlalchemy.orm import Session

from jobs import (
    cron,
    database,
    errors,
    one_line,
    presets,
    readers,
    states,
    submission,
    templates,
    totals,
)
from jobs.schema import Batch, Firing, Schedule

LATE = timedelta(minutes=5)
"""A fire time older than this was missed: a restart of the dispatcher misses none."""
MAX_CATCH_UP = 100
MAX_PROMPT_BYTES = 4 << 20  # the file is kept in a row
MAX_HISTORY = 1_000


@dataclass(frozen=True, kw_only=True)
class NewSchedule:
    """What `rushes schedule add` was asked for. Exactly one of `prompts` and `prompts_url`."""

    name: str
    cron: str
    zone: str
    preset: presets.Preset
    format: readers.Format
    prompts: str | None = None
    prompts_url: str | None = None
    misfire: states.Misfire = states.Misfire.RUN_ONCE
    catch_up: int = 1
    overlap: states.Overlap = states.Overlap.QUEUE
    lists: Mapping[str, Sequence[str]] = field(default_factory=dict)
    priority: int = 0
    repeat: int = 1
    skip_invalid: bool = False
    owner: str = ""


@dataclass(frozen=True, kw_only=True)
class Due:
    """What is to be done now about a schedule whose time has come."""

    fire_at: datetime
    next_fire_at: datetime | None
    skipped: str | None = None
    """The policy that says that no batch is made; None: make it."""


def draft(new: NewSchedule, *, now: datetime) -> Schedule:
    """A row that is not stored yet. InvalidInput; its prompts are the caller's to check."""
    rule = check(new)
    return Schedule(
        name=new.name,
        owner=new.owner,
        cron=rule.expression,
        zone=rule.zone.key,
        misfire=new.misfire,
        catch_up=new.catch_up,
        overlap=new.overlap,
        prompts=new.prompts,
        prompts_url=new.prompts_url,
        format=new.format,
        lists={name: list(items) for name, items in new.lists.items()},
        preset=new.preset.name,
        look=new.preset.look.model_dump(mode="json", exclude_defaults=True),
        options={
            "priority": new.priority,
            "repeat": new.repeat,
            "skip_invalid": new.skip_invalid,
        },
        created_at=now,
        next_fire_at=rule.next(now),
        counter=0,
    )


def add(session: Session, schedule: Schedule) -> None:
    """InvalidInput when there is one of this name."""
    if session.scalar(select(Schedule.id).where(Schedule.name == schedule.name)) is not None:
        raise _invalid(
            schedule.name, "there is a schedule of this name: remove it, or take another"
        )
    session.add(schedule)
    session.flush()


def check(new: NewSchedule) -> cron.Rule:
    """InvalidInput with everything that is wrong beside the prompts."""
    problems = []
    if not 1 <= len(new.name) <= 150 or not one_line.is_named(new.name) or "/" in new.name:
        problems.append("a name must be 1 to 150 characters on one line without /")
    elif one_line.is_blank(new.name):
        problems.append("a name must have a character that can be seen")
    if new.name in (".", ".."):
        problems.append(f"a name must not be {new.name}: browsers take it for a folder")
    if not 1 <= new.catch_up <= MAX_CATCH_UP:
        problems.append(f"catch_up must be 1 to {MAX_CATCH_UP}, got {new.catch_up}")
    if len((new.prompts or "").encode()) > MAX_PROMPT_BYTES:
        problems.append(
            f"the prompt file is larger than {MAX_PROMPT_BYTES >> 20} MiB: put it into a bucket, "
            "and give s3://bucket/key"
        )
    try:
        rule = cron.parse(new.cron, new.zone)
    except ValueError as error:
        problems.append(str(error))
    if problems:
        raise _invalid(new.name[:150], *problems)
    templates.check_lists(new.lists)
    submission.check_options(
        submission.Options(
            preset=new.preset, priority=new.priority, repeat=new.repeat, owner=new.owner
        )
    )
    return rule


def _invalid(name: str, *problems: str) -> errors.InvalidInput:
    return errors.invalid(f"schedule {name!r}", *problems)


def rule_of(schedule: Schedule) -> cron.Rule:
    return cron.parse(schedule.cron, schedule.zone)


def find(session: Session, name: str, *, lock: bool = False, owner: str | None = None) -> Schedule:
    """NotFound names a similar one. With `owner`, those of others are not there."""
    is_visible = Schedule.owner == owner if owner is not None else true()
    statement = select(Schedule).where(Schedule.name == name.replace("\0", ""), is_visible)
    schedule = session.scalar(statement.with_for_update() if lock else statement)
    if schedule is None:
        names = session.scalars(select(Schedule.name).where(is_visible)).all()
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean {close[0]!r}?" if close else "`rushes schedule list` shows them"
        raise errors.NotFound(f"no schedule {name!r}: {hint}")
    return schedule


def every(session: Session) -> Sequence[Schedule]:
    return session.scalars(select(Schedule).order_by(Schedule.name)).all()


def coming(session: Session, schedule: Schedule, count: int) -> list[datetime]:
    """The next fire times, in UTC; none while it is paused."""
    if schedule.paused_at is not None or schedule.next_fire_at is None:
        return []
    times = [schedule.next_fire_at]
    for moment in rule_of(schedule).after(max(schedule.next_fire_at, database.now(session))):
        if len(times) == count:
            break
        times.append(moment)
    return times


def pause(session: Session, name: str) -> bool:
    """False when it was paused already."""
    schedule = find(session, name, lock=True)
    if schedule.paused_at is not None:
        return False
    schedule.paused_at = database.now(session)
    schedule.next_fire_at = schedule.busy_until = None
    return True


def resume(session: Session, name: str) -> bool:
    """From now on: what fell into the pause is not made up for. False when it was not paused."""
    schedule = find(session, name, lock=True)
    if schedule.paused_at is None:
        return False
    schedule.paused_at = None
    schedule.next_fire_at = rule_of(schedule).next(database.now(session))
    return True


def remove(session: Session, name: str) -> None:
    """With its history; its batches stay."""
    schedule = find(session, name, lock=True)
    history = delete(Firing).where(Firing.schedule_id == schedule.id)
    ended = session.scalars(history.returning(Firing.state)).all()
    totals.keep(session, totals.of_firings(ended))
    session.delete(schedule)


def history(
    session: Session, schedule_id: int, *, limit: int = 20
) -> list[tuple[Firing, Batch | None]]:
    """Newest first, each with its batch."""
    rows = session.execute(
        select(Firing, Batch)
        .outerjoin(Batch, Batch.id == Firing.batch_id)
        .where(Firing.schedule_id == schedule_id)
        .order_by(Firing.fire_at.desc())
        .limit(limit)
    ).all()
    return [(row[0], row[1]) for row in rows]


def has_open_batch(session: Session, schedule_id: int) -> bool:
    return (
        session.scalar(
            select(Batch.id)
            .join(Firing, Firing.batch_id == Batch.id)
            .where(Firing.schedule_id == schedule_id, Batch.finished_at.is_(None))
            .limit(1)
        )
        is not None
    )


def decide(
    schedule: Schedule, now: datetime, *, has_open_batch: bool, is_in_time: bool = False
) -> Due:
    """The policies, for a schedule whose `next_fire_at` has come.

    `is_in_time`: it was taken up in time, and is not missed however long that takes.
    """
    assert schedule.next_fire_at is not None
    assert schedule.next_fire_at <= now
    rule, fire_at = rule_of(schedule), schedule.next_fire_at
    if fire_at < now - LATE and not is_in_time:
        kept = _made_up_for(schedule, rule, now)
        if not kept or kept[0] > fire_at:
            last = rule.latest(1, since=fire_at, until=_before(kept[0] if kept else now - LATE))
            # Of a zone whose rules have changed since, the rule may not have this time any more.
            missed = last[-1] if last else fire_at
            return Due(
                fire_at=missed,
                next_fire_at=kept[0] if kept else rule.next(missed),
                skipped=_missed(schedule, rule, fire_at, missed),
            )
    skipped = None
    if has_open_batch and schedule.overlap is states.Overlap.SKIP:
        skipped = "overlap policy skip: an earlier batch is not finished"
    return Due(fire_at=fire_at, next_fire_at=rule.next(fire_at), skipped=skipped)


def _made_up_for(schedule: Schedule, rule: cron.Rule, now: datetime) -> list[datetime]:
    """The missed fire times that get a batch all the same, in order."""
    if schedule.misfire is states.Misfire.SKIP:
        return []
    count = 1 if schedule.misfire is states.Misfire.RUN_ONCE else schedule.catch_up
    assert schedule.next_fire_at is not None
    return rule.latest(count, since=schedule.next_fire_at, until=_before(now - LATE))


def _before(moment: datetime) -> datetime:
    return moment - timedelta(microseconds=1)


def _missed(schedule: Schedule, rule: cron.Rule, first: datetime, last: datetime) -> str:
    policy = schedule.misfire + (f" {schedule.catch_up}" if schedule.misfire == "catch_up" else "")
    shown = [moment.astimezone(rule.zone).strftime("%Y-%m-%d %H:%M") for moment in (first, last)]
    span = shown[0] if first == last else f"{shown[0]} to {shown[1]}"
    return f"misfire policy {policy}: no batch could be made in time, {span}"
