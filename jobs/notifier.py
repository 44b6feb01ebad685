"""Sends the notices of the outbox. A process of its own: a slow receiver holds up no job.

A try is written down before it is made, with the time of the next one: whoever dies in the middle
of it loses nothing, and any number of notifiers may run.
"""

import threading
from collections import Counter
from collections.abc import Callable, Collection
from concurrent import futures
from dataclasses import dataclass
from datetime import timedelta

import structlog
from sqlalchemy import ColumnElement, Select, func, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from jobs import beat, couriers, database, listeners, settings
from jobs.schema import Listener, Notice

log = structlog.get_logger()

AT_ONCE = 8
PER_LISTENER = 2  # of those: a receiver that hangs leaves the others their share
WAITS_SECONDS = (60, 300, 1_800, 7_200, 18_000, 36_000, 50_400)  # as Standard Webhooks advises
"""After each try but the last; the first is longer than any webhook takes."""
APPRISE_SECONDS = 300  # at least: it may pause between recipients, and has no limit for all
AGAIN_SECONDS = 30.0  # after the database failed
MAX_ERROR_CHARS = 500


@dataclass(frozen=True, kw_only=True)
class Due:
    """A notice whose next try is ours to make."""

    notice_id: int
    listener_id: int
    tries: int
    """With this one."""
    letter: couriers.Letter

    @property
    def is_last(self) -> bool:
        return self.tries > len(WAITS_SECONDS)


class Notifier:
    """Looks for due notices and sends them, several at once."""

    def __init__(
        self,
        config: settings.Settings,
        *,
        db: database.Database,
        courier: couriers.Courier | None = None,
    ) -> None:
        self._config = config
        self._db = db
        hosts = listeners.internal_hosts(config)
        self._courier = courier or couriers.Courier(internal_hosts=hosts)
        self._pool = futures.ThreadPoolExecutor(AT_ONCE, thread_name_prefix="notice")
        self._busy: dict[futures.Future[None], Due] = {}

    def run(self, stop: threading.Event) -> None:
        """Until told to stop; tries that are under way are then waited for."""
        sign = beat.of_notifier(self._config)
        while not stop.is_set():
            sign.touch()
            try:
                began = self.tick()
            except (DBAPIError, database.DatabaseUnavailable) as error:
                log.error("notify.database_unavailable", error=str(error)[:300])
                stop.wait(min(self._config.tick_seconds, AGAIN_SECONDS))
                continue
            if began:  # more may wait: a receiver that is quick gets them at once
                futures.wait(
                    self._busy, self._config.tick_seconds, return_when=futures.FIRST_COMPLETED
                )
            else:
                stop.wait(self._config.tick_seconds)
        self.close()

    def tick(self) -> int:
        """Begin with what is due and has room; how many that were."""
        self._busy = {future: due for future, due in self._busy.items() if not future.done()}
        room = AT_ONCE - len(self._busy)
        if not room:
            return 0
        with self._db.reading() as session:  # mostly in vain, and so without a lock
            if session.scalar(_due(session).limit(1)) is None:
                return 0
        under_way = self._busy.values()
        taken = self._db.write(
            take,
            room=room,
            busy=Counter(due.listener_id for due in under_way),
            but_not=[due.notice_id for due in under_way],
        )
        for due in taken:
            self._busy[self._pool.submit(self._try, due)] = due
        return len(taken)

    def close(self) -> None:
        """Wait for the tries that are under way."""
        self._pool.shutdown(wait=True)

    def wait(self) -> None:
        """For the tries that have begun."""
        futures.wait(self._busy)

    def _try(self, due: Due) -> None:
        facts = {"message_id": due.letter.message_id, "tries": due.tries}
        try:
            self._courier.deliver(due.letter)
        except couriers.NotDelivered as error:
            is_gone = isinstance(error, couriers.Gone)
            log.warning("notice.not_delivered", **facts, error=str(error))
            taken = due.letter.taken
            if isinstance(error, couriers.PartlyDelivered):
                taken = error.taken
            self._note(failed, due, error=str(error), is_gone=is_gone, taken=taken)
        except Exception as error:  # of a library that sends for us: no notice may end the others
            log.error("notice.not_delivered", **facts, error=type(error).__name__)
            name, taken = type(error).__name__, due.letter.taken
            self._note(failed, due, error=name, is_gone=False, taken=taken)
        else:
            log.info("notice.delivered", **facts)
            self._note(delivered, due)

    def _note(self, change: Callable[..., None], due: Due, **values: object) -> None:
        try:
            self._db.write(change, due, **values)
        except DBAPIError as error:
            # It is sent again: receivers know a message by its id.
            log.warning(
                "notice.not_noted", message_id=due.letter.message_id, error=str(error)[:200]
            )


