"""What a browser keeps: its token, and a key that its forms are made with."""

import hashlib
import hmac
import secrets
from typing import Literal

from fastapi import Request, Response

TOKEN = "rushes_token"  # noqa: S105  # a name
FORM_KEY = "rushes_form"
KEPT_SECONDS = 30 * 24 * 3600  # a token may end earlier by itself
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def secret_of(request: Request) -> str | None:
    """The token of a person who has logged in."""
    return request.cookies.get(TOKEN)


def log_in(request: Request, response: Response, secret: str) -> None:
    _set(request, response, TOKEN, secret, samesite="strict")


def log_out(response: Response) -> None:
    response.delete_cookie(TOKEN)


def form_key(request: Request) -> str:
    """The browser's key, a new one for a browser that has none."""
    return request.cookies.get(FORM_KEY) or secrets.token_urlsafe(32)


def keep_form_key(request: Request, response: Response, key: str) -> None:
    if request.cookies.get(FORM_KEY) != key:
        # Lax: who comes by a link on another site brings it along, and forms that are open stay
        # good. Changes still come from our pages alone: a POST of another site has neither cookie,
        # is refused for its Origin, and lacks the HMAC over a key that no other site can read.
        _set(request, response, FORM_KEY, key, samesite="lax")


def csrf(key: str, *, secret: str | None) -> str:
    """What a form must carry: made of both cookies, which no other site and no script can read.

    A login's is made without a secret. It may have been shown after a link on another site, where
    the cookie of an earlier login stays behind; when the form is sent from here, it comes along.
    """
    return hmac.new(key.encode(), (secret or "").encode(), hashlib.sha256).hexdigest()


def is_own_form(request: Request, given: str, *, secret: str | None) -> bool:
    key = request.cookies.get(FORM_KEY)
    return key is not None and hmac.compare_digest(
        csrf(key, secret=secret).encode(), given.encode(errors="replace")
    )


def _set(
    request: Request,
    response: Response,
    name: str,
    value: str,
    *,
    samesite: Literal["lax", "strict"],
) -> None:
    response.set_cookie(
        name,
        value,
        max_age=KEPT_SECONDS,
        httponly=True,
        samesite=samesite,
        secure=request.url.scheme == "https",
    )
