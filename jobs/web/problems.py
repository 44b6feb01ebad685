"""Errors, each API in its own form: problem+json (RFC 9457), OpenAI's, LightX2V's; or a page."""

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any
from urllib.parse import quote

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFree
from starlette.exceptions import HTTPException

from jobs import database, errors, firing, presets, requests, safety, storage, submission
from jobs.web import access, cookies, html, rates

log = structlog.get_logger()

MAX_PROBLEMS = 1_000  # told of one request
AGAIN_SECONDS = 5
NO_JSON = "body: must be JSON, sent with Content-Type: application/json"
PROBLEM_JSON = "application/problem+json"
LIGHTX2V_PATHS = ("/v1/tasks", "/v1/service")
API_PATHS = ("/api", "/v1", "/openapi.json", "/healthz", "/readyz", "/metrics", "/gradio")
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "invalid_request_error",
    409: "invalid_request_error",
    429: "rate_limit_error",
}
"""OpenAI's words for our statuses."""
FORMS = ("/submit", "/schedules")  # pages that are asked for where they are sent to
AWAY = (safety.CheckBroken, storage.StorageUnavailable, presets.FolderMissing)
"""Nobody who asks is to blame; they are asked before anything is stored."""
OUTAGES = (*AWAY, database.DatabaseUnavailable, DBAPIError, NoConnectionFree)
GONE = {"X-Rushes": "gone"}
"""Tells a 404 of ours from one that a proxy gives while we are away."""


def install(app: FastAPI) -> None:
    app.add_exception_handler(errors.RushesError, _on_our_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_request)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(DBAPIError, _on_database_error)
    app.add_exception_handler(NoConnectionFree, _on_database_error)
    app.add_exception_handler(Exception, _on_defect)


def answer(
    request: Request,
    status: int,
    detail: str,
    *,
    headers: Mapping[str, str] | None = None,
    **more: Any,
) -> Response:
    """The error in the form of the API that was asked; a page for those who look at pages."""
    detail = database.storable(detail)  # a name in a form may hold what no answer can
    for problem in more.get("problems", ()):
        problem["message"] = database.storable(problem["message"])
    if status == 404:
        headers = {**(headers or {}), **GONE}
    path = request.url.path
    if not path.startswith(API_PATHS) and "text/html" in request.headers.get("accept", ""):
        return _page(request, status, detail, headers, more)
    if path.startswith(LIGHTX2V_PATHS):
        return JSONResponse({"detail": _with_lines(detail, more)}, status, headers)
    if path.startswith("/v1/"):
        return _openai(status, detail, headers, more)
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status}
    return JSONResponse(body | {"detail": detail} | more, status, headers, media_type=PROBLEM_JSON)


def _page(
    request: Request,
    status: int,
    detail: str,
    headers: Mapping[str, str] | None,
    more: Mapping[str, Any],
) -> Response:
    if status == 401:
        is_look = request.method in ("GET", "HEAD")
        has_ended = not is_look or cookies.secret_of(request) is not None
        did = "ended" if has_ended else None
        login = html.address("/login", next=_following(request), did=did)
        if "hx-request" in request.headers:
            return Response(status_code=401, headers={"HX-Redirect": login})
        return RedirectResponse(login, 303)
    lines = [problem["message"] for problem in more.get("problems", ())]
    title = HTTPStatus(status).phrase
    shown = html.page(
        request,
        "error.html",
        who=access.known(request),
        status=status,
        title=title,
        detail=detail,
        lines=lines[:20],
    )
    shown.headers.update(headers or {})
    return shown


def _following(request: Request) -> str | None:
    """Where a login leads: to the page that was asked for, or to the form that was sent."""
    path = request.scope["path"]
    if request.method not in ("GET", "HEAD"):
        return path if path in FORMS else None
    if path == "/":
        return None
    query = request.scope["query_string"].decode("latin-1")
    return quote(path) + (f"?{query}" if query else "")


def _openai(
    status: int, detail: str, headers: Mapping[str, str] | None, more: Mapping[str, Any]
) -> JSONResponse:
    status = 400 if status == 422 else status
    error = {
        "message": _with_lines(detail, more),
        "type": TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error"),
        "param": more.get("param"),
        "code": more.get("code"),
    }
    return JSONResponse({"error": error}, status, headers)