def _due(session: Session) -> Select[Notice]:
    return (
        select(Notice)
        .join(Listener, Listener.id == Notice.listener_id)
        .where(Notice.next_try_at <= database.now(session), Listener.stopped_at.is_(None))
        .order_by(Notice.next_try_at)
    )


def take(
    session: Session, *, room: int, busy: Counter[int], but_not: Collection[int] = ()
) -> list[Due]:
    """The next tries, written down as made. `busy`: tries under way by listener.

    `but_not`: notices whose last try has not ended yet, although the next one is due.
    """
    waiting = _due(session).with_only_columns(Notice.listener_id, func.min(Notice.next_try_at))
    listener_ids = session.execute(
        waiting.order_by(None)
        .group_by(Notice.listener_id)
        .order_by(func.min(Notice.next_try_at), Notice.listener_id)
    )
    rows: list[Notice] = []
    for listener_id, _ in listener_ids.all():  # each its own: a backlog of one holds up no other
        if (hands := min(PER_LISTENER - busy[listener_id], room - len(rows))) > 0:
            some = _due(session).where(Notice.listener_id == listener_id)
            some = some.where(Notice.id.not_in(but_not)).limit(hands)
            rows += session.scalars(some.with_for_update(skip_locked=True, of=Notice))
    now = database.now(session)
    taken: list[Due] = []
    for notice in rows:
        listener = session.get_one(Listener, notice.listener_id)
        # Also after the last one, so that a try that is never heard of again is made again.
        wait = WAITS_SECONDS[min(notice.tries, len(WAITS_SECONDS) - 1)]
        if listener.secret is None:
            wait = max(wait, APPRISE_SECONDS)
        notice.tries += 1
        notice.next_try_at = now + timedelta(seconds=wait)
        letter = couriers.Letter(
            url=listener.url,
            secret=listener.secret,
            message_id=notice.message_id,
            body=notice.body,
            taken=frozenset(notice.taken or ()),
        )
        taken.append(
            Due(
                notice_id=notice.id,
                listener_id=notice.listener_id,
                tries=notice.tries,
                letter=letter,
            )
        )
    return taken


def _is_of(due: Due) -> ColumnElement[bool]:
    # SQLite gives the id of a removed notice again, also while a try of that one is under way.
    return (Notice.id == due.notice_id) & (Notice.message_id == due.letter.message_id)


def delivered(session: Session, due: Due) -> None:
    session.execute(
        update(Notice)
        .where(_is_of(due))
        .values(delivered_at=database.now(session), next_try_at=None, error=None)
    )


def failed(
    session: Session, due: Due, *, error: str, is_gone: bool, taken: Collection[str]
) -> None:
    """Written down; given up after the last try, and all of a listener's when it is gone."""
    now = database.now(session)
    told = {"error": database.storable(error)[:MAX_ERROR_CHARS]}
    given_up = {"next_try_at": None, "given_up_at": now}
    if is_gone:
        if session.scalar(select(Notice.id).where(_is_of(due))) is None:
            return  # removed meanwhile, with its listener
        session.execute(
            update(Listener).where(Listener.id == due.listener_id).values(stopped_at=now)
        )
        session.execute(
            update(Notice)
            .where(Notice.listener_id == due.listener_id, Notice.next_try_at.is_not(None))
            .values(told | given_up)
        )
        return
    session.execute(
        update(Notice)
        .where(_is_of(due))
        .values(told | {"taken": sorted(taken) or None} | (given_up if due.is_last else {}))
    )
