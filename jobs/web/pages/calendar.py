"""The page: schedules."""

import dataclasses
import re
from dataclasses import dataclass
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from pydantic import ValidationError

from jobs import cron, errors, one_line
from jobs.web import access, bodies, html, problems, service, timetable
from jobs.web.batches import Serving
from jobs.web.pages import complaints, submitting
from jobs.web.pages.complaints import Complaints
from jobs.web.pages.submitting import Text
from jobs.web.timetable import Name

router = APIRouter(prefix="/schedules", include_in_schema=False, route_class=access.FormRoute)

ROWS = 50
HISTORY = 50
WORDS = (
    (re.compile(r"\bname\b"), "name"),
    (re.compile(r"zone"), "zone"),
)
"""What a message speaks of, and its field; the first that fits counts."""
LONG = {
    "name": "The name may have at most {:,} characters.",
    "prompts": "There may be at most {:,} prompts.",
}
"""What is told of a field that is too long."""


@dataclass(frozen=True, kw_only=True)
class Given:
    """What came with the form, as it was typed."""

    name: Text = ""
    preset: Text = ""
    cron: Text = ""
    zone: Text = "UTC"
    prompts: Text = ""
    lists: Text = ""
    repeat: Text = "1"
    priority: Text = "0"
    misfire: Text = "run_once"
    catch_up: Text = "3"
    overlap: Text = "queue"


@router.get("")
def list_schedules(
    request: Request,
    serving: Serving,
    who: access.Reader,
    after: Annotated[str, Query(max_length=200)] = "",
) -> Response:
    """By name."""
    return _list(request, serving, who, after=after, given=Given(), found={})


def _list(
    request: Request,
    serving: service.Service,
    who: access.Principal,
    *,
    after: str = "",
    given: Given,
    found: dict[str, list[str]],
    status: int = 200,
) -> Response:
    every = timetable.list_schedules(serving, who)["schedules"]
    rows = [row for row in every if row["name"] > after]
    following = rows[ROWS - 1]["name"] if len(rows) > ROWS else None
    texts = dataclasses.asdict(given)
    choices = submitting.preset_choices(serving, who, given=given.preset) if who.is_admin else []
    return html.page(
        request,
        "schedules.html",
        who=who,
        status=status,
        here=html.address("/schedules", after=after or None),
        schedules=rows[:ROWS],
        next_url=html.address("/schedules", after=following) if following else None,
        first_url="/schedules" if after else None,
        presets=choices,
        given=texts | {"preset": given.preset or serving.config.default_preset or ""},
        errors=found,
    )


@router.post(
    "",
    form_limits={
        "max_part_size": bodies.MAX_TYPED_BYTES,
        "max_fields": bodies.MAX_TYPED_FIELDS,
    },
)
def add(
    request: Request,
    serving: Serving,
    who: access.Admin,
    is_own: access.IsOwnForm,
    given: Annotated[Given, Depends()],
) -> Response:
    found = Complaints()
    if not is_own:
        found.add("", complaints.STALE)
        return _list(request, serving, who, given=given, found=found.by_field, status=403)
    status = 422
    try:
        _add(serving, who, given, found)
    except complaints.TOLD as error:
        _complain(error, found)
    except problems.AWAY as error:
        status = 503
        found.add_outage(error, path=request.url.path)
    if found:
        return _list(request, serving, who, given=given, found=found.by_field, status=status)
    return html.go(_path(given.name.strip()), did="added")


