"""The exit codes. docs/cli.md tells the same."""

from jobs import states

OK = 0
ERROR = 1
USAGE = 2
FINISHED_WITH_FAILURES = 3
CANCELLED = 4
TIMEOUT = 124
INTERRUPTED = 130


def of_batch(state: states.BatchState) -> int:
    """For a batch that is finished."""
    if state is states.BatchState.SUCCEEDED:
        return OK
    return CANCELLED if state is states.BatchState.CANCELLED else FINISHED_WITH_FAILURES
