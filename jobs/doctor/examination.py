"""All checks, in the order in which people read them."""

from collections.abc import Callable, Iterator

from jobs import errors, settings
from jobs.doctor import (
    broker,
    checks,
    configuration,
    database,
    devices,
    machine,
    presets,
    processes,
    results,
    weights,
)

PARTS: dict[str, Callable[[settings.Settings], Iterator[checks.Check]]] = {
    "settings": configuration.check,
    "rendering": configuration.check_rendering,
    "misspelt": configuration.check_misspelt,
    "database": database.check,
    "broker": broker.check,
    "results": results.check,
    "ffmpeg": machine.check_ffmpeg,
    "scratch": machine.check_scratch,
    "shared_memory": machine.check_shared_memory,
    "devices": devices.check,
    "presets": presets.check,
    "weights": weights.check,
    "processes": processes.check,
}


def examine() -> Iterator[checks.Check]:
    """Every check, as soon as it is done. One that fails stops no other."""
    try:
        config = settings.load()
    except errors.RushesError as error:
        yield checks.fail("settings", str(error), "correct these values; docs/configuration.md")
        return
    for name, check in PARTS.items():
        try:
            yield from check(config)
        except Exception as error:  # what this check did not expect: the others are worth having
            seen = f"{type(error).__name__}: {errors.first_line(error)}"
            advice = "look at this part yourself: its check met a defect in rushes"
            yield checks.fail(name, seen, advice)
