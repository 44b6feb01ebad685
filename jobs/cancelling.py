"""Cancelling a batch of any size, as the command line and the web service do it."""

from jobs import database, lifecycle


def cancel_batch(db: database.Database, batch_id: str) -> tuple[int, int]:
    """How many jobs were cancelled, and how many that run were asked to stop."""
    db.write(lifecycle.request_cancel, batch_id)
    cancelled, stopping = db.write(lifecycle.cancel_batch, batch_id)
    # A large batch in steps: nobody waits long for a lock, and the dispatcher would go on for us.
    while (more := db.write(lifecycle.cancel_batch, batch_id)) != (0, 0):
        cancelled, stopping = cancelled + more[0], stopping + more[1]
    return cancelled, stopping
