"""The self-test of one device, as its launcher sees it: a process, a time limit and a verdict."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs import servers
from worker import words

END_SECONDS = 5.0
LIMIT_SECONDS = 300.0  # torch from a cold disk takes a minute
COMMAND = (sys.executable, "-m", "worker.selftest")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """How a self-test ended."""

    failure: str | None
    """None: the device is good."""
    seconds: float
    facts: Mapping[str, Any] = field(default_factory=dict)


class Trial:
    """A self-test that has begun."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        """`environment` shows it the device and nothing else, as for a render process."""
        self._began = time.monotonic()
        self._process = subprocess.Popen(  # noqa: S603  # our own argument list, no shell
            [*servers.tied_to_parent(signal.SIGKILL), *COMMAND],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, **environment},
            start_new_session=True,
        )
        assert self._process.stdout is not None
        self._output = words.LastWords(self._process.stdout)

    def verdict(self) -> Verdict | None:
        """None while it runs; it is ended when that takes too long."""
        seconds = time.monotonic() - self._began
        status = self._process.poll()
        if status is None:
            if seconds < LIMIT_SECONDS:
                return None
            self.end()
            return Verdict(failure=f"no result within {LIMIT_SECONDS:.0f} s", seconds=seconds)
        told = self._told()
        if status != 0 or told is None:
            failure = f"its process ended with status {status}; the launcher's log says more"
            return Verdict(failure=failure, seconds=seconds)
        return Verdict(failure=told["failure"], facts=told["facts"], seconds=seconds)

    def end(self) -> None:
        """At once."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        # What sleeps in a driver outlives its kill; the launcher has other devices to look after.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)

    def _told(self) -> dict[str, Any] | None:
        lines = self._output.text().splitlines()
        with contextlib.suppress(ValueError):
            told = json.loads(lines[-1]) if lines else None
            if isinstance(told, dict) and {"failure", "facts"} <= told.keys():
                return told
        return None
