"""The tables.

States of jobs, and with them the counts of their batches, change in `lifecycle` and `orders` and
nowhere else.
"""

from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    ColumnElement,
    DateTime,
    Dialect,
    Enum,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    UniqueConstraint,
    case,
    false,
    text,
)
from sqlalchemy.ext.hybrid import hybrid_property
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from jobs import states

BigId = BigInteger().with_variant(Integer, "sqlite")  # SQLite counts up only INTEGER keys


class UtcDateTime(TypeDecorator[datetime]):
    """Aware UTC in Python on every database."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        assert value is None or value.tzinfo is not None, "naive datetime"
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _enum(kind: type[StrEnum]) -> Enum:
    # Text by value, no database enum type: adding a state needs no change of the table.
    return Enum(
        kind,
        values_callable=lambda members: [member.value for member in members],
        native_enum=False,
        create_constraint=False,
        length=20,
    )


def _index(name: str, *columns: str, where: str) -> Index:
    return Index(name, *columns, sqlite_where=text(where), postgresql_where=text(where))


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {datetime: UtcDateTime, dict[str, Any]: JSON, str: Text}  # noqa: RUF012


class Look(Base):
    """A `looks.Look`, stored once however many jobs share it. Never changed."""

    __tablename__ = "looks"

    id: Mapped[str] = mapped_column(String(16), primary_key=True)
    queue: Mapped[str] = mapped_column(String(200))
    body: Mapped[dict[str, Any]]


class Owner(Base):
    """Who submits. The row is also the lock under which an owner's quota is counted."""

    __tablename__ = "owners"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    served_at: Mapped[datetime | None]
    """When a job of theirs was last sent to a worker."""


class Batch(Base):
    """What one submit made. Its counts change in the transaction that moves a job."""

    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(String(20), primary_key=True)
    name: Mapped[str | None]
    owner: Mapped[str] = mapped_column(String(200), server_default="")
    preset: Mapped[str]
    priority: Mapped[int]
    boost: Mapped[int] = mapped_column(server_default="0", default=0)
    """Added to the priority of each of its jobs: a million jobs are moved by one row."""
    idempotency_key: Mapped[str | None] = mapped_column(String(200), unique=True)
    fingerprint: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(index=True)
    finished_at: Mapped[datetime | None]
    manifest_at: Mapped[datetime | None]
    """When its result files were written; None again when it is reopened."""
    results_lease_until: Mapped[datetime | None]
    """Until then somebody writes its result files."""
    results_expired_at: Mapped[datetime | None]
    """Since then its videos and result files are being deleted, as old; it cannot be reopened."""
    results_removed_at: Mapped[datetime | None]
    """When the last of them was gone."""
    inputs_expired_at: Mapped[datetime | None]
    """Since then the images that it started from may be gone; it cannot be reopened."""
    forgotten_at: Mapped[datetime | None]
    """Since then its rows are being deleted, and nobody is told of it."""
    cancel_requested_at: Mapped[datetime | None]
    paused_at: Mapped[datetime | None]
    deadline_at: Mapped[datetime | None]
    expired_at: Mapped[datetime | None]
    """When its deadline ended it: what was not finished then is cancelled."""
    served_at: Mapped[datetime | None]
    """When a job of it was last sent to a worker."""
    total: Mapped[int]
    queued: Mapped[int]
    running: Mapped[int] = mapped_column(default=0)
    succeeded: Mapped[int] = mapped_column(default=0)
    failed: Mapped[int] = mapped_column(default=0)
    cancelled: Mapped[int] = mapped_column(default=0)

    @hybrid_property
    def state(self) -> states.BatchState:
        """The word for its counts."""
        if self.queued + self.running:
            if self.cancel_requested_at is not None or self.expired_at is not None:
                return states.BatchState.CANCELLING
            if self.paused_at is not None:
                return states.BatchState.PAUSED
            started = self.running or self.queued < self.total
            return states.BatchState.RUNNING if started else states.BatchState.QUEUED
        if self.succeeded == self.total:
            return states.BatchState.SUCCEEDED
        # What a deadline cut off was not given up on request: videos that were wanted are missing.
        if self.cancelled and not self.failed and self.expired_at is None:
            return states.BatchState.CANCELLED
        return states.BatchState.PARTIALLY_FAILED if self.succeeded else states.BatchState.FAILED

    @state.inplace.expression
    @classmethod
    def _state_in_sql(cls) -> ColumnElement[states.BatchState]:
        """The same for the database, to choose by."""
        word = states.BatchState
        is_ending = cls.cancel_requested_at.is_not(None) | cls.expired_at.is_not(None)
        has_started = (cls.running > 0) | (cls.queued < cls.total)
        is_given_up = (cls.cancelled > 0) & (cls.failed == 0) & cls.expired_at.is_(None)
        while_open = case(
            (is_ending, word.CANCELLING.value),
            (cls.paused_at.is_not(None), word.PAUSED.value),
            (has_started, word.RUNNING.value),
            else_=word.QUEUED.value,
        )
        return case(
            (cls.queued + cls.running > 0, while_open),
            (cls.succeeded == cls.total, word.SUCCEEDED.value),
            (is_given_up, word.CANCELLED.value),
            (cls.succeeded > 0, word.PARTIALLY_FAILED.value),
            else_=word.FAILED.value,
        )

    # Neither names a count: those change with every job, and PostgreSQL then leaves indexes alone.
    __table_args__ = (
        _index(
            "ix_batches_unwritten",
            "finished_at",
            where="finished_at IS NOT NULL AND manifest_at IS NULL",
        ),
        _index("ix_batches_unfinished", "owner", "id", where="finished_at IS NULL"),
    )


