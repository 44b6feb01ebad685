"""The page: logging in with a token, and out."""

from typing import Annotated

from fastapi import APIRouter, Depends, Form, Query, Request
from fastapi.responses import RedirectResponse, Response

from jobs.web import access, cookies, html
from jobs.web.batches import Serving

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
    return html.page(request, "login.html", next=html.own_path(next, otherwise=START), errors={})


@router.post("/login", dependencies=[Depends(access.check_form)])
def log_in(
    request: Request,
    serving: Serving,
    token: Annotated[str, Form(max_length=500)] = "",
    next: Annotated[str, Form()] = START,
) -> Response:
    """Keep the token in a cookie that no script can read."""
    after = html.own_path(next, otherwise=START)
    access.limit_address(request)
    who = access.of_token(serving, token.strip())
    if who is None:
        problem = {"token": ["This is no valid token: it may have ended, or been revoked."]}
        return html.page(request, "login.html", status=401, next=after, errors=problem)
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
