"""Bodies: how many are kept, for how long, and how much of one is taken apart in memory.

Of JSON, a value takes many times the bytes that it has in the text, and nobody else is served while
it is parsed; what a model finds wrong takes a thousand bytes for each key.
"""

import asyncio
import contextlib
import json
import math
import re
import time
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any, TypeVar

from fastapi import HTTPException
from pydantic import BeforeValidator
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.types import Message, Receive

from jobs.web import rates

ROWS_PATHS = frozenset({"/api/batches", "/api/schedules"})
MAX_VALUES_OF_ROWS = 300_000  # 10,000 rows with 30 each
MAX_VALUES = 10_000  # elsewhere
MAX_KEYS = 100  # of an object that may have a dozen
TOKENS_OF_VALUE = 3  # its key, itself where it is a text, and the comma or bracket before it
BEFORE_VALUES = (b",", b"[", b"{")
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[,\[{]', re.DOTALL)

MAX_TEXT_BYTES, MAX_FIELDS, MAX_FILES = 1 << 20, 40, 4  # of a form: texts are kept in memory
MAX_TYPED_BYTES, MAX_TYPED_FIELDS = 3 << 20, 16  # where prompts are typed, or pasted

SILENT_SECONDS = 30.0  # a slow line says something each second
LARGE_BYTES = 1 << 20
MAX_LARGE, LARGE_OF_ONE = 8, 3  # requests at a time: each is 200 MB of memory at most, or a file
LARGE_WAIT_SECONDS, LOOK_SECONDS = 10.0, 0.1  # for a turn: without a thread, and not read on

T = TypeVar("T")


def large_turns() -> rates.Turns:
    """Of one process, for all its requests with a large body."""
    return rates.Turns(
        LARGE_OF_ONE,
        of_all=MAX_LARGE,
        what=f"requests of over {LARGE_BYTES >> 20} MiB at once",
        wait_seconds=LARGE_WAIT_SECONDS,
    )


def patient(receive: Receive) -> Receive:
    """HTTPException 408 when nothing comes of a body for SILENT_SECONDS."""
    is_whole = False

    async def received() -> Message:
        nonlocal is_whole
        if is_whole:  # who is served may be silent
            return await receive()
        try:
            async with asyncio.timeout(SILENT_SECONDS):
                message = await receive()
        except TimeoutError:
            detail = f"nothing more of the request came for {SILENT_SECONDS:g} s: send it again"
            # The rest of it would be read as a request of its own.
            raise HTTPException(408, detail, headers={"Connection": "close"}) from None
        is_whole = not message.get("more_body", False)
        return message

    return received


@contextlib.contextmanager
def in_turn(receive: Receive, *, owner: str, turns: rates.Turns) -> Iterator[Receive]:
    """What is large takes a turn of its owner's, held until the end, or waits for one, unread.

    HTTPException 429: for too long.
    """
    num_bytes = 0
    with contextlib.ExitStack() as held:

        async def counted() -> Message:
            nonlocal num_bytes
            message = await receive()
            was_large = num_bytes > LARGE_BYTES
            num_bytes += len(message.get("body", b""))
            if num_bytes > LARGE_BYTES and not was_large:
                await _take(turns, owner)
                held.callback(turns.give_back, owner)
            return message

        yield counted


async def _take(turns: rates.Turns, owner: str) -> None:
    until = time.monotonic() + LARGE_WAIT_SECONDS
    while True:
        try:
            return turns.take(owner)
        except rates.TooManyRequests as refused:
            if time.monotonic() >= until:
                # Of errors while a body is read, FastAPI passes on these alone.
                again = {"Retry-After": str(math.ceil(refused.wait_seconds))}
                raise HTTPException(429, str(refused), headers=again) from None
        await asyncio.sleep(LOOK_SECONDS)


class JsonRequest(Request):
    """A request whose JSON is counted before it is parsed."""

    async def json(self) -> Any:
        """HTTPException 413 when it holds more than a request of its path can mean."""
        body = await self.body()
        if not json.detect_encoding(body).startswith("utf-8"):
            raise HTTPException(400, "JSON must be UTF-8")  # others would be counted wrongly
        most = MAX_VALUES_OF_ROWS if self.url.path in ROWS_PATHS else MAX_VALUES
        if await run_in_threadpool(_has_more_values, body, most):
            raise HTTPException(413, f"more than {most:,} values in JSON: send fewer at a time")
        return await super().json()


def _has_more_values(body: bytes, most: int) -> bool:
    if sum(body.count(mark) for mark in BEFORE_VALUES) <= most:
        return False
    # Prompts hold commas too. Token by token: one search through all would stop other threads.
    tokens = islice(TOKEN.finditer(body), most * TOKENS_OF_VALUE + 1)
    return sum(1 for _ in tokens) > most * TOKENS_OF_VALUE


def _check_keys(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MAX_KEYS:
        raise ValueError(f"has {len(given):,} keys: at most {MAX_KEYS} would do")
    return given


FewKeys = Annotated[T, BeforeValidator(_check_keys)]
"""An object that may have a dozen keys: that it has a million is told once, not a million times."""
