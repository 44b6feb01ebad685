"""What is wrong with a form, each thing at its field."""

from dataclasses import dataclass, field

from jobs import errors, prompt_row, schedules, submission
from jobs.web import problems

TOLD = (
    errors.InvalidInput,
    errors.PresetError,
    errors.NotFound,
    errors.QuotaExceeded,
    errors.IdempotencyConflict,
)
"""Errors of a person's own making: the form is shown again with them."""
MOST_LINES = 20
RANGES = {
    "repeat": ("Videos per prompt", 1, submission.MAX_REPEAT),
    "priority": ("The priority", -prompt_row.MAX_PRIORITY, prompt_row.MAX_PRIORITY),
    "catch_up": ("The number of missed times", 1, schedules.MAX_CATCH_UP),
}
"""What a field of a whole number is called, the least and the most."""
STALE = "This form was too old and is fresh now: press the button again."


@dataclass
class Complaints:
    """Sentences by the field that they speak of; "" is the form as a whole."""

    by_field: dict[str, list[str]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.by_field)

    def add(self, name: str, text: str) -> None:
        """Once, however often it is found."""
        texts = self.by_field.setdefault(name, [])
        if text not in texts:
            texts.append(text)

    def add_error(self, error: errors.RushesError, *, at: str) -> None:
        if not isinstance(error, errors.InvalidInput):
            self.add(at, str(error))
            return
        for problem in error.problems[:MOST_LINES]:
            self.add(at, str(problem))
        if len(error.problems) > MOST_LINES:
            self.add(at, f"… and {len(error.problems) - MOST_LINES:,} more.")

    def add_outage(self, error: Exception, *, path: str) -> None:
        """One of `problems.OUTAGES`."""
        told = problems.outage(error, path=path)
        self.add("", f"{told.capitalize()}. Press the button again in a while.")

    def whole(self, name: str, text: str) -> int | None:
        """The number in a field; None, and a complaint, when there is none that will do."""
        found = number(text)
        words, least, most = RANGES[name]
        if type(found) is not int or not least <= found <= most:
            asked = f"a whole number from {least:,} to {most:,}"
            self.add(name, f"{words} must be {asked}, got {text[:40]!r}.")
            return None
        return found


def number(text: str) -> int | float | str | None:
    """As prompt files have it; what is none stays a text, and None is an empty field."""
    found: int | float | str = prompt_row.number(text)
    return None if found == "" else found
