"""The workers and the dispatcher: who is alive."""

import contextlib
import time
from collections.abc import Iterator

from sqlalchemy.exc import SQLAlchemyError

from jobs import beat, broker, database, errors, queries, settings
from jobs.doctor import checks

KICK_SAMPLES = 10  # a dispatcher listens between its ticks, so one look may miss it


def check(config: settings.Settings) -> Iterator[checks.Check]:
    try:
        db = database.connect(config)
        if db.missing_file is None:
            with contextlib.closing(db), db.reading() as session:
                found = queries.live_workers(session)
            yield _workers(found)
    except (SQLAlchemyError, errors.RushesError):
        yield checks.warn("workers", "unknown: the database did not answer", "see above")
    yield _dispatcher(config)


def _workers(found: list[queries.LiveWorker]) -> checks.Check:
    alive = [live.worker.name for live in found if live.is_alive]
    silent = [live.worker.name for live in found if not live.is_alive]
    advice = "start one with `rushes worker`, or everything with `rushes up`"
    if not alive:
        return checks.warn("workers", "none is alive", advice)
    refusing = [refusal for live in found if live.is_alive for refusal in live.refusals]
    if refusing:
        seen = "; ".join(f"{each.worker}: {each.reason}" for each in refusing)
        advice = "mend these hosts; they try again by themselves (`rushes workers` says when)"
        return checks.warn("workers", f"some take no jobs for now: {seen}", advice)
    if idle := [live.worker.name for live in found if live.has_no_models]:
        seen = f"no models on the hosts of {', '.join(idle)}, which take nothing"
        advice = "put models there or mend RUSHES_MODELS_DIR; docs/operations.md"
        return checks.warn("workers", seen, advice)
    if silent:
        seen = f"{', '.join(silent)} silent, alive: {', '.join(alive)}"
        return checks.warn("workers", seen, "look at their logs, or `rushes workers forget NAME`")
    return checks.ok("workers", f"alive: {', '.join(alive)}")


def _dispatcher(config: settings.Settings) -> checks.Check:
    if beat.of_dispatcher(config).is_alive():
        return checks.ok("dispatcher", "alive on this machine")
    if _someone_listens(config):
        return checks.ok("dispatcher", "one listens on Redis")
    advice = "start one with `rushes dispatcher`, or everything with `rushes up`"
    return checks.warn("dispatcher", "none was seen, here or on Redis", advice)


def _someone_listens(config: settings.Settings) -> bool:
    """A dispatcher on any machine waits for kicks: the only one of us that uses BLPOP."""
    try:
        client = broker.Broker(config).redis
        for _ in range(KICK_SAMPLES):
            if any(entry.get("cmd") == "blpop" for entry in client.client_list()):
                return True
            time.sleep(0.1)
    except (*broker.UNAVAILABLE, errors.RushesError, ValueError):
        pass
    return False
