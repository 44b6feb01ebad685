"""What a program says while it runs, kept in memory: a disk for it may be full."""

import threading
from collections import deque
from typing import IO

MOST_LINES = 50
END_SECONDS = 1.0  # a program of its own that it left behind may hold the pipe open


class LastWords:
    """The last lines of a process, read as they come, so that it never waits to be heard."""

    def __init__(self, pipe: IO[bytes]) -> None:
        self._lines: deque[bytes] = deque(maxlen=MOST_LINES)
        self._reader = threading.Thread(target=self._read, args=(pipe,), daemon=True)
        self._reader.start()

    def end(self) -> None:
        """Call this when the process has ended."""
        self._reader.join(END_SECONDS)

    def text(self) -> str:
        """Ask when the process has ended."""
        self.end()
        return b"".join(tuple(self._lines)).decode(errors="replace").strip()

    def _read(self, pipe: IO[bytes]) -> None:
        # Closed here: whoever closes what another thread reads waits for it.
        with pipe:
            for line in pipe:
                self._lines.append(line)
