"""Our own API: schedules. Changes are for admin tokens: a schedule goes on by itself."""

import json
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field

from jobs import firing, prompt_row, schedules, shapes, states, submission
from jobs.web import access, answers, bodies, service
from jobs.web.batches import Serving

router = APIRouter(
    prefix="/api/schedules",
    tags=["schedules"],
    responses=answers.PROBLEMS,
    route_class=access.ApiRoute,
)

COMING = 5
Name = Annotated[str, Path(max_length=150)]


class NewSchedule(BaseModel):
    """A cron rule, and the prompts of its batches, which may have variables."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(min_length=1, max_length=150)
    cron: str = Field(max_length=200, examples=["30 2 * * *"])
    zone: str = Field("UTC", max_length=100)
    preset: str
    prompts: list[dict[str, Any]] = Field(min_length=1, max_length=service.MAX_ROWS)
    misfire: states.Misfire = states.Misfire.RUN_ONCE
    catch_up: int = Field(1, ge=1, le=schedules.MAX_CATCH_UP)
    overlap: states.Overlap = states.Overlap.QUEUE
    lists: dict[str, list[str]] = {}
    priority: int = Field(0, ge=-prompt_row.MAX_PRIORITY, le=prompt_row.MAX_PRIORITY)
    repeat: int = Field(1, ge=1, le=submission.MAX_REPEAT)


@router.post("", status_code=201, response_model=answers.Schedule)
def add(
    new: bodies.FewKeys[NewSchedule], serving: Serving, principal: access.Admin
) -> dict[str, Any]:
    """Its prompts are checked as for the first firing."""
    given = new.model_dump(exclude={"preset", "prompts"})
    made, _ = firing.add(
        serving.config,
        serving.db,
        schedules.NewSchedule(
            **given,
            owner=principal.owner,
            preset=serving.preset(new.preset),
            format="jsonl",
            prompts="".join(json.dumps(row) + "\n" for row in new.prompts),
        ),
    )
    with serving.db.reading() as session:
        return shapes.schedule(made, coming=schedules.coming(session, made, COMING))


@router.get("", response_model=answers.Schedules)
def list_schedules(serving: Serving, principal: access.Reader) -> dict[str, Any]:
    with serving.db.reading() as session:
        rows = schedules.every(session)
    return {
        "schedules": [
            shapes.schedule(row, coming=None) for row in rows if principal.may_see(row.owner)
        ]
    }


@router.get("/{name}", response_model=answers.Schedule)
def show(name: Name, serving: Serving, principal: access.Reader) -> dict[str, Any]:
    """With its next five fire times."""
    with serving.db.reading() as session:
        row = schedules.find(session, name, owner=principal.sees)
        return shapes.schedule(row, coming=schedules.coming(session, row, COMING))


@router.get("/{name}/history", response_model=answers.Firings)
def history(
    name: Name,
    serving: Serving,
    principal: access.Reader,
    limit: Annotated[int, Query(ge=1, le=schedules.MAX_HISTORY)] = 20,
) -> dict[str, Any]:
    """What became of its fire times, newest first."""
    with serving.db.reading() as session:
        row = schedules.find(session, name, owner=principal.sees)
        found = schedules.history(session, row.id, limit=limit)
    return {"firings": [shapes.firing(*pair) for pair in found]}


@router.post("/{name}/pause", response_model=answers.Changed)
def pause(name: Name, serving: Serving, principal: access.Admin) -> dict[str, Any]:
    changed = serving.db.write(schedules.pause, name)
    return {"name": name, "state": "paused", "changed": changed}


@router.post("/{name}/resume", response_model=answers.Changed)
def resume(name: Name, serving: Serving, principal: access.Admin) -> dict[str, Any]:
    """From now on; what fell into the pause is not made up for."""
    changed = serving.db.write(schedules.resume, name)
    return {"name": name, "state": "active", "changed": changed}


@router.post("/{name}/run", status_code=201, response_model=answers.Fired)
def run_now(name: Name, serving: Serving, principal: access.Admin) -> dict[str, Any]:
    """Make its next batch at once. 409 while another one is being made."""
    return {"batch_id": fire(serving, name)[0]}


def fire(serving: service.Service, name: str, *, key: str | None = None) -> tuple[str, bool]:
    """As `firing.fire_now`."""
    batch_id, is_new = firing.fire_now(serving.config, serving.db, name, key=key)
    serving.wake(is_new)
    return batch_id, is_new


@router.delete("/{name}", status_code=204)
def remove(name: Name, serving: Serving, principal: access.Admin) -> None:
    """With its history; its batches stay."""
    serving.db.write(schedules.remove, name)
