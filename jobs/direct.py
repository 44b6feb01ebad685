"""Requests to servers of this machine: HTTP_PROXY is for other machines."""

import http.client
import ssl
import urllib.parse
import urllib.request

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


def opened(
    url: str, *, seconds: float, is_here: bool | None = None, tls: ssl.SSLContext | None = None
) -> http.client.HTTPResponse:
    """The answer to a GET; `is_here` by default for loopback. Raises OSError, HTTPError for 4xx."""
    if is_here is None:
        is_here = urllib.parse.urlsplit(url).hostname in LOOPBACK
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=tls)]
    if is_here:
        handlers.append(urllib.request.ProxyHandler({}))
    answer: http.client.HTTPResponse = urllib.request.build_opener(*handlers).open(
        url, timeout=seconds
    )
    return answer
