"""Events for those who asked to be told: written in the transaction that makes them true.

So none is told that did not happen, and none is lost that did. `notifier` sends what lies here.
"""

import secrets
from collections.abc import Mapping
from typing import Any

from sqlalchemy import or_, select
from sqlalchemy.orm import Session

from jobs import database
from jobs.schema import Batch, Listener, Notice

BATCH_FINISHED = "batch.finished"
RESULTS_WRITTEN = "batch.results_written"
SCHEDULE_FAILED = "schedule.failed"
TEST = "test"
EVENTS = {
    BATCH_FINISHED: "Every job of a batch has ended.",
    RESULTS_WRITTEN: "Its `manifest.json` is written, so its result files are complete.",
    SCHEDULE_FAILED: "A fire time of a schedule made no batch, because its prompts were bad.",
}
"""What can be asked for."""


def tell(session: Session, event: str, *, owner: str, data: Mapping[str, Any]) -> int:
    """Leave an event of this owner for everybody who asked; how many did."""
    listeners = session.scalars(
        select(Listener)
        .where(Listener.stopped_at.is_(None))
        .where(or_(Listener.owner.is_(None), Listener.owner == owner))
        .order_by(Listener.id)
    ).all()
    told = [listener for listener in listeners if event in listener.events]
    for listener in told:
        add(session, listener, event, data)
    return len(told)


def add(session: Session, listener: Listener, event: str, data: Mapping[str, Any]) -> Notice:
    """One event for one listener, due at once."""
    now = database.now(session)
    notice = Notice(
        message_id=f"msg_{secrets.token_hex(16)}",
        listener_id=listener.id,
        event=event,
        body={"type": event, "timestamp": now.isoformat(), "data": dict(data)},
        created_at=now,
        next_try_at=now,
        tries=0,
    )
    session.add(notice)
    session.flush()
    return notice


def batch_ended(session: Session, event: str, batch_id: str, **more: Any) -> int:
    """BATCH_FINISHED or RESULTS_WRITTEN, with what there is to say of the batch."""
    batch = session.get_one(Batch, batch_id, populate_existing=True)
    data = {
        "batch_id": batch.id,
        "name": batch.name,
        "owner": batch.owner,
        "preset": batch.preset,
        "state": batch.state,
        "created_at": batch.created_at.isoformat(),
        "finished_at": None if batch.finished_at is None else batch.finished_at.isoformat(),
        "counts": {
            "total": batch.total,
            "succeeded": batch.succeeded,
            "failed": batch.failed,
            "cancelled": batch.cancelled,
        },
    }
    return tell(session, event, owner=batch.owner, data=data | more)
