"""An object of the store as a response, whole or the range that was asked for."""

import re

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from jobs import storage
from jobs.web import problems

RANGE = re.compile(r"bytes=(\d{0,30})-(\d{0,30})", re.IGNORECASE)


def respond(
    request: Request,
    store: storage.ObjectStore,
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
    }
    if file_name is not None:
        headers["Content-Disposition"] = f'attachment; filename="{file_name}"'
    if tag in request.headers.get("if-none-match", ""):
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
    content = store.stream(key, first=first, last=last)
    return StreamingResponse(content, status_code=status, headers=headers, media_type=content_type)


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
