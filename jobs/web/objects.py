"""An object of the store as a response, whole or the range that was asked for."""

import contextlib
import functools
import re
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from anyio import CapacityLimiter, move_on_after, to_thread
from fastapi import Request
from fastapi.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from jobs import storage
from jobs.web import problems
from jobs.web.service import TURN_SECONDS, Service

RANGE = re.compile(r"bytes=(\d{0,30})-(\d{0,30})", re.IGNORECASE)


def respond(
    request: Request,
    serving: Service,
    key: str,
    *,
    size_bytes: int,
    sha256: str,
    content_type: str,
    file_name: str | None = None,
) -> Response:
    """200, 206, 304 or 416; to HEAD without the bytes.

    Objects never change, so that they may be kept by their hash.
    """
    tag = f'"{sha256}"'
    headers = {
        "Accept-Ranges": "bytes",
        "ETag": tag,
        "Cache-Control": "private, max-age=3600",
        "Vary": "Cookie, Authorization",  # not for who logs in after us in the same browser
    }
    if file_name is not None:
        headers["Content-Disposition"] = f'attachment; filename="{file_name}"'
    held = request.headers.get("if-none-match", "")
    if tag in held or held.strip() == "*":
        return Response(status_code=304, headers=headers)
    wanted = None
    if request.headers.get("if-range", tag) == tag:
        wanted = _range(request.headers.get("range", ""), size_bytes)
    if wanted == (-1, -1):
        unsatisfiable = {"Content-Range": f"bytes */{size_bytes}"}
        return problems.answer(request, 416, "no such range", headers=unsatisfiable)
    first, last = wanted or (0, size_bytes - 1)
    if wanted is not None:
        headers["Content-Range"] = f"bytes {first}-{last}/{size_bytes}"
    headers["Content-Length"] = str(last - first + 1)
    status = 206 if wanted is not None else 200
    if request.method == "HEAD" or not size_bytes:
        return Response(status_code=status, headers=headers, media_type=content_type)
    content = functools.partial(serving.streaming_store.stream, key, first=first, last=last)
    return _Streamed(serving, content, status_code=status, headers=headers, media_type=content_type)


class _Streamed(StreamingResponse):
    """Bytes of an object, opened before the answer begins: a store that is away is still a 503.

    In threads beside those of the handlers: a store that hangs takes none from other requests.
    """

    def __init__(
        self, serving: Service, content: Callable[[], Generator[bytes]], **how: Any
    ) -> None:
        super().__init__((), **how)
        self._serving, self._content = serving, content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        opening = self._serving.opening
        with move_on_after(TURN_SECONDS) as waiting:
            await opening.acquire_on_behalf_of(self)
        if waiting.cancelled_caught:
            url = self._serving.streaming_store.url
            raise storage.StorageUnavailable(url, "too many requests wait for it")
        try:
            chunks = await to_thread.run_sync(self._content, limiter=CapacityLimiter(1))
        finally:
            opening.release_on_behalf_of(self)
        self.body_iterator = self._read(chunks)
        try:
            await super().__call__(scope, receive, send)
        finally:
            # The store's connection; at a stop of the service a thread may still read from it.
            with contextlib.suppress(ValueError):
                chunks.close()

    async def _read(self, chunks: Iterator[bytes]) -> AsyncIterator[bytes]:
        readers = self._serving.reading
        while chunk := await to_thread.run_sync(next, chunks, b"", limiter=readers):
            yield chunk


def _range(text: str, size_bytes: int) -> tuple[int, int] | None:
    """First and last byte; None: the whole. (-1, -1): there is nothing of it."""
    match = RANGE.fullmatch(text.strip())
    if match is None or not (match[1] or match[2]):
        return None  # several ranges, or another unit: RFC 9110 lets us send all
    if not match[1]:
        count = min(int(match[2]), size_bytes)
        return (size_bytes - count, size_bytes - 1) if count else (-1, -1)
    first = int(match[1])
    last = min(int(match[2]) if match[2] else size_bytes - 1, size_bytes - 1)
    if first >= size_bytes:
        return (-1, -1)
    return (first, last) if first <= last else None
