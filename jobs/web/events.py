"""Our own API: what happens to a batch, as server-sent events."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.encoders import jsonable_encoder
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from starlette.concurrency import run_in_threadpool

from jobs import shapes, watch
from jobs.web import access, answers, finding, rates, service
from jobs.web.batches import Serving

router = APIRouter(
    prefix="/api/batches", tags=["batches"], responses=answers.PROBLEMS, route_class=access.ApiRoute
)

LOOK_SECONDS = 0.5
QUIET_SECONDS = 15.0  # proxies end connections that say nothing
TOKEN_SECONDS = 10.0  # a revoked token reads on for no longer
MAX_LISTENERS, OF_ONE_OWNER = 200, 100  # each looks at the database twice a second
RETRY_MILLISECONDS = 2_000

_listeners: Counter[str | None] = Counter()
"""By owner."""


def _readable(batch_id: str, serving: Serving, principal: access.Reader) -> str:
    """Before the stream begins: after that, no error can be told."""
    with serving.db.reading() as session:
        finding.batch(session, batch_id, principal)
    for listening, most in (
        (_listeners[principal.sees], OF_ONE_OWNER),
        (_listeners.total(), MAX_LISTENERS),
    ):
        if listening >= most:
            raise rates.TooManyRequests(rate=f"{most} listeners", wait_seconds=10)
    return batch_id


@router.get(
    "/{batch_id}/events",
    response_class=StreamingResponse,
    responses={200: {"content": {"text/event-stream": {}}}},
)
async def events(
    batch_id: Annotated[str, Depends(_readable)], request: Request, principal: access.Reader
) -> StreamingResponse:
    """An event `progress` per change (steps of running jobs too), then one `finished`.

    Each is the whole state, as GET /api/batches/{batch_id} tells it: who reconnects misses nothing.
    """
    stream = _stream(service.of(request), batch_id, principal)
    return StreamingResponse(stream, media_type="text/event-stream")


async def _stream(
    serving: service.Service, batch_id: str, principal: access.Principal
) -> AsyncIterator[bytes]:
    _listeners[principal.sees] += 1
    try:
        yield format_sse_event(comment="hello", retry=RETRY_MILLISECONDS)
        told: dict[str, Any] = {}
        quiet = 0.0
        checked = time.monotonic()
        while True:
            if time.monotonic() - checked >= TOKEN_SECONDS:
                if not await run_in_threadpool(access.is_still_valid, serving, principal):
                    return
                checked = time.monotonic()
            snapshot = await run_in_threadpool(watch.look, serving.db, batch_id)
            shape = jsonable_encoder(shapes.snapshot(snapshot))
            essence = _essence(shape)
            if essence != told or snapshot.is_finished:
                name = "finished" if snapshot.is_finished else "progress"
                yield format_sse_event(event=name, data_str=json.dumps(shape))
                told, quiet = essence, 0.0
            elif quiet >= QUIET_SECONDS:
                yield format_sse_event(comment="still here")
                quiet = 0.0
            if snapshot.is_finished:
                return
            await asyncio.sleep(LOOK_SECONDS)
            quiet += LOOK_SECONDS
    finally:
        _listeners[principal.sees] -= 1


def _essence(shape: dict[str, Any]) -> dict[str, Any]:
    """Without what only the clock changes."""
    clocks = ("now", "rate_per_minute", "seconds_left")
    still = {key: value for key, value in shape.items() if key not in clocks}
    still["running"] = [
        {key: value for key, value in job.items() if key != "seconds"} for job in shape["running"]
    ]
    return still
