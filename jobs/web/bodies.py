"""Bodies: how much of one is taken apart in memory.

Of JSON, a value takes many times the bytes that it has in the text, and nobody else is served while
it is parsed; what a model finds wrong takes a thousand bytes for each key.
"""

import json
import re
from itertools import islice
from typing import Annotated, Any, TypeVar

from fastapi import HTTPException
from pydantic import BeforeValidator
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

ROWS_PATHS = frozenset({"/api/batches", "/api/schedules"})
MAX_VALUES_OF_ROWS = 300_000  # 10,000 rows with 30 each
MAX_VALUES = 10_000  # elsewhere
MAX_KEYS = 100  # of an object that may have a dozen
TOKENS_OF_VALUE = 3  # its key, itself where it is a text, and the comma or bracket before it
BEFORE_VALUES = (b",", b"[", b"{")
TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[,\[{]', re.DOTALL)

MAX_TEXT_BYTES, MAX_FIELDS, MAX_FILES = 1 << 20, 40, 4  # of a form: texts are kept in memory
MAX_TYPED_BYTES, MAX_TYPED_FIELDS = 3 << 20, 16  # where prompts are typed, or pasted

T = TypeVar("T")


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
