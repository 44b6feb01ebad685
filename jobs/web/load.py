"""Our own API: how long the queue is and was, and how much was finished."""

from typing import Annotated, Any

from fastapi import APIRouter, Query

from jobs import queries, throughput
from jobs.web import access, answers
from jobs.web.batches import Serving

router = APIRouter(
    prefix="/api", responses=answers.PROBLEMS, tags=["system"], route_class=access.ApiRoute
)

MOST_SPANS = 288
HOUR = 3_600


@router.get("/load", response_model=answers.Load)
def show(
    serving: Serving,
    principal: access.Reader,
    span_seconds: Annotated[int, Query(ge=10, le=24 * HOUR)] = 300,
    spans: Annotated[int, Query(ge=1, le=MOST_SPANS)] = 24,
) -> dict[str, Any]:
    """Of the whole farm, whoever asks: numbers of jobs, not which ones."""
    sample = serving.history.look(serving.db)
    with serving.db.reading() as session:
        found = throughput.lately(session, span_seconds=span_seconds, spans=spans)
        paused = queries.paused_jobs(session)
    return {
        "queued": sample.queued,
        "queued_paused": min(paused, sample.queued),
        "running": sample.running,
        "idle_since": serving.history.idle_since,
        "span_seconds": span_seconds,
        "is_cut": found.is_cut,
        "cut_at": found.cut_at,
        "spans": [
            {"since": span.since, "succeeded": span.succeeded, "failed": span.failed}
            for span in found.spans
        ],
        "history": [
            {"at": each.at, "queued": each.queued, "running": each.running}
            for each in list(serving.history.samples)
        ],
    }
