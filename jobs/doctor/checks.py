"""One part that was looked at, in words."""

from dataclasses import dataclass
from typing import Literal

PROGRAM_SECONDS = 20.0  # that a check waits for a program of others


@dataclass(frozen=True, kw_only=True)
class Check:
    """One part, how it was found, and what to do (empty: nothing)."""

    name: str
    status: Literal["ok", "warn", "fail"]
    seen: str
    advice: str = ""


def ok(name: str, seen: str) -> Check:
    return Check(name=name, status="ok", seen=seen)


def warn(name: str, seen: str, advice: str) -> Check:
    return Check(name=name, status="warn", seen=seen, advice=advice)


def fail(name: str, seen: str, advice: str) -> Check:
    return Check(name=name, status="fail", seen=seen, advice=advice)
