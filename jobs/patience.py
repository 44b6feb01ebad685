"""A PostgreSQL connection that does not wait for ever for an answer.

Keepalive notices a server that is gone. It does not notice a middleman (a connection pooler, a
load balancer, a tunnel) that keeps its side open and has forgotten the other.
"""

import contextlib
import time
from typing import Any, TypeVar

import psycopg
from psycopg.abc import PQGen

R = TypeVar("R")

LOOK_SECONDS = 0.1  # psycopg's own; also how often Ctrl-C is noticed
CANCEL_SECONDS = 2.0


class PatientConnection(psycopg.Connection[Any]):
    """OperationalError, and closed, after a statement without an answer in `answer_seconds`."""

    answer_seconds: float | None = None
    """None: as long as it takes."""
    is_pooled = False
    """Who answers is a pooler, which may lend another process of the server to each transaction."""
    _is_committing = False

    def beware_of_pooler(self) -> None:
        """Prepare no statements where another client of a pooler may have given theirs the name.

        One that does not keep track of them runs whatever goes by that name, without an error.
        """
        self.autocommit = True  # one round trip, not three
        row = self.execute("SELECT pg_backend_pid()").fetchone()
        self.autocommit = False
        assert row is not None
        # A pooler tells a number of its own when a client connects.
        self.is_pooled = row[0] != self.info.backend_pid
        if self.is_pooled:
            self.prepare_threshold = None

    def commit(self) -> None:
        self._is_committing = True
        try:
            super().commit()
        finally:
            self._is_committing = False

    def wait(
        self, gen: PQGen[R], interval: float = LOOK_SECONDS, timeout: float | None = None
    ) -> R:
        if self.answer_seconds is not None:
            gen = self._limited(gen, self.answer_seconds)
        return super().wait(gen, interval, timeout)

    def _limited(self, gen: PQGen[R], seconds: float) -> PQGen[R]:
        """The same steps, each of which hears at least every `LOOK_SECONDS` that time passes."""
        deadline = time.monotonic() + seconds
        try:
            wanted = next(gen)
            while True:
                ready = yield wanted
                if not ready and time.monotonic() > deadline:
                    self._give_up()
                    raise psycopg.OperationalError(f"no answer within {seconds:.0f} s")
                wanted = gen.send(ready)
        except StopIteration as end:
            result: R = end.value
            return result

    def _give_up(self) -> None:
        """The server is told, for it would wait on for a lock, and hold those that it has."""
        # With an older libpq nothing limits how long the telling takes. A COMMIT that waits for a
        # synchronous standby would be told done if it were cancelled, and be lost with its server.
        if not self._is_committing and psycopg.capabilities.has_cancel_safe():
            with contextlib.suppress(psycopg.Error):
                self.cancel_safe(timeout=CANCEL_SECONDS)
        self.pgconn.finish()
