"""Tokens of the web service: made once, shown once, kept as a hash."""

import hashlib
import ipaddress
import secrets
from collections.abc import Sequence
from datetime import timedelta
from enum import StrEnum

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.orm import Session

from jobs import database, errors, settings
from jobs.schema import ApiToken

PREFIX = "rushes_"  # found by scanners for secrets
SECRET_BYTES = 32
USED_EVERY = timedelta(minutes=1)


class Scope(StrEnum):
    """What a token may do; each is given by name, and ADMIN has all of them."""

    SUBMIT = "submit"
    """Submit, upload, cancel and retry, for its owner."""
    READ = "read"
    """See its owner's batches, and fetch the videos."""
    ADMIN = "admin"
    """Everything, for every owner; schedules too."""


def create(
    session: Session,
    *,
    name: str,
    owner: str,
    scopes: Sequence[Scope],
    days: int | None = None,
) -> tuple[ApiToken, str]:
    """The row, and the token itself, which nobody can ever see again."""
    problems = [
        f"{what} must be {least} to 200 printable characters"
        for what, text, least in (("name", name, 1), ("owner", owner, 0))
        if not least <= len(text) <= 200 or not text.isprintable()
    ]
    if not scopes:
        problems.append(f"scopes: give one or more of {', '.join(Scope)}")
    if problems:
        raise errors.invalid("token", *problems)
    secret = PREFIX + secrets.token_urlsafe(SECRET_BYTES)
    now = database.now(session)
    token = ApiToken(
        id=secrets.token_hex(4),
        name=name,
        owner=owner,
        scopes=sorted({scope.value for scope in scopes}),
        secret_hash=_hash(secret),
        created_at=now,
        expires_at=None if days is None else now + timedelta(days=days),
    )
    session.add(token)
    session.flush()
    return token, secret


def every(session: Session) -> Sequence[ApiToken]:
    return session.scalars(select(ApiToken).order_by(ApiToken.created_at, ApiToken.id)).all()


def are_needed(config: settings.Settings) -> bool:
    """On loopback one person needs none; elsewhere everybody does."""
    return config.web_require_token or not is_loopback(config.web_host)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def none_there(config: settings.Settings) -> str:
    """What is said where they are needed and there is no valid one."""
    if is_loopback(config.web_host):
        return (
            "RUSHES_WEB_REQUIRE_TOKEN is set, and there is no token: make one with "
            "`rushes token create NAME`"
        )
    return (
        f"{config.web_host} is reached by others, and there is no token: make one with "
        "`rushes token create NAME`, or listen on 127.0.0.1"
    )


def any_valid(session: Session) -> bool:
    return session.scalar(select(ApiToken.id).where(*_valid(session)).limit(1)) is not None


def revoke(session: Session, token_id: str) -> bool:
    """False when it was revoked before. NotFound."""
    token = session.get(ApiToken, token_id.replace("\0", ""))
    if token is None:
        raise errors.NotFound(f"no token {token_id!r}: `rushes token list` shows them")
    if token.revoked_at is not None:
        return False
    token.revoked_at = database.now(session)
    return True


def authenticate(session: Session, secret: str) -> ApiToken | None:
    """The token, if it is one of ours and still valid."""
    # A hash without salt is enough: the secret is 256 random bits. And looked up by its hash, how
    # long it takes says nothing about the secret.
    return session.scalar(
        select(ApiToken).where(ApiToken.secret_hash == _hash(secret), *_valid(session))
    )


def is_valid(session: Session, token_id: str) -> bool:
    found = select(ApiToken.id).where(ApiToken.id == token_id, *_valid(session))
    return session.scalar(found) is not None


def note_use(session: Session, token_id: str) -> None:
    """Leave word of the last use, to the minute."""
    token, now = session.get_one(ApiToken, token_id), database.now(session)
    if token.used_at is None or token.used_at < now - USED_EVERY:
        token.used_at = now


def is_due_for_note(token: ApiToken, session: Session) -> bool:
    return token.used_at is None or token.used_at < database.now(session) - USED_EVERY


def _valid(session: Session) -> list[ColumnElement[bool]]:
    now = database.now(session)
    return [
        ApiToken.revoked_at.is_(None),
        or_(ApiToken.expires_at.is_(None), ApiToken.expires_at > now),
    ]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()
