"""The page: workers and what they render, how much was finished, how long the queue is."""

import contextlib
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from jobs import errors
from jobs.web import access, finding, html, load, service, system
from jobs.web.batches import Serving
from jobs.web.pages import charts

router = APIRouter(include_in_schema=False, route_class=access.FormRoute)

WORKERS = 64
SPAN_SECONDS = 300
SPANS = 36  # three hours


@router.get("/farm")
def show(request: Request, serving: Serving, who: access.Reader) -> Response:
    workers = system.list_workers(serving, who)["workers"]
    found = load.show(serving, who, span_seconds=SPAN_SECONDS, spans=SPANS)
    spans = found["spans"]
    last_hour = sum(span["succeeded"] for span in spans[-load.HOUR // SPAN_SECONDS :])
    history = found["history"]
    return html.page(
        request,
        "farm.html",
        who=who,
        workers=workers,
        most=WORKERS,
        alive=sum(worker["is_alive"] for worker in workers),
        prompts=_prompts(serving, who, workers[:WORKERS]),
        load=found | {"last_hour": last_hour, "since": history[0]["at"] if history else None},
        bars=charts.bars(spans, span_seconds=SPAN_SECONDS),
        lines=charts.lines(history),
    )


def _prompts(
    serving: service.Service, who: access.Principal, workers: Iterable[Mapping[str, Any]]
) -> dict[int, str]:
    """Of the jobs that are rendered, those that this person may see."""
    found: dict[int, str] = {}
    with serving.db.reading() as session:
        for job_id in (worker["rendering"]["job_id"] for worker in workers if worker["rendering"]):
            with contextlib.suppress(errors.NotFound):
                found[job_id] = finding.job(session, job_id, who).prompt
    return found
