"""The settings: what is given, where it comes from, and what is misspelt."""

import contextlib
import os
import re
from collections.abc import Iterator

from pydantic import SecretStr

from jobs import broker, database, errors, misspelt, parts, settings
from jobs.doctor import checks

PASSWORD_IN_URL = re.compile(r"://[^/\s]*@")


def check(config: settings.Settings) -> Iterator[checks.Check]:
    for field, names in settings.environment_names().items():
        source = _source_of(config, names)
        if getattr(config, field) in (None, "", SecretStr("")):
            continue
        if source != "default" or field in ("home", "database_url", "broker_url", "results_url"):
            yield checks.ok(f"setting {names[0]}", f"{_shown(config, field)} ({source})")
    for problem in settings.problems_of_proxies(config.forwarded_allow_ips):
        yield checks.warn(
            "proxies", problem.message, "correct it for `rushes web`, which does not start"
        )


def check_rendering(_config: settings.Settings) -> Iterator[checks.Check]:
    """How workers that are started here, as this command was, would render."""
    try:
        found = parts.RENDERING_SETTINGS.load()()
    except errors.RushesError as error:
        yield checks.fail(
            "rendering settings", str(error), "correct these values; docs/configuration.md"
        )
        return
    for field in sorted(found.model_fields_set):
        name = str(type(found).model_fields[field].validation_alias.choices[0])
        source = f"environment {name}" if name in settings.exported_names() else ".env"
        shown = PASSWORD_IN_URL.sub("://***@", str(getattr(found, field)))
        yield checks.ok(f"setting {name}", f"{shown} ({source})")


def check_misspelt(_config: settings.Settings) -> Iterator[checks.Check]:
    for each in misspelt.find():
        meant = f"did you mean {each.nearest}?" if each.nearest else "remove it;"
        advice = f"{meant} docs/configuration.md names every setting"
        yield checks.warn(
            f"setting {each.name}", f"there is no such setting ({each.place})", advice
        )


def _source_of(config: settings.Settings, names: tuple[str, ...]) -> str:
    """Which of the places that `jobs.settings` reads gives this value."""
    up = settings.read_up_file(config.home)
    from_up = next((name for name in names if name in up), None)
    of_store = from_up in settings.RESULTS_NAMES
    if of_store and settings.is_store_of_up(up, config.results_url):
        return f"running `rushes up`, {from_up}"
    exported = settings.exported_names()
    for name in names:
        if name in exported:
            return f"environment {name}"
    for name in names:
        if os.environ.get(f"{name}_FILE"):
            return f"file named by {name}_FILE"
    if not settings.given_names().isdisjoint(names):
        return ".env"
    is_given = of_store and "RUSHES_RESULTS_URL" in settings.given_names()
    if from_up is not None and not is_given:
        return f"running `rushes up`, {from_up}"
    return "default"


def _shown(config: settings.Settings, field: str) -> str:
    if field == "database_url":
        with contextlib.suppress(errors.RushesError):
            return database.shown(database.connect(config).url)
    if field == "broker_url":
        return broker.shown(config.broker_url.get_secret_value())
    if field in ("aws_secret_access_key", "aws_session_token"):
        return "(secret)"
    return str(getattr(config, field))
