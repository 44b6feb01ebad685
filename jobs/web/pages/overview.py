"""The page: batches, what can be done with them, and their jobs."""

from typing import Annotated, Literal

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import Response

from jobs import prompt_row, queries, states
from jobs.web import access, batches, finding, html
from jobs.web.batches import Serving

router = APIRouter(prefix="/batches", include_in_schema=False, route_class=access.FormRoute)

BATCHES = 25
JOBS = 50
Back = Annotated[str, Form()]


@router.get("")
def list_batches(
    request: Request,
    serving: Serving,
    who: access.Reader,
    cursor: Annotated[str | None, Query(max_length=50)] = None,
) -> Response:
    """Newest first."""
    found = batches.list_batches(serving, who, limit=BATCHES, cursor=cursor)
    following = found["next_cursor"]
    return html.page(
        request,
        "batches.html",
        who=who,
        batches=found["batches"],
        here="/batches" + (f"?cursor={cursor}" if cursor else ""),
        next_url=f"/batches?cursor={following}" if following else None,
        first_url="/batches" if cursor else None,
        most=prompt_row.MAX_PRIORITY,
    )


@router.get("/{batch_id}")
def show(
    batch_id: str,
    request: Request,
    serving: Serving,
    who: access.Reader,
    state: states.JobState | None = None,
    kind: states.FailureKind | None = None,
    quarantined: bool | None = None,
    custom_id: batches.CustomId = None,
    cursor: Annotated[int, Query(ge=-1, lt=2**31)] = -1,
) -> Response:
    custom_id = custom_id or None  # the field is sent empty, too
    batch = batches.show(batch_id, serving, who)
    found = batches.list_jobs(
        batch_id,
        serving,
        who,
        state=[] if state is None else [state],
        kind=[] if kind is None else [kind],
        quarantined=quarantined,
        custom_id=custom_id,
        limit=JOBS,
        cursor=cursor,
    )
    base = f"/batches/{batch_id}"
    following = found["next_cursor"]
    chosen = {
        "state": state,
        "kind": kind,
        "quarantined": quarantined,
        "custom_id": custom_id,
    }
    return html.page(
        request,
        "batch.html",
        who=who,
        batch=batch,
        jobs=found["jobs"],
        chosen=chosen,
        results=batches.result_links(batch_id, serving, who),
        here=html.address(base, **chosen, cursor=cursor if cursor >= 0 else None),
        next_url=html.address(base, **chosen, cursor=following) if following else None,
        first_url=html.address(base, **chosen) if cursor >= 0 else None,
    )


@router.post("/{batch_id}/cancel")
def cancel(batch_id: str, serving: Serving, who: access.FormSubmitter) -> Response:
    # Not by the numbers of the answer: a dispatcher may be faster, and count them for itself.
    with serving.db.reading() as session:
        was_open = finding.batch(session, batch_id, who).finished_at is None
    batches.cancel(batch_id, serving, who)
    return html.go(f"/batches/{batch_id}", did="cancelled" if was_open else "unchanged")


@router.post("/{batch_id}/pause")
def pause(batch_id: str, serving: Serving, who: access.FormSubmitter) -> Response:
    changed = batches.pause(batch_id, serving, who)["changed"]
    return html.go(f"/batches/{batch_id}", did="paused" if changed else "unchanged")


@router.post("/{batch_id}/resume")
def resume(batch_id: str, serving: Serving, who: access.FormSubmitter) -> Response:
    changed = batches.resume(batch_id, serving, who)["changed"]
    return html.go(f"/batches/{batch_id}", did="resumed" if changed else "unchanged")


@router.post("/{batch_id}/retry")
def retry(
    batch_id: str,
    serving: Serving,
    who: access.FormSubmitter,
    from_state: Annotated[Literal["failed", "cancelled"], Form(alias="states")] = "failed",
    kind: Annotated[states.FailureKind | None, Form()] = None,
    quarantined: Annotated[bool | None, Form()] = None,
) -> Response:
    kinds = [] if kind is None else [kind]
    wanted = batches.Retry(states=[from_state], kinds=kinds, quarantined=quarantined)
    done = batches.retry(batch_id, serving, who, wanted)
    did = "retried-paused" if done["batch_is_paused"] else "retried"
    return html.go(f"/batches/{batch_id}", did=did if done["retried"] else "nothing-retried")


@router.post("/{batch_id}/priority")
def prioritize(
    batch_id: str,
    serving: Serving,
    who: access.FormSubmitter,
    to: Annotated[str, Form()] = "",
    back: Back = "",
) -> Response:
    """To a number, or before all that waits."""
    with serving.db.reading() as session:
        batch = finding.batch(session, batch_id, who)
        now = batch.priority + batch.boost
        others = queries.highest_priority(session, but_not=batch.id) or 0
        highest = queries.highest_priority(session, of=batch.id)
    lead = (now if highest is None else highest) - others
    after = html.own_path(back, otherwise=f"/batches/{batch_id}")
    wanted = _priority(to, now=now, lead=lead)
    if wanted is None:
        return html.go(after, did="no-priority")
    new = batches.Priority(priority=wanted)
    changed = batches.prioritize(batch_id, new, serving, who)["changed"]
    moved_by = wanted - now if changed else 0
    return html.go(after, did=_done(to, changed=changed, moved_by=moved_by, lead=lead + moved_by))


def _done(to: str, *, changed: bool, moved_by: int, lead: int) -> str:
    if not changed or to != "first":
        return "moved" if moved_by else "unchanged"
    if lead <= 0:
        return "among-first" if lead == 0 else "below-others"
    return "first" if moved_by else "is-first"


def _priority(to: str, *, now: int, lead: int) -> int | None:
    """None for what is none.

    `lead` of its most urgent job over those of all others: some have priorities of their own.
    """
    most = prompt_row.MAX_PRIORITY
    if to == "first":
        return min(max(now + max(0, 1 - lead), -most), most)
    try:
        wanted = int(to)
    except ValueError:
        return None
    return wanted if -most <= wanted <= most else None
