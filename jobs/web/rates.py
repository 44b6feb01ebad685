"""How often somebody may ask: counted in Redis by all processes together, without it by each."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

import redis
import structlog
from limits import RateLimitItem
from limits.storage import MemoryStorage, RedisStorage
from limits.strategies import MovingWindowRateLimiter
from redis.backoff import NoBackoff
from redis.retry import Retry

from jobs import errors

log = structlog.get_logger()

KEY_PREFIX = "rushes.rate"
ANSWER_SECONDS = 0.25  # a request waits for this before it is served
AWAY_SECONDS = 10.0  # without asking again
CLOCKS_SECONDS = 5.0  # may differ by this between those who count together


class TooManyRequests(errors.RushesError):
    """More than somebody may ask, or have under way at once."""

    def __init__(self, *, rate: str, wait_seconds: float) -> None:
        self.wait_seconds = wait_seconds
        super().__init__(f"more than {rate}: try again in {wait_seconds:.0f} s")


class Turns:
    """How many requests, of each owner and of all, hold something of this process for long.

    `waiting` more wait for a turn, as long as those who are refused are told to.
    """

    def __init__(
        self, most: int, *, of_all: int, what: str, wait_seconds: float, waiting: int = 0
    ) -> None:
        self._most, self._of_all, self._most_waiting = most, of_all, waiting
        self._what, self._wait_seconds = what, wait_seconds
        self._taken: Counter[str | None] = Counter()
        self._line: dict[object, str | None] = {}
        """Who waits, and whose they are, in the order in which they came."""
        self._freed = threading.Condition()

    def take(self, owner: str | None) -> None:
        """TooManyRequests: so many of his, or of all, are there, or were before him for too long.

        Who gives a turn back and takes one again goes behind those who wait.
        """
        with self._freed:
            if most := self._filled(owner):
                raise self._refused(most)
            me = object()
            self._line[me] = owner
            is_next = self._freed.wait_for(lambda: self._is_next(me), self._wait_seconds)
            del self._line[me]
            self._freed.notify_all()  # there may be a turn for the one behind, too
            if not is_next:
                raise self._refused(self._of_all if self._may_have(owner) else self._most)
            self._taken[owner] += 1

    def _filled(self, owner: str | None) -> int | None:
        """The limit that leaves no place in the line."""
        his = self._taken[owner] + list(self._line.values()).count(owner)
        if his >= self._most + self._most_waiting:
            return self._most
        everybodys = self._taken.total() + len(self._line)
        return self._of_all if everybodys >= self._of_all + self._most_waiting else None

    def _is_next(self, me: object) -> bool:
        first = (each for each, owner in self._line.items() if self._may_have(owner))
        return self._taken.total() < self._of_all and next(first, None) is me

    def _may_have(self, owner: str | None) -> bool:
        return self._taken[owner] < self._most

    def _refused(self, most: int) -> TooManyRequests:
        return TooManyRequests(rate=f"{most} {self._what}", wait_seconds=self._wait_seconds)

    @contextlib.contextmanager
    def taken(self, owner: str | None) -> Iterator[None]:
        """TooManyRequests, as `take`."""
        self.take(owner)
        try:
            yield
        finally:
            self.give_back(owner)

    def give_back(self, owner: str | None) -> None:
        with self._freed:
            self._taken[owner] -= 1
            self._taken += Counter()  # drops those at zero
            self._freed.notify_all()  # the first may be of an owner who has all that one may have


class Limiter:
    """Redis may come, go and forget: then each process counts alone, and nobody is locked out."""

    def __init__(self, rate: RateLimitItem, *, redis_url: str) -> None:
        self._rate = rate
        self._pool = redis.ConnectionPool.from_url(
            redis_url,
            socket_connect_timeout=ANSWER_SECONDS,
            socket_timeout=ANSWER_SECONDS,
            retry=Retry(NoBackoff(), 0),
        )
        self._shared = MovingWindowRateLimiter(
            RedisStorage(redis_url, connection_pool=self._pool, key_prefix=KEY_PREFIX)
        )
        self._own = MovingWindowRateLimiter(MemoryStorage())
        self._ask_from = 0.0  # of the monotonic clock

    def seconds_to_wait(self, who: str) -> float:
        """0: this request counts and may be served."""
        if time.monotonic() >= self._ask_from:
            try:
                wait = self._wait(self._shared, who)
            except (redis.RedisError, OSError) as error:
                # The next may lead elsewhere: a replica never takes what we count.
                self._pool.disconnect(inuse_connections=False)
                self._count_alone(str(error)[:200])
            else:
                if wait <= self._rate.get_expiry() + CLOCKS_SECONDS:
                    return wait
                self._count_alone("the clock of another web host is ahead of this one's")
        return self._wait(self._own, who)

    def _count_alone(self, reason: str) -> None:
        self._ask_from = time.monotonic() + AWAY_SECONDS
        log.warning("web.rates_not_shared", error=reason)

    def _wait(self, limiter: MovingWindowRateLimiter, who: str) -> float:
        if limiter.hit(self._rate, who):
            return 0.0
        reset = limiter.get_window_stats(self._rate, who).reset_time
        return max(reset - time.time(), 1.0)
