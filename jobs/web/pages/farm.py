"""The page: workers and what they render, how much was finished, how long the queue is."""

from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from jobs.web import access, finding, html, load, service, system
from jobs.web.batches import Serving
from jobs.web.pages import charts

router = APIRouter(include_in_schema=False, route_class=access.FormRoute)

WORKERS = 64
SPAN_SECONDS = 300
SPANS = 36  # three hours


@router.get("/farm")
def show(request: Request, serving: Serving, who: access.Reader) -> Response:
    workers = sorted(system.list_workers(serving, who)["workers"], key=_needs_a_look)
    found = load.show(serving, who, span_seconds=SPAN_SECONDS, spans=SPANS)
    spans = found["spans"]
    hour = spans[-load.HOUR // SPAN_SECONDS :]
    last_hour = sum(span["succeeded"] for span in hour)
    is_more = found["is_cut"] and found["cut_at"] > hour[0]["since"]
    history = found["history"]
    return html.page(
        request,
        "farm.html",
        who=who,
        workers=workers,
        most=WORKERS,
        alive=sum(worker["is_alive"] for worker in workers),
        prompts=_prompts(serving, who, workers[:WORKERS]),
        take_nothing=sum(worker["is_alive"] and not worker["takes"] for worker in workers),
        load=found
        | {
            "last_hour": last_hour,
            "is_more": is_more,
            "since": history[0]["at"] if history else None,
        },
        bars=charts.bars(spans, span_seconds=SPAN_SECONDS),
        lines=charts.lines(history),
    )


def _needs_a_look(worker: Mapping[str, Any]) -> tuple[bool, bool, str]:
    """Those first that a person should see: of a large farm not all are shown."""
    return not (worker["refuses"] and worker["is_alive"]), worker["is_alive"], worker["name"]


def _prompts(
    serving: service.Service, who: access.Principal, workers: Iterable[Mapping[str, Any]]
) -> dict[int, str]:
    """Of the jobs that are rendered, those that this person may see."""
    held = (worker["rendering"]["job_id"] for worker in workers if worker["rendering"])
    with serving.db.reading() as session:
        return finding.prompts(session, who, [job_id for job_id in held if job_id is not None])
