"""What is checked before any handler, and the headers of every answer."""

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.body_limit import RequestBodyLimitMiddleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobs.web import bodies, cookies, problems

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
}
MAX_BYTES_IN_MEMORY = 48 << 20  # JSON with the largest image as base64
MAX_BYTES_OF_STRANGERS = 64 << 10  # who logs in has no token yet
STRANGERS_PATHS = frozenset({"/login", "/logout"})
UPLOAD_PATHS = frozenset(
    {
        "/api/batches/file",
        "/api/uploads",
        "/schedules",
        "/submit",
        "/v1/files",
        "/v1/tasks/video/form",
        "/v1/videos",
    }
)
"""Elsewhere a body is read into memory, whatever it says that it is."""
HEALTH_PATHS = frozenset({"/healthz", "/readyz"})  # balancers ask by an address, or by no name
GRADIO_PATH = "/gradio"
GRADIO_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; "
    "style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; "
    "form-action 'self'; base-uri 'self'; frame-ancestors 'none'"
)
"""Gradio writes scripts and styles into its pages, and evaluates templates.

Nothing of ours is shown under this policy.
"""


class Guards:
    """Refuses names that are not ours (DNS rebinding), changes for other pages, and bulk."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        host_names: frozenset[str] | None,
        cors_origins: frozenset[str],
        max_bytes: int,
    ) -> None:
        self._app = app
        self._max_bytes = max_bytes
        """Of uploads, which are kept on disk while they are read."""
        self._host_names = host_names
        self._cors_origins = cors_origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                if scope["path"].startswith(GRADIO_PATH):
                    headers.setdefault("Content-Security-Policy", GRADIO_POLICY)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
                if headers.get("content-type", "").startswith("text/event-stream"):
                    # Else nginx collects events until there are a few KiB of them.
                    headers.setdefault("X-Accel-Buffering", "no")
            await send(message)

        headers = Headers(scope=scope)
        status, refusal = 403, self._refusal(scope["method"], scope["path"], headers)
        most, setting = self._most_bytes(scope["path"], headers)
        if refusal is None and _length(headers) > most:
            status, refusal = 413, f"at most {most:,} bytes{setting}"
        if refusal is None:
            # What comes without its length is counted while it is read.
            counted = RequestBodyLimitMiddleware(self._app, max_body_size=most)
            await counted(scope, bodies.patient(receive), send_guarded)
        else:
            answer = problems.answer(Request(scope), status, refusal)
            await answer(scope, receive, send_guarded)

    def _most_bytes(self, path: str, headers: Headers) -> tuple[int, str]:
        """And what a person may do about it."""
        setting = " (RUSHES_WEB_MAX_BYTES)"
        if path in STRANGERS_PATHS:
            return MAX_BYTES_OF_STRANGERS, ""
        takes_files = path in UPLOAD_PATHS or path.startswith(GRADIO_PATH)
        is_form = headers.get("content-type", "").lower().startswith("multipart/form-data")
        if (takes_files and is_form) or self._max_bytes <= MAX_BYTES_IN_MEMORY:
            return self._max_bytes, setting
        return MAX_BYTES_IN_MEMORY, ": send more as an uploaded file"

    def _refusal(self, method: str, path: str, headers: Headers) -> str | None:
        if path in HEALTH_PATHS and method in ("GET", "HEAD"):
            return None
        host = headers.get("host", "")
        name = _name_of(host)
        if self._host_names is not None and name not in self._host_names:
            return (
                f"this service is not {name[:100]!r}: ask for localhost, or give the name in "
                "RUSHES_WEB_NAMES"
            )
        if method in cookies.SAFE_METHODS:
            return None
        origin = headers.get("origin")
        if origin is None:
            is_foreign = headers.get("sec-fetch-site") in ("cross-site", "same-site")
            return "a page of another site may not change anything here" if is_foreign else None
        if _host_of(origin) == host or origin.lower() in self._cors_origins:
            return None
        return (
            f"a page of {origin[:100]!r} may not change anything at {host[:100]!r}; if they are "
            "the same site, its proxy must pass on the Host header"
        )


def _length(headers: Headers) -> int:
    length = headers.get("content-length", "")
    return int(length[:20]) if length.isascii() and length.isdigit() else 0


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def _name_of(host: str) -> str:
    """Without the port; of [::1]:8000 what is between the brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].rstrip(".").lower()
