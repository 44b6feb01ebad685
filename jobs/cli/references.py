"""What BATCH, JOB and BATCH|JOB mean on the command line."""

from sqlalchemy.orm import Session

from jobs import errors, queries
from jobs.schema import Batch, Job

MOST_NAMED = 3


def find(session: Session, reference: str) -> Batch | Job:
    """A job for `BATCH/...` and for a number that is one; else a batch."""
    if "/" in reference:
        return queries.find_job(session, reference)
    if reference.isdecimal():
        try:
            return queries.find_job(session, reference)
        except errors.NotFound:
            pass  # perhaps the beginning of a batch id, which begins with its day
    try:
        return queries.find_batch(session, reference)
    except errors.NotFound as error:
        if "too short" in str(error):
            raise
        if called := _called(session, reference):
            message = f"no batch {reference!r}; the job of this custom_id: {called}"
            raise errors.NotFound(message) from None
        if reference.isdecimal():
            raise errors.NotFound(
                f"no job {reference} and no batch that begins so: `rushes list` shows the batches"
            ) from error
        raise


def _called(session: Session, custom_id: str) -> str:
    """How to name the jobs of this custom_id; empty where there is none lately."""
    if not custom_id.isprintable():
        return ""
    found = queries.jobs_called(session, custom_id, limit=MOST_NAMED + 1)
    names = [f"{job.batch_id}/{custom_id}" for job in found[:MOST_NAMED]]
    return ", ".join(names) + (", ..." if len(found) > MOST_NAMED else "")
