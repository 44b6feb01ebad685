"""A Gradio page for one prompt at a time, for those who know such pages from elsewhere.

Only where Gradio is installed (`pip install rushes[gradio]`). All else is on our own pages.
"""

import importlib.util
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from sqlalchemy.exc import SQLAlchemyError
from starlette.routing import Mount

from jobs import errors, presets, queries, states
from jobs.web import access, batches, html, problems, service, videos

PATH = "/gradio"
LOOK_SECONDS = 1.0
MAX_FOLLOWED = 32  # renders that pages wait for, each in a thread; Gradio has 40

Told = Iterator[tuple[str, str]]


def is_there() -> bool:
    return importlib.util.find_spec("gradio") is not None


def mount(app: FastAPI, serving: service.Service) -> None:
    """Gradio takes seconds to import: nothing else here does so."""
    import gradio

    gradio.mount_gradio_app(
        app,
        _page(gradio, serving),
        path=PATH,
        auth_dependency=_name,
        footer_links=[],
        favicon_path=str(html.HERE / "assets" / "icon.svg"),
        theme=_theme(gradio),
        enable_monitoring=False,
        max_file_size=serving.config.web_max_bytes,
    )
    mounted = app.routes[-1]
    assert isinstance(mounted, Mount)
    assert isinstance(mounted.app, FastAPI)
    mounted.app.state.service = serving


def _theme(gradio: Any) -> Any:
    """Gradio's own, but for its buttons and its pale words, which are hard to read."""
    dark, darker = "*primary_700", "*primary_800"
    return gradio.themes.Default(primary_hue="blue").set(
        button_primary_background_fill=dark,
        button_primary_background_fill_dark=dark,
        button_primary_background_fill_hover=darker,
        button_primary_background_fill_hover_dark=darker,
        body_text_color_subdued="*neutral_600",
    )


def _name(request: Request) -> str | None:
    """For Gradio: who asks; None is refused."""
    try:
        return access.visitor(request).name
    except errors.RushesError:
        return None


def _page(gradio: Any, serving: service.Service) -> Any:
    names = [preset.name for preset in serving.usable_presets()]
    with gradio.Blocks(title="rushes", analytics_enabled=False) as page:
        gradio.Markdown("# One prompt\n[Batches, gallery, farm and all else](/batches)")
        with gradio.Row():
            with gradio.Column():
                prompt = gradio.Textbox(label="Prompt", lines=4)
                preset = gradio.Dropdown(names, value=serving.config.default_preset, label="Preset")
                seed = gradio.Textbox(label="Seed", placeholder="empty: drawn")
                image = gradio.Image(label="First frame, for image to video", type="filepath")
                button = gradio.Button("Render", variant="primary")
            with gradio.Column():
                told, video = gradio.Markdown(), gradio.HTML()
        button.click(
            _handler(gradio, serving),
            [prompt, preset, seed, image],
            [told, video],
            concurrency_limit=MAX_FOLLOWED,
        )
    return page


def _handler(gradio: Any, serving: service.Service) -> Callable[..., Told]:
    def render(
        prompt: str, preset: str, seed: str, image: str | None, request: gradio.Request
    ) -> Told:
        try:
            who = access.visitor(request.request)
            if not who.may_submit:
                raise access.Forbidden(f"{who.name} has no scope submit")
            yield from _follow(serving, who, _submit(serving, who, prompt, preset, seed, image))
        except errors.InvalidInput as error:
            told = "; ".join(problem.message for problem in error.problems)  # all of one prompt
            raise gradio.Error(told, print_exception=False) from None
        except presets.FolderMissing as error:
            told = problems.outage(error, path=PATH)
            raise gradio.Error(told, print_exception=False) from None
        except errors.RushesError as error:
            raise gradio.Error(str(error), print_exception=False) from None
        except SQLAlchemyError:
            told = "the database does not answer: what was submitted goes on, look for it later"
            raise gradio.Error(told, print_exception=False) from None

    return render


def _submit(
    serving: service.Service,
    who: access.Principal,
    prompt: str,
    preset: str,
    seed: str,
    image: str | None,
) -> int:
    """The id of the job."""
    pictures = batches.images_for(serving, who)
    row: dict[str, Any] = {"prompt": prompt}
    if seed.strip():
        row["seed"] = int(seed) if seed.strip().isdecimal() else seed
    if image is not None:
        row["image"] = pictures.give(Path(image).read_bytes())
    options = batches.options(serving, serving.preset(preset or ""), who)
    made = serving.submit_rows([row], options=options, pictures=pictures)
    with serving.db.reading() as session:
        return queries.jobs(session, made.batch_id, limit=1)[0].id


def _follow(serving: service.Service, who: access.Principal, job_id: int) -> Told:
    """How far it is, again and again; at the end its video."""
    while True:
        job = videos.show(job_id, serving, who)
        player = ""
        if job["video"] is not None:
            address = f"/api/jobs/{job_id}/video"
            player = f'<video controls autoplay muted width="100%" src="{address}"></video>'
        yield _words(job), player
        if job["state"] in states.FINAL_JOB_STATES:
            return
        time.sleep(LOOK_SECONDS)


def _words(job: dict[str, Any]) -> str:
    told = f"[Job {job['job_id']}](/jobs/{job['job_id']}), seed {job['seed']}: {job['state']}"
    held = job["attempts"][-1] if job["attempts"] else None
    if job["state"] == states.JobState.RUNNING and held and held["stage"]:
        told += f", {held['stage']} {held['step']} of {held['steps']}"
    if job["error"]:
        told += f" ({job['error']['message']})"
    return told
