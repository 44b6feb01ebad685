"""Tells the dispatchers that there is work, once it is stored."""

from jobs import broker, errors, settings


def kick(config: settings.Settings) -> str | None:
    """Wake the dispatchers; None, or why they wake by themselves a little later."""
    try:
        connection = broker.Broker(config)
        refusal = connection.kick()
        if refusal is None:
            return None
        reason = str(broker.BrokerUnavailable(connection.url, refusal.rstrip(".")))
    except errors.RushesError as error:
        reason = str(error)
    except Exception as error:  # who stored the jobs has yet to tell their ids
        seen = f"{type(error).__name__}: {errors.first_line(error)}"
        reason = f"{seen} (this is a defect in rushes)"
    return f"{reason}; the jobs are stored and start when it is back"
