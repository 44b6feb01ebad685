"""Cancelling a batch of any size, as the command line and the web service do it."""

from jobs import database, lifecycle


def cancel_batch(db: database.Database, batch_id: str) -> tuple[int, int]:
    """How many jobs this cancels, and how many that run it asks to stop.

    Nothing of a batch that is being cancelled already.
    """
    # Counted at the request: a dispatcher that wakes in between cancels the same jobs for us.
    waiting, running = db.write(lifecycle.request_cancel, batch_id)
    # A large batch in steps: nobody waits long for a lock, and the dispatcher would go on for us.
    while db.write(lifecycle.cancel_batch, batch_id) != (0, 0):
        pass
    return waiting, running
