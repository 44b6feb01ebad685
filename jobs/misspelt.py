"""Names that look like settings of ours and are none: nothing reads them, and nothing fails."""

import difflib
import os
from dataclasses import dataclass

import structlog
from pydantic_settings import DotEnvSettingsSource

from jobs import parts, settings

log = structlog.get_logger()

PREFIX = "RUSHES_"
NO_SETTINGS = frozenset(
    {
        "RUSHES_DEBUG",  # jobs.cli.failures
        "RUSHES_STOP_GRACE_PERIOD",  # docker-compose.yml
        "RUSHES_CHAOS_SKEW_SECONDS",  # tests/chaos
        "RUSHES_TEST_CABLES",  # tests/chaos
    }
)


@dataclass(frozen=True, kw_only=True)
class Misspelt:
    """A name with a value that nobody asks for."""

    name: str
    place: str
    """`environment` or `.env`."""
    nearest: str | None


def find() -> list[Misspelt]:
    """Those of the environment first. An empty value counts as none, as everywhere."""
    names = known_names()
    by_file = {
        f"{name}_FILE" for choices in settings.environment_names().values() for name in choices
    }
    dotenv = DotEnvSettingsSource(settings.Settings).env_vars
    given = {name.upper(): ".env" for name, value in dotenv.items() if value}
    given |= {name.upper(): "environment" for name, value in os.environ.items() if value}
    return [
        Misspelt(name=name, place=place, nearest=_nearest(name, names))
        for name, place in sorted(given.items(), key=lambda pair: (pair[1] == ".env", pair[0]))
        if name.startswith(PREFIX)
        and name not in names
        and not (place == "environment" and name in by_file)
    ]


def warn() -> None:
    """What keeps running says it once, at its start."""
    for each in find():
        log.warning("setting.unknown", name=each.name, place=each.place, nearest=each.nearest)


def known_names() -> frozenset[str]:
    """Every setting of every process of ours, and what is read beside them."""
    of_workers = parts.WORKER_SETTINGS.load().model_fields.values()
    of_all = settings.environment_names().values()
    return NO_SETTINGS.union(*of_all, *(info.validation_alias.choices for info in of_workers))


def _nearest(name: str, names: frozenset[str]) -> str | None:
    """Compared without the prefix, which would make any two of them alike."""
    bare = {known.removeprefix(PREFIX): known for known in sorted(names - NO_SETTINGS)}
    close = difflib.get_close_matches(name.removeprefix(PREFIX)[:64], bare, n=1)
    return bare[close[0]] if close else None
