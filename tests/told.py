"""What `rushes doctor` says of one part."""

from collections.abc import Callable, Iterator

from jobs import settings
from jobs.doctor import checks


def told_by(
    check: Callable[[settings.Settings], Iterator[checks.Check]],
) -> dict[str, checks.Check]:
    """Its checks by name, with the settings as they are now."""
    return {found.name: found for found in check(settings.load())}
