"""Errors that a caller can act on. The message says what was given and what would do."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime


class RushesError(Exception):
    """Base of everything that the command line reports in one line, without a traceback."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong with an input; `line` counts from 1, None is the whole file."""

    line: int | None
    message: str

    def __str__(self) -> str:
        return self.message if self.line is None else f"line {self.line}: {self.message}"


def first_line(error: BaseException) -> str:
    """What it says in short; of the database's own words, without the statement."""
    text = str(getattr(error, "orig", None) or error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


class InvalidInput(RushesError):
    """What a person typed or a file they gave cannot be used. Nothing was stored."""

    exit_code = 2

    def __init__(self, source: str, problems: Sequence[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        super().__init__(
            f"{source}: "
            + "; ".join(str(problem) for problem in self.problems[:3])
            + (f"; and {len(self.problems) - 3} more" if len(self.problems) > 3 else "")
        )


def invalid(source: str, *messages: str) -> InvalidInput:
    """Of the whole of it, not of a line."""
    return InvalidInput(source, [Problem(line=None, message=message) for message in messages])


class GpusUnknown(RushesError):
    """nvidia-smi is here and fails, and of the GPUs that we may use it lists none."""

    def __init__(self, said: str) -> None:
        self.said = said
        super().__init__(
            f"nvidia-smi is here and fails ({said}): "
            "repair the NVIDIA driver, or start workers with --devices cpu"
        )


class PresetError(RushesError):
    """A preset file cannot be used: the message names the file, the key and what would do."""

    exit_code = 2


class FileUnusable(RushesError):
    """A file or folder that a person named: the message names it and what would do."""

    exit_code = 2


class NotFound(RushesError):
    """No batch, job or preset of this name."""

    exit_code = 2


class QuotaExceeded(RushesError):
    """An owner would have more jobs queued than one may. Nothing was stored."""

    exit_code = 2

    def __init__(self, owner: str, *, queued: int, new: int, most: int) -> None:
        self.owner, self.queued, self.new, self.most = owner, queued, new, most
        super().__init__(
            f"{owner or 'nobody'} has {queued:,} jobs queued and this would add {new:,}: at most "
            f"{most:,} may be (RUSHES_MAX_QUEUED_PER_OWNER); wait, cancel some, or submit fewer"
        )


class BatchExpired(RushesError):
    """Of an old batch something was deleted that this needs."""

    exit_code = 2

    def __init__(self, batch_id: str, *, what: str, when: datetime) -> None:
        self.batch_id = batch_id
        super().__init__(
            f"batch {batch_id}: its {what} were deleted as old, {when:%Y-%m-%d %H:%M} UTC; "
            "submit its prompts again to render them again"
        )


class IdempotencyConflict(RushesError):
    """The idempotency key was used before, for other content."""

    exit_code = 2

    def __init__(self, key: str, batch_id: str) -> None:
        self.key = key
        self.batch_id = batch_id
        super().__init__(
            f"idempotency key {key!r} belongs to batch {batch_id}, which has other content: "
            "submit the same file and options again, or choose another key"
        )
