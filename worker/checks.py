"""The user's safety checks, asked about one claimed job."""

import sys
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

from jobs import errors as job_errors
from jobs import lifecycle, safety, settings
from worker import errors
from worker import settings as worker_settings_module
from worker.settings import WorkerSettings

if TYPE_CHECKING:
    from torch import Tensor

HOSTS_FAULT_TRIES = 5
"""Attempts at a job in which a broken check is the host's fault. A service that is away for the
night must not fail a batch, and a prompt that breaks the check must not keep the farm busy."""

_ONE_AT_A_TIME = threading.Lock()
"""The end of one video is looked at beside the beginning of the next."""


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Those that are configured; by default none."""

    prompt: safety.Check | None = None
    frames: safety.Check | None = None

    @classmethod
    def load(cls, config: settings.Settings, worker_settings: WorkerSettings) -> Self:
        """InvalidInput when one cannot be loaded."""
        return cls(
            prompt=safety.load(config.prompt_check, setting="RUSHES_PROMPT_CHECK"),
            frames=safety.load(worker_settings.frame_check, setting="RUSHES_FRAME_CHECK"),
        )

    def look_at_prompt(self, claim: lifecycle.Claim) -> None:
        """Refused, or CheckBroken; else nothing speaks against it."""
        if self.prompt is not None:
            asked = safety.Prompt(
                prompt=claim.spec.prompt,
                negative_prompt=claim.spec.negative_prompt,
                metadata=claim.meta,
            )
            _ask(self.prompt, asked, claim)

    def of_frames(self, claim: lifecycle.Claim) -> "FrameCheck":
        return FrameCheck(self.frames, claim)


@dataclass
class FrameCheck:
    """Looks at one video, piece by piece."""

    check: safety.Check | None
    claim: lifecycle.Claim
    seen: int = field(default=0, init=False)

    def look_at(self, frames_THWC: "Tensor") -> None:
        """The next frames: uint8 RGB on the CPU. Refused, or CheckBroken."""
        if self.check is None:
            return
        array = frames_THWC.numpy()
        array.flags.writeable = False
        asked = safety.Frames(
            job_id=self.claim.job_id,
            prompt=self.claim.spec.prompt,
            first=self.seen,
            frames_THWC=array,
        )
        self.seen += len(array)
        with _ONE_AT_A_TIME:
            _ask(self.check, asked, self.claim)


def _ask(check: safety.Check, asked: safety.Prompt | safety.Frames, claim: lifecycle.Claim) -> None:
    try:
        reason = check.refusal(asked)
    except safety.CheckBroken as error:
        if claim.number > HOSTS_FAULT_TRIES:
            raise errors.CheckBreaksAgain(str(error)) from error
        raise errors.CheckBroken(str(error)) from error
    if reason is not None:
        raise errors.Refused(reason)


def main() -> int:
    """For launchers, which must not load what a check may load: whether all can be."""
    try:
        Checks.load(settings.load(), worker_settings_module.load())
    except job_errors.InvalidInput as error:
        sys.stderr.write(" ".join(error.problems[0].message.split()) + "\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
