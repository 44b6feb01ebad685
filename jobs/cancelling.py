"""Cancelling a job, or a batch of any size, as the command line and the web service do it."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from jobs import database, orders, states
from jobs.schema import Job


def cancel_job(db: database.Database, job: Job) -> tuple[int, int]:
    """One of them is 1: it is cancelled, or runs and was asked to stop.

    (0, 0): it had ended, or was to stop already.
    """
    return db.write(_cancel_job, job.id)


def _cancel_job(session: Session, job_id: int) -> tuple[int, int]:
    asked = select(Job.state, Job.cancel_requested).where(Job.id == job_id).with_for_update()
    before = session.execute(asked).one()
    if before.state in states.FINAL_JOB_STATES or before.cancel_requested:
        return 0, 0
    state = orders.cancel_job(session, job_id)
    return int(state is states.JobState.CANCELLED), int(state is states.JobState.RUNNING)


def cancel_batch(db: database.Database, batch_id: str) -> tuple[int, int]:
    """How many jobs this cancels, and how many that run it asks to stop.

    Nothing of a batch that is being cancelled already.
    """
    # Counted at the request: a dispatcher that wakes in between cancels the same jobs for us.
    waiting, running = db.write(orders.request_cancel, batch_id)
    # A large batch in steps: nobody waits long for a lock, and the dispatcher would go on for us.
    while db.write(orders.go_on_cancelling, batch_id) != (0, 0):
        pass
    return waiting, running
