"""What one provider may take: requests a second, requests at once, failures in a row."""

import asyncio
import collections
import contextlib
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable

from mmsr_jax.tools.base import ToolError

MAX_CIRCUITS = 4096  # kept a provider; the web has more hosts than a run should remember


@dataclasses.dataclass(frozen=True)
class Limits:
    """The manners towards one provider."""

    rate: float = 10.0  # requests a second, on average
    burst: int = 10  # requests that may go out at once after a quiet time
    concurrency: int = 16  # requests under way at the same time
    breaker_failures: int = 20  # failures in a row that open the circuit
    breaker_seconds: float = 15.0  # how long it stays open before one request may probe

    def __post_init__(self):
        for name in ("rate", "breaker_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("burst", "concurrency", "breaker_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


class Bucket:
    """Token bucket. Tokens are reserved ahead, so callers pass in the order they came."""

    def __init__(self, rate: float, burst: int, clock: Callable[[], float]):
        self._rate, self._burst, self._clock = rate, burst, clock
        self._tokens, self._at = float(burst), clock()
        self._closed_until = float("-inf")

    def take(self, patience: float) -> float:
        """Reserves a token and says how many seconds from now it may be used.

        Raises:
            ToolError: "rate_limited" when that is longer than `patience`; nothing is reserved.
        """
        now = self._clock()
        tokens = min(self._tokens + (now - self._at) * self._rate, self._burst)
        wait = max((1 - tokens) / self._rate, self._closed_until - now, 0.0)
        if wait > patience:
            raise ToolError("rate_limited", f"the next request may go in {wait:.1f} s")
        self._tokens, self._at = tokens - 1, now
        return wait

    @property
    def closed(self) -> bool:
        """Is no token good now, whenever it was reserved?"""
        return self._closed_until > self._clock()

    def give_back(self) -> None:
        """Returns a reserved token that nobody used."""
        self._tokens += 1

    def close(self, seconds: float) -> None:
        """No token is good before `seconds` have passed: the provider said so."""
        self._closed_until = max(self._closed_until, self._clock() + seconds)


class Breaker:
    """Circuit breaker: closed, open after failures in a row, half open for one probe.

    A try belongs to the state that it entered in: one that began before the circuit opened, or
    before the probe, says nothing about it.
    """

    def __init__(self, failures: int, seconds: float, clock: Callable[[], float]):
        self._allowed, self._seconds, self._clock = failures, seconds, clock
        self._failures = 0
        self._opened: float | None = None
        self._probing = False
        self._state = 0  # counts openings and probes

    def enter(self, token: int | None = None) -> int:
        """Asks for a try -> the token with which `record` must report its outcome.

        Args:
            token: of a try that has waited since: is it still welcome?

        Raises:
            ToolError: "circuit_open".
        """
        if self._opened is None or token == self._state:
            return self._state
        left = self._opened + self._seconds - self._clock()
        if left > 0 or self._probing:
            when = f"next try in {left:.1f} s" if left > 0 else "one probe is under way"
            raise ToolError("circuit_open", f"{self._failures} failures in a row, {when}")
        self._probing = True
        self._state += 1
        return self._state

    def record(self, token: int, good: bool | None) -> None:
        """How a try went; None: it was given up before one could know."""
        if token != self._state:
            return
        probe, self._probing = self._probing, False
        if good:
            self._failures, self._opened = 0, None
        elif good is False:
            self._failures += 1
            if probe or self._failures >= self._allowed:
                self._opened = self._clock()
                self._state += 1


class Gate:
    """Everything that stands before one provider's door."""

    def __init__(
        self,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ):
        self._limits, self._clock, self._sleep = limits, clock, sleep
        self._slots = asyncio.Semaphore(limits.concurrency)
        self._breakers: collections.OrderedDict[str, Breaker] = collections.OrderedDict()
        self.bucket = Bucket(limits.rate, limits.burst, clock)

    def breaker(self, host: str = "") -> Breaker:
        """The provider's circuit; or, for one that visits the open web, that host's."""
        if host not in self._breakers:
            limits = self._limits
            self._breakers[host] = Breaker(
                limits.breaker_failures, limits.breaker_seconds, self._clock
            )
            if len(self._breakers) > MAX_CIRCUITS:
                self._breakers.popitem(last=False)
        self._breakers.move_to_end(host)
        return self._breakers[host]

    @contextlib.asynccontextmanager
    async def admitted(self, left: Callable[[], float]) -> AsyncIterator[None]:
        """Holds one of the slots, after waiting for it and for the rate limit.

        Args:
            left: seconds until the caller's deadline.

        Raises:
            ToolError: "rate_limited" at once when the rate limit would outlast the deadline.
        """
        async with self._slots:
            while (wait := self.bucket.take(left())) > 0:
                try:
                    await self._sleep(wait)
                except BaseException:
                    self.bucket.give_back()
                    raise
                if not self.bucket.closed:
                    break
                self.bucket.give_back()  # it was closed meanwhile: wait for that too
            yield
