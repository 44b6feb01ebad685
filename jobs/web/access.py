"""Who asks, and what they may do."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from jobs import errors, tokens
from jobs.tokens import Scope
from jobs.web import service

_bearer = HTTPBearer(auto_error=False, description="A token of `rushes token create`.")


class Unauthorized(errors.RushesError):
    """No token, or one that is not valid."""


class Forbidden(errors.RushesError):
    """A valid token that may not do this."""


class TooManyRequests(errors.RushesError):
    """The rate limit."""

    def __init__(self, *, rate: str, wait_seconds: float) -> None:
        self.wait_seconds = wait_seconds
        super().__init__(f"more than {rate}: try again in {wait_seconds:.0f} s")


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who asks."""

    name: str
    owner: str
    scopes: frozenset[str]

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes

    @property
    def sees(self) -> str | None:
        """The one owner whose things they see; None: everybody's."""
        return None if self.is_admin else self.owner

    def may_see(self, owner: str) -> bool:
        return self.is_admin or owner == self.owner


LOCAL = "this machine"


def _principal(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    serving = service.of(request)
    address = request.client.host if request.client else "unknown"
    found = _of_token(serving, credentials) if credentials is not None else None
    if found is None and not serving.needs_token and _is_no_token(credentials):
        found = Principal(name=LOCAL, owner=serving.config.owner, scopes=frozenset(Scope))
    _limit(serving, address if found is None or found.name == LOCAL else found.name)
    if found is None:
        raise Unauthorized("this needs a valid token: `rushes token create` makes one")
    return found


def _is_no_token(credentials: HTTPAuthorizationCredentials | None) -> bool:
    """Clients of OpenAI must send some key: on this machine any that is not one of ours will do."""
    return credentials is None or not credentials.credentials.startswith(tokens.PREFIX)


def _of_token(
    serving: service.Service, credentials: HTTPAuthorizationCredentials
) -> Principal | None:
    with serving.db.reading() as session:
        row = tokens.authenticate(session, credentials.credentials)
        is_due = row is not None and tokens.is_due_for_note(row, session)
    if row is None:
        return None
    if is_due:
        serving.db.write(tokens.note_use, row.id)
    return Principal(name=f"token {row.id}", owner=row.owner, scopes=frozenset(row.scopes))


def _limit(serving: service.Service, who: str) -> None:
    if wait := serving.seconds_to_wait(who):
        raise TooManyRequests(rate=serving.config.web_rate, wait_seconds=wait)


def _needs(scope: Scope) -> Callable[[Principal], Principal]:
    def check(principal: Annotated[Principal, Depends(_principal)]) -> Principal:
        if scope not in principal.scopes and not principal.is_admin:
            raise Forbidden(f"{principal.name} has no scope {scope.value}")
        return principal

    return check


Reader = Annotated[Principal, Depends(_needs(Scope.READ))]
Submitter = Annotated[Principal, Depends(_needs(Scope.SUBMIT))]
Admin = Annotated[Principal, Depends(_needs(Scope.ADMIN))]
