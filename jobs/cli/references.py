"""What BATCH, JOB and BATCH|JOB mean on the command line."""

from sqlalchemy.orm import Session

from jobs import errors, queries
from jobs.schema import Batch, Job


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
        if reference.isdecimal() and "too short" not in str(error):
            raise errors.NotFound(
                f"no job {reference} and no batch that begins so: `rushes list` shows the batches"
            ) from error
        raise
