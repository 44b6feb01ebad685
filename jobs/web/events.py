"""Our own API: what happens to a batch, as server-sent events."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from typing import Annotated, Any

import structlog
from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.encoders import jsonable_encoder
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event
from sqlalchemy.exc import SQLAlchemyError
from starlette.types import Receive, Scope, Send

from jobs import database, shapes, watch
from jobs.web import access, answers, finding, service
from jobs.web.batches import Serving

router = APIRouter(
    prefix="/api/batches", tags=["batches"], responses=answers.PROBLEMS, route_class=access.ApiRoute
)

log = structlog.get_logger()

LOOK_SECONDS = 0.5
LONGEST_PAUSE_SECONDS = 10.0  # between looks while the database is away
QUIET_SECONDS = 15.0  # proxies end connections that say nothing
TOKEN_SECONDS = 10.0  # a revoked token reads on for no longer
RETRY_MILLISECONDS = 2_000
STILL_HERE = format_sse_event(comment="still here")


class _Heard(StreamingResponse):
    """Holds one of the turns of those who listen, from before its first byte until its last."""

    def __init__(self, stream: AsyncIterator[bytes], *, turn: AbstractContextManager[None]) -> None:
        super().__init__(stream, media_type="text/event-stream")
        self._turn = turn

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """TooManyRequests."""
        with self._turn:
            await super().__call__(scope, receive, send)


def _readable(batch_id: str, serving: Serving, principal: access.Reader) -> str:
    """Before the stream begins: after that, no error can be told."""
    with serving.db.reading() as session:
        finding.batch(session, batch_id, principal)
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
    While the database is away there are comments alone, and then it goes on.
    """
    serving = service.of(request)
    stream = _stream(serving, batch_id, principal)
    return _Heard(stream, turn=serving.listen_turns.taken(principal.owner))


async def _stream(
    serving: service.Service, batch_id: str, principal: access.Principal
) -> AsyncIterator[bytes]:
    yield format_sse_event(comment="hello", retry=RETRY_MILLISECONDS)
    told: dict[str, Any] = {}
    checked = spoken = time.monotonic()
    pause = LOOK_SECONDS
    while True:
        is_due = time.monotonic() - checked >= TOKEN_SECONDS
        look = asyncio.create_task(_look(serving, batch_id, principal if is_due else None))
        try:
            while not (await asyncio.wait([look], timeout=QUIET_SECONDS))[0]:
                yield STILL_HERE
                spoken = time.monotonic()
        finally:
            look.cancel()  # where the listener has left
        try:
            snapshot = look.result()
        except (SQLAlchemyError, database.DatabaseUnavailable) as error:
            # An EventSource whose stream ends asks again, is told 503, and asks no more.
            if pause == LOOK_SECONDS:
                log.warning("web.events_delayed", batch_id=batch_id, error=str(error)[:200])
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
        else:
            if snapshot is None:
                return
            pause = LOOK_SECONDS
            checked = time.monotonic() if is_due else checked
            shape = jsonable_encoder(shapes.snapshot(snapshot))
            essence = _essence(shape)
            if essence != told or snapshot.is_finished:
                name = "finished" if snapshot.is_finished else "progress"
                yield format_sse_event(event=name, data_str=json.dumps(shape))
                told, spoken = essence, time.monotonic()
            if snapshot.is_finished:
                return
        if time.monotonic() - spoken >= QUIET_SECONDS:
            yield STILL_HERE
            spoken = time.monotonic()
        await asyncio.sleep(pause)


async def _look(
    serving: service.Service, batch_id: str, doubted: access.Principal | None
) -> watch.Snapshot | None:
    """None: the token of `doubted` is valid no more."""

    def look() -> watch.Snapshot | None:
        if doubted is not None and not access.is_still_valid(serving, doubted):
            return None
        return watch.look(serving.db, batch_id)

    return await to_thread.run_sync(look, limiter=serving.looking)


def _essence(shape: dict[str, Any]) -> dict[str, Any]:
    """Without what only the clock changes."""
    clocks = ("now", "rate_per_minute", "seconds_left")
    still = {key: value for key, value in shape.items() if key not in clocks}
    still["running"] = [
        {key: value for key, value in job.items() if key != "seconds"} for job in shape["running"]
    ]
    return still
