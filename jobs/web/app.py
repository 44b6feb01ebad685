"""The application: APIs and pages, the guards before them, errors in the form of each."""

import importlib.metadata
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from jobs.web import (
    batches,
    bodies,
    events,
    gradio_page,
    guards,
    html,
    lightx2v,
    load,
    openai_batches,
    openai_files,
    openai_videos,
    problems,
    system,
    timetable,
    videos,
)
from jobs.web.pages import calendar, farm, gallery, login, overview, submitting
from jobs.web.service import Service

DESCRIPTION = """Beside our own API (`/api/...`) there are those of OpenAI (`/v1/videos`,
`/v1/files`, `/v1/batches`) and of LightX2V's server (`/v1/tasks/...`)."""


def make(service: Service) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with service.history.kept(service.db):
            yield

    app = FastAPI(
        lifespan=lifespan,
        title="rushes",
        summary="Batches of prompts, rendered into videos.",
        description=DESCRIPTION,
        version=importlib.metadata.version("rushes"),
        docs_url=None,  # these pages load their code from other sites
        redoc_url=None,
        form_limits={
            "max_part_size": bodies.MAX_TEXT_BYTES,
            "max_fields": bodies.MAX_FIELDS,
            "max_files": bodies.MAX_FILES,
        },
    )
    app.state.service = service
    problems.install(app)
    for part in (
        batches.router,
        events.router,
        videos.router,
        timetable.router,
        system.router,
        system.health,
        load.router,
        openai_videos.router,
        openai_files.router,
        openai_batches.router,
        lightx2v.router,
        login.router,
        overview.router,
        gallery.router,
        submitting.router,
        calendar.router,
        farm.router,
    ):
        app.include_router(part)
    app.mount("/assets", html.assets())
    if gradio_page.is_there():
        gradio_page.mount(app, service)
    _guard(app, service)
    return app


def _guard(app: FastAPI, service: Service) -> None:
    if service.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=sorted(service.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            # Those of the pages that were named; OpenAI's client sends a dozen of its own.
            allow_headers=["*"],
            expose_headers=["Content-Range", "ETag", "Location", "Retry-After"],
        )
    # Added last, so that it comes first.
    app.add_middleware(
        guards.Guards,
        host_names=service.host_names,
        cors_origins=service.cors_origins,
        max_bytes=service.config.web_max_bytes,
    )
