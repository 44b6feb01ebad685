"""A user's own check of prompts and of frames: loaded by name, asked, and believed.

A check is a function that returns None, or why not in words that the submitter may read. What it
raises is a defect of the check and no refusal.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs import errors

if TYPE_CHECKING:
    import numpy as np

MAX_REASON_CHARS = 500


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What a check of prompts is given."""

    prompt: str
    negative_prompt: str | None
    metadata: dict[str, Any] | None
    """As the submitter gave it."""


@dataclass(frozen=True, kw_only=True)
class Frames:
    """What a check of frames is given: a piece of a video, in the order of the video."""

    job_id: int
    prompt: str
    first: int
    """Number of its first frame, from 0."""
    frames_THWC: "np.ndarray[Any, Any]"  # noqa: N815  # arrays carry their shapes in their names
    """uint8 RGB; must not be changed."""


class CheckBroken(errors.RushesError):
    """The check itself failed: it says nothing about what it was asked."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"the safety check {path} is broken: {reason}")


@dataclass(frozen=True)
class Check:
    """A function of the user's that may refuse."""

    path: str
    """`module:function`"""
    function: Callable[[Any], Any]

    def refusal(self, asked: Prompt | Frames) -> str | None:
        """Why not; None: nothing speaks against it. CheckBroken when there is no answer."""
        try:
            reason = self.function(asked)
        except Exception as error:  # the user's code may raise anything
            raise CheckBroken(self.path, f"{type(error).__name__}: {error}") from error
        if reason is None:
            return None
        if not isinstance(reason, str) or not reason.strip():
            raise CheckBroken(self.path, f"must return None or a reason as text, got {reason!r}")
        return f"refused by the safety check {self.path}: {reason.strip()[:MAX_REASON_CHARS]}"


def load(path: str | None, *, setting: str) -> Check | None:
    """The check of this name; None: there is none. InvalidInput names the setting."""
    if path is None:
        return None
    module, colon, name = path.partition(":")
    try:
        if not colon:
            raise ValueError("must be module:function")
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
        if not callable(found):
            raise TypeError("is not a function")
    except Exception as error:  # importing runs the user's code
        message = f"{setting}={path}: {type(error).__name__}: {error}"
        raise errors.invalid("settings", message) from error
    return Check(path, found)
