"""Who asks, and what they may do."""

import contextlib
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import Depends, Form, Request, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool

from jobs import errors, tokens
from jobs.tokens import Scope
from jobs.web import bodies, cookies, rates, service

_bearer = HTTPBearer(auto_error=False, description="A token of `rushes token create`.")


class Unauthorized(errors.RushesError):
    """No token, or one that is not valid."""


class Forbidden(errors.RushesError):
    """A valid token that may not do this."""


class StaleForm(Forbidden):
    """A form that was not made for who sends it: of another site, or from before a login."""

    def __init__(self) -> None:
        super().__init__("this form is too old: load the page again, then do it once more")


@dataclass(frozen=True, kw_only=True)
class Principal:
    """Who asks."""

    name: str
    owner: str
    scopes: frozenset[str]
    token_id: str | None = None

    @property
    def is_admin(self) -> bool:
        return Scope.ADMIN in self.scopes

    @property
    def sees(self) -> str | None:
        """The one owner whose things they see; None: everybody's."""
        return None if self.is_admin else self.owner

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or self.is_admin

    @property
    def may_submit(self) -> bool:
        return self.may(Scope.SUBMIT)

    @property
    def may_read(self) -> bool:
        return self.may(Scope.READ)

    def may_see(self, owner: str) -> bool:
        return self.is_admin or owner == self.owner


LOCAL = "this machine"


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class _WhoFirst(APIRoute):
    """Who asks is known before anything of the body is read: FastAPI reads that first."""

    def get_route_handler(self) -> Handler:
        handle = super().get_route_handler()

        async def handler(request: Request) -> Response:
            if request.method in cookies.SAFE_METHODS:
                return await handle(request)
            who = request.state.principal = await self.ask(request)
            turns = service.of(request).large_turns
            with bodies.in_turn(request.receive, owner=who.owner, turns=turns) as receive:
                return await handle(bodies.JsonRequest(request.scope, receive))

        return handler

    async def ask(self, request: Request) -> Principal:
        raise NotImplementedError


class ApiRoute(_WhoFirst):
    """Of an API: by the token in the header."""

    async def ask(self, request: Request) -> Principal:
        return await run_in_threadpool(_by_token, request, await _bearer(request))


class FormRoute(_WhoFirst):
    """Of a page: by the cookie. HEAD works where GET does."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.methods is not None and "GET" in self.methods:
            self.methods.add("HEAD")

    async def ask(self, request: Request) -> Principal:
        return await run_in_threadpool(visitor, request)


def _principal(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
) -> Principal:
    """By the token in the header. A browser's cookie counts for what changes nothing."""
    return known(request) or _by_token(request, credentials)


def known(request: Request) -> Principal | None:
    """Who asks, where that was found out."""
    return getattr(request.state, "principal", None)


def _by_token(request: Request, credentials: HTTPAuthorizationCredentials | None) -> Principal:
    is_safe = request.method in cookies.SAFE_METHODS
    if credentials is None and is_safe:
        return _identified(request, cookies.secret_of(request), may_be_anybody=True)
    secret = None if credentials is None else credentials.credentials
    return _identified(request, secret, may_be_anybody=_is_no_token(credentials))


def _is_own_form(request: Request, csrf: Annotated[str, Form()] = "") -> bool:
    return cookies.is_own_form(request, csrf, secret=cookies.secret_of(request))


IsOwnForm = Annotated[bool, Depends(_is_own_form)]
"""Whether this browser was given the page with this form. If not, nothing may be done for it."""


def check_form(is_own: IsOwnForm) -> None:
    """StaleForm, unless this browser was given the page with this form."""
    if not is_own:
        raise StaleForm


def _form_principal(request: Request, _: Annotated[None, Depends(check_form)]) -> Principal:
    """By the cookie, for a form of one of our pages."""
    return known(request) or visitor(request)


def _identified(request: Request, secret: str | None, *, may_be_anybody: bool) -> Principal:
    serving = service.of(request)
    found = None if secret is None else of_token(serving, secret)
    if found is None and not serving.needs_token and may_be_anybody:
        found = Principal(name=LOCAL, owner=serving.config.owner, scopes=frozenset(Scope))
    if found is None or found.name == LOCAL:
        limit_address(request)
    else:
        _limit(serving, found.name)
    if found is None:
        raise Unauthorized("this needs a valid token: `rushes token create` makes one")
    request.state.principal = found
    return found


def _is_no_token(credentials: HTTPAuthorizationCredentials | None) -> bool:
    """Clients of OpenAI must send some key: on this machine any that is not one of ours will do."""
    return credentials is None or not credentials.credentials.startswith(tokens.PREFIX)


def of_token(serving: service.Service, secret: str) -> Principal | None:
    """Whose token it is, if it is a valid one."""
    with serving.db.reading() as session:
        row = tokens.authenticate(session, secret)
        is_due = row is not None and tokens.is_due_for_note(row, session)
    if row is None:
        return None
    if is_due:
        # Tried once: a database that takes no writes just now may be read all the same.
        with contextlib.suppress(SQLAlchemyError), serving.db.transaction() as session:
            tokens.note_use(session, row.id)
    return Principal(
        name=f"token {row.id}",
        owner=row.owner,
        scopes=frozenset(row.scopes),
        token_id=row.id,
    )


def is_still_valid(serving: service.Service, principal: Principal) -> bool:
    """Whether the token that let them in has neither ended nor been revoked."""
    if principal.token_id is None:
        return True
    with serving.db.reading() as session:
        return tokens.is_valid(session, principal.token_id)


def limit_address(request: Request) -> None:
    """`rates.TooManyRequests`, for who is not known by a token."""
    _limit(service.of(request), request.client.host if request.client else "unknown")


def _limit(serving: service.Service, who: str) -> None:
    if wait := serving.seconds_to_wait(who):
        raise rates.TooManyRequests(rate=serving.config.web_rate, wait_seconds=wait)


def visitor(request: Request) -> Principal:
    """Who looks at a page, by the cookie. Unauthorized."""
    return _identified(request, cookies.secret_of(request), may_be_anybody=True)


Who = Callable[..., Principal]


def _needs(scope: Scope, who: Who = _principal) -> Who:
    def check(principal: Annotated[Principal, Depends(who)]) -> Principal:
        if not principal.may(scope):
            raise Forbidden(f"{principal.name} has no scope {scope.value}")
        return principal

    return check


Reader = Annotated[Principal, Depends(_needs(Scope.READ))]
Submitter = Annotated[Principal, Depends(_needs(Scope.SUBMIT))]
Admin = Annotated[Principal, Depends(_needs(Scope.ADMIN))]

Visitor = Annotated[Principal, Depends(_principal)]
"""Whoever has a valid token, whatever its scopes."""
FormSubmitter = Annotated[Principal, Depends(_needs(Scope.SUBMIT, _form_principal))]
FormAdmin = Annotated[Principal, Depends(_needs(Scope.ADMIN, _form_principal))]
