"""Our own API: uploads, presets, workers, and how well the service is."""

import asyncio
from collections.abc import Container
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, File, Request, Response, UploadFile
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from jobs import broker, database, errors, queries, shapes, store_mark, uploads
from jobs.web import access, answers, finding, images, receiving, service
from jobs.web.batches import Serving

router = APIRouter(prefix="/api", responses=answers.PROBLEMS, route_class=access.ApiRoute)
health = APIRouter(tags=["health"])


@router.post("/uploads", status_code=201, tags=["uploads"], response_model=answers.Upload)
def upload_image(
    file: Annotated[UploadFile, File(description="JPEG, PNG, WebP, BMP, TIFF or GIF.")],
    serving: Serving,
    principal: access.Submitter,
) -> dict[str, Any]:
    """Keep an image; rows of a batch name it by what `image` says here."""
    receiving.image(serving, principal, file)
    row = receiving.keep(serving, principal, file, purpose=uploads.IMAGE)
    return {
        "upload_id": row.id,
        "image": f"{images.UPLOAD}{row.id}",
        "bytes": row.size_bytes,
        "sha256": row.sha256,
    }


@router.get("/presets", tags=["system"], response_model=answers.Presets)
def list_presets(serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """What a batch may name as its preset."""
    return {
        "presets": [
            {
                "name": preset.name,
                "description": preset.description,
                "look_id": preset.look.id,
                "look": preset.look.model_dump(mode="json"),
                "needs_image": preset.look.needs_image,
            }
            for preset in serving.usable_presets()
        ]
    }


@router.get("/workers", tags=["system"], response_model=answers.Workers)
def list_workers(serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """The workers that have not stopped for good, and what they render.

    Who is no admin is told no number of a job of others, and of models their names alone.
    """
    with serving.db.reading() as session:
        workers = [shapes.worker(live) for live in queries.live_workers(session)]
        if principal.is_admin:
            return {"workers": workers}
        held = [worker["rendering"]["job_id"] for worker in workers if worker["rendering"]]
        own = finding.prompts(session, principal, held)
    return {"workers": [_without_others(worker, own) for worker in workers]}


def _without_others(worker: dict[str, Any], own: Container[int]) -> dict[str, Any]:
    rendering = worker["rendering"]
    if rendering and rendering["job_id"] not in own:
        rendering = rendering | {"job_id": None}
    resident = [
        loaded
        | {
            "model": Path(loaded["model"]).name,
            "loras": [Path(lora).name for lora in loaded["loras"]],
        }
        for loaded in worker["resident"]
    ]
    return worker | {"rendering": rendering, "resident": resident, "suspects": []}


@health.get("/metrics", include_in_schema=False, response_class=PlainTextResponse)
def measure(serving: Serving, principal: access.Reader) -> Response:
    """For Prometheus. 503 without the database."""
    return Response(serving.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@health.head("/healthz", include_in_schema=False)
@health.get("/healthz")
async def is_alive() -> dict[str, str]:
    """The process answers, even while all its threads are at work."""
    return {"status": "ok"}


@health.head("/readyz", include_in_schema=False)
@health.get("/readyz")
async def is_ready(request: Request, response: Response) -> dict[str, Any]:
    """503 when requests cannot be served: without the database. The rest may come back later.

    Answered also while all threads of this process are at work.
    """
    serving = service.of(request)
    asked = {
        "database": asyncio.wrap_future(serving.checking_database.submit(_database, serving)),
        "broker": asyncio.wrap_future(serving.checking.submit(_broker, serving)),
        "store": asyncio.wrap_future(serving.checking.submit(_store, serving)),
    }
    # Names with many addresses are tried for longer than a probe waits.
    await asyncio.wait(asked.values(), timeout=service.CHECK_SECONDS)
    checks = {name: _answer(found) for name, found in asked.items()}
    if checks["database"] == "unavailable":
        response.status_code = 503
    return {"status": checks["database"], "checks": checks}


def _answer(found: asyncio.Future[str]) -> str:
    if found.done():
        return found.result()
    found.cancel()
    return "unavailable"


def _database(serving: service.Service) -> str:
    try:
        with serving.checked_db.reading() as session:
            session.execute(text("SELECT 1 FROM batches LIMIT 1"))
            is_server = not serving.checked_db.is_sqlite
            if is_server and session.scalar(text("SHOW transaction_read_only")) == "on":
                return "read-only"  # a standby, or a managed one that is full: it serves readers
        if serving.checked_db.lacks_room():
            return "read-only"
    except (SQLAlchemyError, database.DatabaseUnavailable):
        return "unavailable"
    return "ok"


def _broker(serving: service.Service) -> str:
    try:
        broker.Broker(serving.config).redis.ping()
    except (*broker.UNAVAILABLE, errors.RushesError, ValueError):
        return "unavailable"
    return "ok"


def _store(serving: service.Service) -> str:
    try:
        serving.checked_store.check()
        serving.store_guard.require()
    except store_mark.OtherStore:
        return "another"
    except (SQLAlchemyError, errors.RushesError):
        return "unavailable"
    return "ok"