class Job(Base):
    """One prompt, one seed, one look: one video."""

    __tablename__ = "jobs"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    batch_id: Mapped[str] = mapped_column(ForeignKey("batches.id"))
    position: Mapped[int]
    """Place in the batch, from 0."""
    custom_id: Mapped[str | None] = mapped_column(String(520))
    look_id: Mapped[str] = mapped_column(String(16))
    """Without a foreign key: looks are never deleted, and a check of each row costs. See 0011."""
    prompt: Mapped[str]
    negative_prompt: Mapped[str | None]
    image_key: Mapped[str | None]
    """The first frame, in the results store."""
    seed: Mapped[int] = mapped_column(BigInteger)
    meta: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    rank: Mapped[int]
    """Lower goes first: minus the priority, so that one ascending index holds the order."""
    state: Mapped[states.JobState] = mapped_column(_enum(states.JobState))
    queue: Mapped[str] = mapped_column(String(200))
    """Where its message goes; the same as its look's, so that dispatch reads one table."""
    not_before: Mapped[datetime | None]
    """After a failure it waits a while; until PAUSED_UNTIL: until somebody resumes it."""
    dispatched_at: Mapped[datetime | None]
    cancel_requested: Mapped[bool] = mapped_column(Boolean, default=False)
    attempt_id: Mapped[int | None] = mapped_column(BigInteger)
    """The fence: the attempt that holds the job, later the one whose result counts."""
    error_count: Mapped[int] = mapped_column(default=0)
    crash_count: Mapped[int] = mapped_column(default=0)
    quarantined: Mapped[bool] = mapped_column(Boolean, default=False)
    failure_kind: Mapped[states.FailureKind | None] = mapped_column(_enum(states.FailureKind))
    error: Mapped[str | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    @property
    def is_paused(self) -> bool:
        """By itself; its batch may be paused as well."""
        return self.state is states.JobState.QUEUED and self.not_before == PAUSED_UNTIL

    __table_args__ = (
        UniqueConstraint("batch_id", "custom_id"),
        UniqueConstraint("batch_id", "position"),
        _index("ix_jobs_queued", "batch_id", "queue", "rank", "id", where="state = 'queued'"),
        # These stay empty while a batch is submitted.
        _index("ix_jobs_started", "batch_id", "state", "position", where="state <> 'queued'"),
        _index("ix_jobs_succeeded", "batch_id", "finished_at", where="state = 'succeeded'"),
        _index("ix_jobs_failed", "batch_id", "finished_at", where="state = 'failed'"),
        _index("ix_jobs_look", "look_id", "finished_at", where="state = 'succeeded'"),
        # Which batches start from an image; nothing of it is written for text to video.
        _index("ix_jobs_image", "image_key", "batch_id", where="image_key IS NOT NULL"),
        {"sqlite_autoincrement": True},
    )


PAUSED_UNTIL = datetime(9999, 1, 1, tzinfo=UTC)
HAS_STARTED = Job.state != states.JobState.QUEUED
"""Said beside another state: by this SQLite finds the index of those that have left the queue."""


INPUT_KEY_CHARACTERS = 200


class Input(Base):
    """Who is at work on an object below `inputs/`: those who submit it, or who deletes it as old.

    Many submits may start from one image, so neither its age nor the jobs that are stored already
    say whether it is wanted.
    """

    __tablename__ = "inputs"

    key: Mapped[str] = mapped_column(String(INPUT_KEY_CHARACTERS), primary_key=True)
    held_at: Mapped[datetime | None]
    """When a submit last said that it will need it."""
    condemned_until: Mapped[datetime | None]
    """Until then it may be deleted at any moment, and no submit may rely on it."""


class Attempt(Base):
    """One try at a job. Its id is the fencing token: it only grows and is never used again.

    Its upper bits are the time of the claim and not a count, because a database that is restored
    from a backup gives its numbers again, while videos of the lost rows wait on some disk.
    """

    __tablename__ = "attempts"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    job_id: Mapped[int] = mapped_column(ForeignKey("jobs.id"), index=True)
    number: Mapped[int]
    state: Mapped[states.AttemptState] = mapped_column(_enum(states.AttemptState))
    worker: Mapped[str] = mapped_column(String(200))
    started_at: Mapped[datetime]
    lease_until: Mapped[datetime]
    heartbeat_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    stage: Mapped[str | None] = mapped_column(String(20))
    step: Mapped[int] = mapped_column(default=0)
    """Finished parts of `stage`, of `steps`."""
    steps: Mapped[int] = mapped_column(default=0)
    note: Mapped[str | None]
    """What it waits for, in words."""
    failure_kind: Mapped[states.FailureKind | None] = mapped_column(_enum(states.FailureKind))
    error: Mapped[str | None]
    error_detail: Mapped[str | None]
    seconds: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    """Stage name -> seconds."""
    peak_memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    memory: Mapped[str | None]
    """How the weights were placed, and why not as asked for."""
    video_key: Mapped[str | None]
    video_bytes: Mapped[int | None] = mapped_column(BigInteger)
    video_sha256: Mapped[str | None] = mapped_column(String(64))

    __table_args__ = (
        # A few rows, so that any order of them will do. It names nothing that a heartbeat changes:
        # PostgreSQL then writes the row alone.
        _index("ix_attempts_live", "worker", where="state IN ('running', 'rendered')"),
        {"sqlite_autoincrement": True},
    )


IS_LIVE = text("attempts.state IN ('running', 'rendered')")
"""Of attempts. Written out: of a state that is bound SQLite does not see that the index has it."""


class Worker(Base):
    """A render process as its launcher last saw it; alive while `heartbeat_at` is fresh."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(String(200), primary_key=True)
    """`gpu0@host`"""
    host: Mapped[str] = mapped_column(String(200))
    device: Mapped[str]
    memory_bytes: Mapped[int | None] = mapped_column(BigInteger)
    queues: Mapped[list[str]] = mapped_column(JSON)
    version: Mapped[str] = mapped_column(String(50))
    pid: Mapped[int]
    started_at: Mapped[datetime]
    heartbeat_at: Mapped[datetime]
    stopped_at: Mapped[datetime | None]
    restarts: Mapped[int] = mapped_column(default=0)
    launcher: Mapped[str | None]
    """Who holds the name: two launchers of one name would end each other's attempts."""
    renders: Mapped[int] = mapped_column(default=0, server_default="0")
    """Attempts since the process began; the two below count since then too."""
    loads: Mapped[int] = mapped_column(default=0, server_default="0")
    lora_switches: Mapped[int] = mapped_column(default=0, server_default="0")
    resident: Mapped[list[dict[str, Any]] | None] = mapped_column(JSON(none_as_null=True))
    """A `reports.Resident` for each loaded model, the one used last at the end."""
    device_used_bytes: Mapped[int | None] = mapped_column(BigInteger)
    host_used_bytes: Mapped[int | None] = mapped_column(BigInteger)
    """Main memory that its process holds."""
    suspects: Mapped[list[int] | None] = mapped_column(JSON(none_as_null=True))
    """Ids of different jobs that failed here in a row, as on a broken machine. See `health`."""
    removals: Mapped[int] = mapped_column(default=0, server_default="0")
    """Times that it was taken out since a job went well."""
    tested_at: Mapped[datetime | None]
    test_failure: Mapped[str | None]
    """What its last self-test found wrong; None: nothing."""


class Refusal(Base):
    """What a worker takes no jobs of for a while, because its host failed and not the job."""

    __tablename__ = "refusals"

    worker: Mapped[str] = mapped_column(String(200), primary_key=True)
    queue: Mapped[str] = mapped_column(String(200), primary_key=True)
    """Empty: of every queue."""
    needs_test: Mapped[bool] = mapped_column(Boolean, default=False, server_default=false())
    """It holds until a self-test has passed; `until` is when the next one may begin."""
    kind: Mapped[states.FailureKind] = mapped_column(_enum(states.FailureKind))
    reason: Mapped[str]
    times: Mapped[int]
    """In a row: the wait grows with them."""
    since: Mapped[datetime]
    until: Mapped[datetime]


class Schedule(Base):
    """A cron rule that submits a batch at each of its fire times. See `schedules`."""

    __tablename__ = "schedules"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    owner: Mapped[str] = mapped_column(String(200), server_default="", default="")
    cron: Mapped[str] = mapped_column(String(200))
    zone: Mapped[str] = mapped_column(String(100))
    misfire: Mapped[states.Misfire] = mapped_column(_enum(states.Misfire))
    catch_up: Mapped[int] = mapped_column(default=1)
    """Missed firings that are made up for, with `Misfire.CATCH_UP`."""
    overlap: Mapped[states.Overlap] = mapped_column(_enum(states.Overlap))
    prompts: Mapped[str | None]
    """The prompt file itself, as it was when the schedule was added; or None, and"""
    prompts_url: Mapped[str | None]
    """where it lies, to be read at each firing."""
    format: Mapped[str] = mapped_column(String(10))
    lists: Mapped[dict[str, Any]]
    """Name -> items: variables that take the next item at each firing."""
    preset: Mapped[str]
    look: Mapped[dict[str, Any]]
    """The preset's look when the schedule was added."""
    options: Mapped[dict[str, Any]]
    """Of `submission.Options`: priority and so on."""
    created_at: Mapped[datetime]
    paused_at: Mapped[datetime | None]
    next_fire_at: Mapped[datetime | None] = mapped_column(index=True)
    """None while it is paused, and when no time is left."""
    busy_until: Mapped[datetime | None]
    """Until then a dispatcher is at it; a courtesy, which nothing relies on."""
    counter: Mapped[int] = mapped_column(default=0)
    """Batches made."""


class Firing(Base):
    """What became of one fire time of a schedule. Written with its batch, in one transaction."""

    __tablename__ = "firings"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    schedule_id: Mapped[int] = mapped_column(ForeignKey("schedules.id"))
    fire_at: Mapped[datetime]
    state: Mapped[states.FiringState] = mapped_column(_enum(states.FiringState))
    is_manual: Mapped[bool] = mapped_column(Boolean, default=False)
    created_at: Mapped[datetime]
    batch_id: Mapped[str | None] = mapped_column(ForeignKey("batches.id"), index=True)
    reason: Mapped[str | None]
    """Why there is no batch."""

    __table_args__ = (UniqueConstraint("schedule_id", "fire_at"),)


class ApiToken(Base):
    """What a program shows to the web service. The token itself is nowhere: only its hash."""

    __tablename__ = "api_tokens"

    id: Mapped[str] = mapped_column(String(20), primary_key=True)
    name: Mapped[str] = mapped_column(String(200))
    owner: Mapped[str] = mapped_column(String(200))
    scopes: Mapped[list[str]] = mapped_column(JSON)
    secret_hash: Mapped[str] = mapped_column(String(64), unique=True)
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    used_at: Mapped[datetime | None]
    """To the minute."""


class StoredFile(Base):
    """A file that somebody uploaded: a prompt file or an image. Its bytes lie in the store."""

    __tablename__ = "files"

    id: Mapped[str] = mapped_column(String(40), primary_key=True)
    owner: Mapped[str] = mapped_column(String(200))
    purpose: Mapped[str] = mapped_column(String(40))
    name: Mapped[str]
    key: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(index=True)


class ApiRequest(Base):
    """What one of the compatible APIs calls a batch: its id there, and what was asked for."""

    __tablename__ = "api_requests"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    api: Mapped[str] = mapped_column(String(20))
    owner: Mapped[str] = mapped_column(String(200))
    name: Mapped[str] = mapped_column(String(200))
    """Unique for an owner of one API; some clients choose it themselves."""
    batch_id: Mapped[str | None] = mapped_column(ForeignKey("batches.id"), index=True)
    """None: it was refused, and `body` says why."""
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    deleted_at: Mapped[datetime | None]

    __table_args__ = (
        UniqueConstraint("api", "owner", "name"),
        {"sqlite_autoincrement": True},
    )


class Listener(Base):
    """Somebody who is told of events."""

    __tablename__ = "listeners"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    name: Mapped[str] = mapped_column(String(200), unique=True)
    url: Mapped[str]
    """May hold a password: never shown or logged as it is."""
    secret: Mapped[str | None] = mapped_column(String(100))
    """Signs its webhooks. None: it is told through apprise."""
    owner: Mapped[str | None] = mapped_column(String(200))
    """Whose events; None: everybody's."""
    events: Mapped[list[str]] = mapped_column(JSON)
    created_at: Mapped[datetime]
    stopped_at: Mapped[datetime | None]
    """When its receiver said that it wants no more."""


class Notice(Base):
    """An event for one listener, written with what it tells of. See `outbox`."""

    __tablename__ = "notices"

    id: Mapped[int] = mapped_column(BigId, primary_key=True)
    message_id: Mapped[str] = mapped_column(String(40))
    """The same in every try: by it a receiver knows a repeated one."""
    listener_id: Mapped[int] = mapped_column(ForeignKey("listeners.id"), index=True)
    event: Mapped[str] = mapped_column(String(40))
    body: Mapped[dict[str, Any]]
    created_at: Mapped[datetime]
    next_try_at: Mapped[datetime | None]
    """None: delivered, or given up."""
    tries: Mapped[int] = mapped_column(default=0)
    delivered_at: Mapped[datetime | None]
    given_up_at: Mapped[datetime | None]
    error: Mapped[str | None]
    """What became of the last try that failed."""
    taken: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    """Recipients of the address that need no further try, as the courier names them."""

    __table_args__ = (_index("ix_notices_due", "next_try_at", where="next_try_at IS NOT NULL"),)


class PastTotal(Base):
    """A sum over attempts or firings that were deleted as old. See `totals`."""

    __tablename__ = "past_totals"

    state: Mapped[str] = mapped_column(String(20), primary_key=True)
    kind: Mapped[str] = mapped_column(String(20), primary_key=True)
    """Of failure; empty: there was none."""
    name: Mapped[str] = mapped_column(String(40), primary_key=True)
    """What was added up."""
    value: Mapped[int] = mapped_column(BigInteger)


class StoreMark(Base):
    """The one row: by which object the farm knows its store again. See `store_mark`."""

    __tablename__ = "store_marks"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    name: Mapped[str] = mapped_column(String(40))
    url: Mapped[str]
    """As the process that made it calls the store; for people."""