def _with_lines(detail: str, more: Mapping[str, Any]) -> str:
    """For forms without a list of problems: the first of them, where `detail` is not the one."""
    lines = [problem["message"] for problem in more.get("problems", ())]
    return "; ".join([detail, *lines[:5]]) if len(lines) > 1 else detail


def status_of(error: errors.RushesError) -> int:
    """One status per class; the more special class goes first."""
    for kind, status in _STATUSES:
        if isinstance(error, kind):
            return status
    return 500


_STATUSES: tuple[tuple[type[errors.RushesError], int], ...] = (
    (access.Unauthorized, 401),
    (access.Forbidden, 403),
    (rates.TooManyRequests, 429),
    (errors.InvalidInput, 422),
    (errors.PresetError, 422),
    (presets.FolderMissing, 503),
    (errors.NotFound, 404),
    (errors.IdempotencyConflict, 409),
    (errors.BatchExpired, 410),
    (requests.NameTaken, 409),
    (firing.Overtaken, 409),
    (errors.QuotaExceeded, 429),
    (storage.ObjectMissing, 404),
    (storage.StorageUnavailable, 503),
    (storage.StorageError, 502),
    (database.DatabaseUnavailable, 503),
    (safety.CheckBroken, 503),
)


def outage(error: Exception, *, path: str) -> str:
    """What is told of one of OUTAGES. The log has the rest: addresses are our own business."""
    if isinstance(error, storage.StorageError):
        log.error("web.storage_failed", path=path, error=str(error))
        return "the store does not answer"
    if isinstance(error, safety.CheckBroken):
        log.error("web.check_broken", path=path, error=str(error))
        return "the safety check does not answer"
    if isinstance(error, presets.FolderMissing):
        log.error("web.presets_missing", path=path, error=str(error))
        return "the presets cannot be read"
    if not isinstance(error, database.DatabaseUnavailable):
        log.error("web.database_failed", path=path, error=str(error)[:300])
    return "the database does not answer"


async def _on_our_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, errors.RushesError)
    status = status_of(error)
    headers = {}
    more: dict[str, Any] = {}
    if isinstance(error, access.Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    if isinstance(error, rates.TooManyRequests):
        headers["Retry-After"] = str(math.ceil(error.wait_seconds))
    elif isinstance(error, submission.AnswerLost):
        headers["X-Should-Retry"] = "false"  # OpenAI's clients would, and make a second batch
    elif status == 503:
        headers["Retry-After"] = str(AGAIN_SECONDS)
    detail = str(error)
    if isinstance(error, errors.InvalidInput):
        more["problems"] = [
            {"line": problem.line, "message": problem.message}
            for problem in error.problems[:MAX_PROBLEMS]
        ]
        detail = f"{error.source}: {len(error.problems)} problems, nothing was stored"
        if len(error.problems) == 1:
            detail = f"{error.source}: {error.problems[0]}"
    if isinstance(error, (storage.StorageError, *OUTAGES)):
        detail = outage(error, path=request.url.path)
    if isinstance(error, storage.ObjectMissing):
        detail = "the file is not there any more"
    if isinstance(error, submission.AnswerLost):
        more["batch_id"] = error.batch_id
        detail = f"the database went away before it said whether batch {error.batch_id} is stored"
    return answer(request, status, detail, headers=headers, **more)


async def _on_invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problems = [
        {"line": None, "message": f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}"}
        for e in error.errors()[:MAX_PROBLEMS]
    ]
    if any(e["loc"] == ("body",) for e in error.errors()) and not _is_json(request):
        problems = [{"line": None, "message": NO_JSON}]
    status = 400 if any(e["type"] == "json_invalid" for e in error.errors()) else 422
    detail = "the request cannot be read"
    if len(problems) == 1:
        detail += f": {problems[0]['message']}"
    return answer(request, status, detail, problems=problems)


def _is_json(request: Request) -> bool:
    return "json" in request.headers.get("content-type", "").lower()


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return answer(request, error.status_code, str(error.detail), headers=error.headers)


async def _on_database_error(request: Request, error: Exception) -> Response:
    again = {"Retry-After": str(AGAIN_SECONDS)}
    return answer(request, 503, outage(error, path=request.url.path), headers=again)


async def _on_defect(request: Request, error: Exception) -> Response:  # logged by the server
    return answer(request, 500, "this is a defect in rushes: its log says more")
