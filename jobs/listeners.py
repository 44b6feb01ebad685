"""Who is told of events: by a signed webhook, or by a service that the library apprise knows."""

import base64
import contextlib
import secrets
import urllib.parse
from collections.abc import Sequence
from enum import StrEnum

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from jobs import database, errors, outbox, outside, settings
from jobs.schema import Listener, Notice

SECRET_BYTES = 32  # Standard Webhooks asks for 24 to 64
SECRET_PREFIX = "whsec_"  # noqa: S105  # how every such secret begins
WEBHOOK_SCHEMES = ("https", "http")


class NoticeState(StrEnum):
    """What became of a notice."""

    WAITS = "waits"
    """For its next try."""
    DELIVERED = "delivered"
    GIVEN_UP = "given up"


def is_webhook(url: str) -> bool:
    """Else apprise knows what to do with it: `slack://...`, `mailto://...`."""
    return urllib.parse.urlsplit(url).scheme.lower() in WEBHOOK_SCHEMES


def shown(url: str) -> str:
    """An address without what may be secret in it: scheme and, for webhooks, host."""
    parts = urllib.parse.urlsplit(url)
    return f"{parts.scheme}://{parts.hostname}/..." if is_webhook(url) else f"{parts.scheme}://..."


def internal_hosts(config: settings.Settings) -> frozenset[str]:
    """Hosts of our own network that notices may be sent to."""
    hosts = set()
    for part in settings.listed(config.notify_internal_hosts):
        with contextlib.suppress(outside.Refused):  # no address leads there
            hosts.add(outside.host_of(part))
    return frozenset(hosts)


def check(config: settings.Settings, *, name: str, url: str, events: Sequence[str]) -> None:
    """InvalidInput says what is wrong with a new listener."""
    problems = []
    if not name.isprintable() or not 1 <= len(name) <= 200:
        problems.append("NAME must be 1 to 200 printable characters")
    if unknown := sorted(set(events) - set(outbox.EVENTS)):
        problems.append(f"--event: no {', '.join(unknown)}; there are {', '.join(outbox.EVENTS)}")
    problem = _problem_of_address(config, url)
    if problem:
        problems.append(f"URL {problem}")
    if problems:
        raise errors.invalid("listener", *problems)


def _problem_of_address(config: settings.Settings, url: str) -> str | None:
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return "is not a valid address"
    if not parts.scheme or "://" not in url or not url.isprintable():
        return "must be https://host/path, or an address that apprise knows, such as slack://..."
    if is_webhook(url):
        try:
            place = outside.Place.of(url)
        except outside.Refused as error:
            return str(error)
        if not place.is_encrypted and place.host not in internal_hosts(config):
            return "must be https: http is for hosts in RUSHES_NOTIFY_INTERNAL_HOSTS"
        return None
    try:
        import apprise
    except ImportError:
        return "needs the library apprise: pip install 'rushes[notify]'"
    return None if apprise.Apprise().add(url) else "is none that apprise knows, or incomplete"


def add(
    session: Session, *, name: str, url: str, owner: str | None, events: Sequence[str]
) -> Listener:
    """A new one; webhooks get a secret. InvalidInput when the name is taken."""
    secret = None
    if is_webhook(url):
        secret = SECRET_PREFIX + base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()
    row = Listener(
        name=name,
        url=url,
        secret=secret,
        owner=owner,
        events=list(dict.fromkeys(events)),
        created_at=database.now(session),
    )
    session.add(row)
    try:
        session.flush()
    except IntegrityError:
        raise errors.invalid("listener", f"there is a listener {name!r} already") from None
    return row


def every(session: Session) -> Sequence[Listener]:
    return session.scalars(select(Listener).order_by(Listener.name)).all()


def find(session: Session, name: str) -> Listener:
    row = session.scalar(select(Listener).where(Listener.name == name))
    if row is None:
        raise errors.NotFound(f"no listener {name!r}: `rushes notify list` shows them")
    return row


def remove(session: Session, name: str) -> int:
    """With its notices; how many of them were still to be sent."""
    row = find(session, name)
    mine = Notice.listener_id == row.id
    waiting = select(func.count()).select_from(Notice).where(mine, Notice.next_try_at.is_not(None))
    number = session.scalar(waiting) or 0
    session.execute(delete(Notice).where(mine))
    session.delete(row)
    return number


def notices(
    session: Session, *, limit: int, state: NoticeState | None = None, before: str | None = None
) -> Sequence[tuple[Notice, str]]:
    """The newest ones with the names of their listeners, newest first.

    `before`: the message_id of the last one seen, for the next page. NotFound.
    """
    statement = select(Notice, Listener.name).join(Listener, Listener.id == Notice.listener_id)
    if state is not None:
        statement = statement.where(_is_in(state))
    if before is not None:
        last = session.scalar(select(Notice.id).where(Notice.message_id == before))
        if last is None:
            raise errors.NotFound(
                f"no notice {before!r}: `rushes notify log -o json` shows their ids"
            )
        statement = statement.where(Notice.id < last)
    rows = session.execute(statement.order_by(Notice.id.desc()).limit(limit)).all()
    return [(row[0], row[1]) for row in rows]


def state_of(notice: Notice) -> NoticeState:
    if notice.delivered_at is not None:
        return NoticeState.DELIVERED
    return NoticeState.WAITS if notice.given_up_at is None else NoticeState.GIVEN_UP


def _is_in(state: NoticeState) -> ColumnElement[bool]:
    """The same for the database."""
    if state is NoticeState.DELIVERED:
        return Notice.delivered_at.is_not(None)
    is_given_up = Notice.given_up_at.is_not(None)
    return Notice.delivered_at.is_(None) & (
        is_given_up if state is NoticeState.GIVEN_UP else ~is_given_up
    )
