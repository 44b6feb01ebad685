"""The page: single jobs, finished videos, and two of them side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response
from sqlalchemy.orm import Session

from jobs import queries, requests, states
from jobs.schema import Batch, Job
from jobs.web import access, finding, html, videos
from jobs.web.batches import Serving
from jobs.web.videos import JobId

router = APIRouter(include_in_schema=False, route_class=access.FormRoute)

CARDS = 12
BATCHES_AT_ONCE = 50
MOST_BATCHES = 500  # looked at for one page; those without videos take no time to speak of
MOST_COMPARED = 4
FRAME_DIGITS = 12  # of the first frame's SHA-256: enough to tell it from others
WEIGHTS = ("transformer", "high_noise_transformer", "low_noise_transformer", "quantization")
NEIGHBOURS = 24  # repetitions of a prompt stand beside each other in their batch


@router.get("/jobs/{job_id}")
def show(job_id: JobId, request: Request, serving: Serving, who: access.Reader) -> Response:
    job = videos.show(job_id, serving, who)
    with serving.db.reading() as session:
        siblings = _siblings(session, job)
    return html.page(
        request,
        "job.html",
        who=who,
        job=job,
        last=job["attempts"][-1] if job["attempts"] else None,
        is_final=job["state"] in states.FINAL_JOB_STATES,
        settings=settings_of(job, job["look"]),
        siblings=siblings,
    )


def _siblings(session: Session, job: Mapping[str, Any]) -> list[Job]:
    after = job["position"] - NEIGHBOURS - 1
    near = queries.jobs(session, job["batch_id"], after=after, limit=2 * NEIGHBOURS + 1)
    same = ("prompt", "image_key", "look_id")
    return [
        row
        for row in near
        if row.seed != job["seed"] and all(getattr(row, key) == job[key] for key in same)
    ]


@router.post("/jobs/{job_id}/cancel")
def cancel(job_id: JobId, serving: Serving, who: access.FormSubmitter) -> Response:
    found = videos.cancel(job_id, serving, who)
    return html.go(f"/jobs/{job_id}", did="cancelled" if any(found.values()) else "unchanged")


@router.post("/jobs/{job_id}/pause")
def pause(job_id: JobId, serving: Serving, who: access.FormSubmitter) -> Response:
    changed = videos.pause(job_id, serving, who)["changed"]
    return html.go(f"/jobs/{job_id}", did="paused" if changed else "unchanged")


@router.post("/jobs/{job_id}/resume")
def resume(job_id: JobId, serving: Serving, who: access.FormSubmitter) -> Response:
    changed = videos.resume(job_id, serving, who)["changed"]
    return html.go(f"/jobs/{job_id}", did="resumed" if changed else "unchanged")


@router.post("/jobs/{job_id}/retry")
def retry(job_id: JobId, serving: Serving, who: access.FormSubmitter) -> Response:
    retried = videos.retry(job_id, serving, who)["retried"]
    return html.go(f"/jobs/{job_id}", did="retried" if retried else "nothing-retried")


@router.get("/gallery")
def gallery(
    request: Request,
    serving: Serving,
    who: access.Reader,
    batch: Annotated[str | None, Query(max_length=50)] = None,
    cursor: Annotated[str | None, Query(max_length=80)] = None,
    chosen: Annotated[list[int], Query()] = [],  # noqa: B006  # FastAPI copies it
) -> Response:
    """Batches newest first, in each its finished videos in the order of the file."""
    with serving.db.reading() as session:
        place = _Place.read(session, who, batch, cursor)
        cards, following = _cards(session, who, place)
        only = finding.batch(session, batch, who) if batch else None
    return html.page(
        request,
        "gallery.html",
        who=who,
        batch=only,
        cards=cards,
        chosen=chosen,
        cursor=cursor,
        next_url=html.address("/gallery", batch=batch, cursor=following) if following else None,
        first_url=html.address("/gallery", batch=batch) if cursor else None,
    )


@dataclass(frozen=True, kw_only=True)
class _Place:
    """After which video of which batch a page begins."""

    first: Batch | None
    """None: the newest."""
    position: int
    is_alone: bool
    """Only this batch is shown."""

    @classmethod
    def read(
        cls, session: Session, who: access.Principal, batch: str | None, cursor: str | None
    ) -> "_Place":
        """NotFound for a cursor of no batch."""
        batch_id, _, position = (cursor or "").partition(":")
        named = batch_id or batch
        is_number = position.isdecimal() and len(position) < 10
        return cls(
            first=finding.batch(session, named, who) if named else None,
            position=int(position) if is_number else -1,
            is_alone=batch is not None,
        )


def _cards(
    session: Session, who: access.Principal, place: _Place
) -> tuple[list[dict[str, Any]], str | None]:
    """The videos of a page, and the cursor of the next one."""
    cards: list[dict[str, Any]] = []
    for number, (batch, after) in enumerate(_batches(session, who, place)):
        if number >= MOST_BATCHES:
            return cards, f"{batch.id}:{after if after >= 0 else ''}"
        if not batch.succeeded:
            continue
        wanted = [states.JobState.SUCCEEDED]
        most = CARDS - len(cards) + 1
        found = queries.jobs(session, batch.id, states_wanted=wanted, after=after, limit=most)
        for job in found:
            if len(cards) == CARDS:
                return cards, f"{cards[-1]['batch_id']}:{cards[-1]['position']}"
            cards.append(_card(session, job, batch))
    return cards, None


def _batches(session: Session, who: access.Principal, place: _Place) -> Iterator[tuple[Batch, int]]:
    """Each with the position after which its videos are wanted."""
    if place.first is not None:
        yield place.first, place.position
        if place.is_alone:
            return
    cursor = None if place.first is None else place.first.id
    while found := finding.batches(session, who, limit=BATCHES_AT_ONCE, cursor=cursor):
        for batch in found:
            yield batch, -1
        cursor = found[-1].id


def _card(session: Session, job: Job, batch: Batch) -> dict[str, Any]:
    shape = {"preset": batch.preset, "seed": job.seed, "image_key": job.image_key}
    return {
        "job_id": job.id,
        "batch_id": batch.id,
        "position": job.position,
        "custom_id": job.custom_id,
        "prompt": job.prompt,
        "settings": settings_of(shape, queries.look(session, job)),
        "is_deleted": requests.video_deleted_at(session, job) is not None,
    }


@router.get("/compare")
def compare(
    request: Request,
    serving: Serving,
    who: access.Reader,
    job: Annotated[list[int], Query()] = [],  # noqa: B006  # FastAPI copies it
    batch: str | None = None,
    cursor: str | None = None,
) -> Response:
    """`batch` and `cursor`: of the page of the gallery on which they were chosen."""
    wanted = list(dict.fromkeys(job))
    back = html.address("/gallery", batch=batch, cursor=cursor, chosen=wanted)
    problem = None
    if not 2 <= len(wanted) <= MOST_COMPARED:
        problem = f"Choose 2 to {MOST_COMPARED} videos to compare, not {len(wanted)}."
        wanted = []
    shown = [_compared(videos.show(job_id, serving, who)) for job_id in wanted]
    return html.page(
        request,
        "compare.html",
        who=who,
        status=200 if problem is None else 422,
        problem=problem,
        back=back,
        shown=shown,
        different=_different([each["settings"] for each in shown]),
    )


def _compared(job: dict[str, Any]) -> dict[str, Any]:
    if job["video"] is None:
        raise videos.NoVideo(job["job_id"], job["state"], deleted_at=job["video_deleted_at"])
    return job | {"settings": [("prompt", job["prompt"]), *settings_of(job, job["look"])]}


def _different(settings: Sequence[Sequence[tuple[str, object]]]) -> set[str]:
    """The words whose values are not the same everywhere."""
    tables = [dict(each) for each in settings]
    words = {word for table in tables for word in table}
    return {word for word in words if len({str(table.get(word)) for table in tables}) > 1}


def settings_of(job: Mapping[str, Any], look: Mapping[str, Any]) -> list[tuple[str, object]]:
    """What made a video, beside its prompt, in words."""
    frames, fps = look["num_frames"], look["fps"]
    steps = "-".join(map(str, look["denoising_step_list"]))
    boundary = look.get("boundary_step_index")
    found: list[tuple[str, object]] = [
        ("preset", job["preset"]),
        ("seed", job["seed"]),
        ("first frame", PurePosixPath(job["image_key"] or "").name[:FRAME_DIGITS]),
        ("size", f"{look['width']}x{look['height']}"),
        ("length", f"{frames} frames, {frames / fps:.1f} s"),
        ("steps", f"{steps} ({look['step_rule']})"),
        ("second network from step", "" if boundary is None else boundary + 1),
        ("shift", f"{look['sample_shift']:g}"),
        ("model", look["model_path"]),
        ("base", "original" if look.get("base") == "original" else ""),
        ("weights", ", ".join(look[key] for key in WEIGHTS if look.get(key))),
        ("LoRA", ", ".join(_lora_words(lora) for lora in look.get("loras", ()))),
        ("decoded in", look.get("vae_dtype") or ""),
    ]
    return [(word, value) for word, value in found if value != ""]


def _lora_words(lora: Mapping[str, Any]) -> str:
    name = str(PurePosixPath(lora["path"]).with_suffix("")).removeprefix("loras/")
    words = [f"{lora.get('strength', 1):g}", *filter(None, [lora.get("name")])]
    return f"{name} ({', '.join(words)})"
