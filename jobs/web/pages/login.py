"""The page: logging in with a token, and out."""

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from jobs.web import access, cookies, html
from jobs.web.batches import Serving
from jobs.web.pages import complaints

router = APIRouter(include_in_schema=False)

START = "/batches"
SUBMIT = "/submit"  # all that there is for who may not read


@router.head("/")
@router.get("/")
def start(who: access.Visitor) -> RedirectResponse:
    return RedirectResponse(START if who.may_read else SUBMIT, 303)


@router.head("/login")
@router.get("/login")
def ask(request: Request, next: Annotated[str, Query()] = START) -> Response:
    return _form(request, after=html.own_path(next, otherwise=START), found={})


def _form(
    request: Request, *, after: str, found: dict[str, list[str]], status: int = 200
) -> Response:
    return html.page(request, "login.html", status=status, is_login=True, next=after, errors=found)


@router.post("/login")
def log_in(
    request: Request,
    serving: Serving,
    token: Annotated[str, Form(max_length=500)] = "",
    next: Annotated[str, Form()] = START,
    csrf: Annotated[str, Form()] = "",
) -> Response:
    """Keep the token in a cookie that no script can read."""
    after = html.own_path(next, otherwise=START)
    access.limit_address(request)
    if not cookies.is_own_form(request, csrf, secret=None):
        return _form(request, after=after, found={"": [complaints.STALE]}, status=403)
    who = access.of_token(serving, token.strip())
    if who is None:
        problem = {"token": ["This is no valid token: it may have ended, or been revoked."]}
        return _form(request, after=after, found=problem, status=401)
    if not who.may_read and not after.startswith(SUBMIT):
        after = SUBMIT
    response = html.go(after, did="login")
    cookies.log_in(request, response, token.strip())
    return response


@router.post("/logout", dependencies=[Depends(access.check_form)])
def log_out() -> Response:
    response = html.go("/login", did="logout")
    cookies.log_out(response)
    return response
