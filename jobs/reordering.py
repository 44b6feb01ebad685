"""After a change of order, as the command line and the web service make it."""

from jobs import bell, broker, database, errors, orders, queries, settings


def send_anew(config: settings.Settings, db: database.Database) -> str | None:
    """What was sent in the old order and has not begun comes back, and goes out in the new one.

    None, or why it still goes first.
    """
    with db.reading() as session:
        served = queries.live_workers_by_queue(session)
    try:
        connection = broker.Broker(config)
        for queue in sorted(served):
            recalled = connection.recall(queue)
            db.write(orders.unsend, recalled)
    except (errors.RushesError, ValueError) as error:
        return f"{error}; what was sent to the workers before still goes first"
    return bell.kick(config)
