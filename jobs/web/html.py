"""Templates -> pages: words for numbers and times, headers, the key of a browser's forms."""

import hashlib
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from os import PathLike, stat_result
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote, urlencode

import jinja2
from fastapi import Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from jobs import prompt_row, sizes
from jobs.web import cookies

HERE = Path(__file__).parent
HEADERS = {
    # All scripts and styles are files of ours: nothing inline, nothing from other sites.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' data:; media-src 'self'; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'",
    # With no-referrer, browsers send `Origin: null` with forms: nobody could tell whose they are.
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
OWN_PATH = re.compile(r"/(?![/\\])[\x21-\x7e]{0,2000}")
NOTES = {
    "cancelled": "Cancelled: what waited will not be rendered, what runs stops at its next step.",
    "retried": "Queued again, with the same seeds and settings.",
    "retried-paused": "Queued again, but the batch is paused: nothing starts before it is resumed.",
    "nothing-retried": "There was nothing to queue again.",
    "paused": "Paused: nothing of it starts; what runs goes on.",
    "resumed": "It goes on.",
    "moved": "Its place in the queue is changed.",
    "first": "It goes before all that waits.",
    "is-first": "It is the first already.",
    "among-first": "It has the highest priority, and so have others: they take turns.",
    "below-others": "Its priority is as high as it may be, and others still go before it.",
    "no-priority": "Nothing was changed: a priority must be a whole number "
    f"from -{prompt_row.MAX_PRIORITY} to {prompt_row.MAX_PRIORITY}.",
    "unchanged": "Nothing was changed: it is in that state already, or it is finished.",
    "submitted": "Submitted.",
    "again": "These were submitted before: here is their batch.",
    "added": "The schedule is added.",
    "removed": "The schedule is removed; its batches stay.",
    "login": "You are logged in.",
    "logout": "You are logged out.",
    "ended": "Your login has ended: what you sent since then was not stored.",
}
"""What a page may be asked to say after something was done, by the word in its address."""


def _written(stat: stat_result) -> tuple[int, int]:
    """Another one when a file was replaced."""
    return stat.st_mtime_ns, stat.st_size


ASSETS = HERE / "assets"
# Before they are read: one that is replaced meanwhile counts as changed.
WRITTEN = {path.name: _written(path.stat()) for path in ASSETS.iterdir()}
VERSIONS = {
    path.name: hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in ASSETS.iterdir()
}


def asset(name: str) -> str:
    """Its address: another one when the file is another one."""
    return f"/assets/{name}?v={VERSIONS[name]}"


class Assets(StaticFiles):
    """Scripts and styles: the same for everybody, so browsers may keep each version for ever."""

    def file_response(
        self, full_path: str | PathLike[str], stat_result: stat_result, scope: Scope, *args: Any
    ) -> Response:
        response = super().file_response(full_path, stat_result, scope, *args)
        name = Path(full_path).name
        # While an upgrade goes on, pages of the new version may ask a process of the old one, and
        # that one may find the files of the new one.
        is_of_version = scope["query_string"].decode("latin-1") == f"v={VERSIONS.get(name)}"
        is_as_hashed = WRITTEN.get(name) == _written(stat_result)
        is_kept = is_of_version and is_as_hashed
        kept = "public, max-age=31536000, immutable" if is_kept else "no-cache"
        response.headers["Cache-Control"] = kept
        return response


def assets() -> Assets:
    return Assets(directory=ASSETS)


def page(
    request: Request,
    template: str,
    *,
    who: Any = None,
    status: int = 200,
    is_login: bool = False,
    **context: Any,
) -> HTMLResponse:
    """A whole page; `who` decides which links and buttons there are."""
    key = cookies.form_key(request)
    secret = cookies.secret_of(request)
    text = _ENVIRONMENT.get_template(template).render(
        context
        | {
            "who": who,
            "path": request.url.path,
            "note": NOTES.get(request.query_params.get("did", "")),
            "csrf": cookies.csrf(key, secret=None if is_login else secret),
            "now": datetime.now(UTC),
            "is_logged_in": secret is not None and not is_login,
        }
    )
    response = HTMLResponse(text, status, HEADERS)
    cookies.keep_form_key(request, response, key)
    return response


def go(path: str, *, did: str | None = None) -> RedirectResponse:
    """To one of our pages, after something was done."""
    if did is not None:
        path += ("&" if "?" in path else "?") + urlencode({"did": did})
    return RedirectResponse(path, 303)


def address(path: str, **query: object) -> str:
    """With those of the query that are something."""
    told = _query(query)
    return f"{path}?{told}" if told else path


def own_path(given: str, *, otherwise: str) -> str:
    """The path of one of our pages, which came with a request: never one of another site."""
    return given if OWN_PATH.fullmatch(given) else otherwise


# Words.


def ago(moment: datetime | None, now: datetime) -> str:
    """3 min ago, in 2 h."""
    if moment is None:
        return "never"
    seconds = (now - moment).total_seconds()
    if abs(seconds) < 5:
        return "now"
    return f"{duration(seconds)} ago" if seconds > 0 else f"in {duration(-seconds)}"


def duration(seconds: float | None) -> str:
    """In the largest unit of which there are two: 90 s, 2 min."""
    if seconds is None:
        return "?"
    if seconds < 10:
        return f"{seconds:.1f} s".replace(".0 ", " ")
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def moment(value: datetime | None) -> str:
    return "" if value is None else f"{value.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def size(number: int | None) -> str:
    return "?" if number is None else sizes.words(number)


def plain(value: object) -> str:
    """partially_failed -> partially failed."""
    return str(value).replace("_", " ")


def _query(given: Mapping[str, object]) -> str:
    return urlencode({key: value for key, value in given.items() if value is not None}, doseq=True)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["asset"] = asset
    environment.filters |= {
        "ago": ago,
        "duration": duration,
        "moment": moment,
        "size": size,
        "plain": plain,
        "name": lambda path: PurePath(str(path)).name,
        "path": lambda text: quote(str(text), safe=""),
        "query": _query,
        "number": lambda value: f"{value:,}",
    }
    return environment


_ENVIRONMENT = _environment()