def _add(serving: service.Service, who: access.Principal, given: Given, found: Complaints) -> None:
    typed = given.prompts.splitlines()
    lines = [line.strip() for line in typed if not one_line.is_blank(line)]
    if not lines:
        found.add("prompts", "Type a prompt: each line is a video of every batch.")
    if one_line.is_blank(given.name):
        found.add("name", "Give the schedule a name.")
    for field, rule, zone in (("cron", given.cron, "UTC"), ("zone", "@daily", given.zone)):
        try:
            cron.parse(rule.strip(), zone.strip())
        except ValueError as error:
            found.add(field, str(error))
    numbers = {
        name: found.whole(name, getattr(given, name)) for name in ("repeat", "priority", "catch_up")
    }
    lists = _lists(given.lists, found)
    if found:
        return
    try:
        new = timetable.NewSchedule.model_validate(
            numbers
            | {
                "name": given.name.strip(),
                "cron": given.cron.strip(),
                "zone": given.zone.strip(),
                "preset": given.preset,
                "prompts": [{"prompt": line} for line in lines],
                "misfire": given.misfire,
                "overlap": given.overlap,
                "lists": lists,
            }
        )
    except ValidationError as error:
        for detail in error.errors():
            field, most = str(detail["loc"][0]), detail.get("ctx", {}).get("max_length")
            told = f"{field}: {detail['msg']}"
            found.add(field, LONG[field].format(most) if most and field in LONG else told)
        return
    timetable.add(new, serving, who)


def _lists(text: str, found: Complaints) -> dict[str, list[str]]:
    """style=noir,anime, a list per line."""
    lists: dict[str, list[str]] = {}
    for line in filter(None, (line.strip() for line in text.splitlines())):
        name, equals, items = line.partition("=")
        if not equals or not name.strip():
            found.add("lists", f"{line[:60]!r} is no list: write it as style=noir,anime")
        elif name.strip() in lists:
            found.add("lists", f"{name.strip()[:60]!r} is there twice: write its items in one line")
        lists[name.strip()] = [item.strip() for item in items.split(",") if item.strip()]
    return lists


def _complain(error: errors.RushesError, found: Complaints) -> None:
    if not isinstance(error, errors.InvalidInput):
        found.add_error(error, at="preset" if isinstance(error, errors.NotFound) else "")
        return
    for problem in error.problems[: complaints.MOST_LINES]:
        if error.source == "lists":
            found.add("lists", problem.message)
        elif problem.line is not None or error.source.startswith("prompts"):
            found.add("prompts", str(problem))
        else:
            fits = (field for word, field in WORDS if word.search(problem.message))
            found.add(next(fits, ""), problem.message)


@router.get("/{name}")
def show(name: Name, request: Request, serving: Serving, who: access.Reader) -> Response:
    row = timetable.show(name, serving, who)
    zone = cron.parse(row["cron"], row["zone"]).zone
    return html.page(
        request,
        "schedule.html",
        who=who,
        row=row,
        coming=[
            (moment, f"{moment.astimezone(zone):%a %Y-%m-%d %H:%M %Z}") for moment in row["coming"]
        ],
        firings=timetable.history(name, serving, who, limit=HISTORY)["firings"],
        key=_key(row),
        most=HISTORY,
    )


@router.post("/{name}/pause")
def pause(name: Name, serving: Serving, who: access.FormAdmin) -> Response:
    return _changed(name, "paused", timetable.pause(name, serving, who))


@router.post("/{name}/resume")
def resume(name: Name, serving: Serving, who: access.FormAdmin) -> Response:
    return _changed(name, "resumed", timetable.resume(name, serving, who))


@router.post("/{name}/run")
def run_now(name: Name, serving: Serving, who: access.FormAdmin, key: Text = "") -> Response:
    """To the batch that was made; pressed twice, it makes one."""
    row = timetable.show(name, serving, who)
    # The name may be that of another schedule than when the page was shown.
    of_this = submitting.key_of(key, (name, _since(row)))
    batch_id, is_new = timetable.fire(serving, name, key=of_this)
    return html.go(f"/batches/{batch_id}", did="submitted" if is_new else "again")


@router.post("/{name}/remove")
def remove(name: Name, serving: Serving, who: access.FormAdmin) -> Response:
    timetable.remove(name, serving, who)
    return html.go("/schedules", did="removed")


def _key(row: dict[str, Any]) -> str:
    """The same on all pages until the next batch is made: they make it once together."""
    return f"{_since(row)}-{row['batches_made']}"


def _since(row: dict[str, Any]) -> str:
    return f"{row['created_at']:%Y%m%d%H%M%S%f}"


def _changed(name: str, did: str, told: dict[str, Any]) -> Response:
    return html.go(_path(name), did=did if told["changed"] else "unchanged")


def _path(name: str) -> str:
    return f"/schedules/{quote(name, safe='')}"
