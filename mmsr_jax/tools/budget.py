"""Money: what a run may spend on paid calls, and what it has spent."""

import contextlib
import contextvars
import dataclasses
import fcntl
import json
import logging
import math
import pathlib
import threading
import time
from collections.abc import Iterator

from mmsr_jax.tools.base import ToolError

_log = logging.getLogger(__name__)

# A service that says so bills nothing: services count answered requests only (SerpApi says so:
# https://serpapi.com/account-api). Any other end of a request that went out may well be billed.
NOT_BILLED = frozenset({"unauthorized", "quota", "rate_limited", "server_error"})
FREE_STATUSES = frozenset({401, 402, 403, 429})  # and 5xx: what `NOT_BILLED` is to HTTP


class SearchStopped(RuntimeError):
    """The run has to stop: searching makes no sense any more."""


class BudgetSpent(SearchStopped):
    """Its money is spent."""


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """What a run may spend on paid calls, all its restarts together. Prices: with the providers."""

    money: float = 0.0  # US dollars; 0: no limit

    def __post_init__(self):
        if not 0 <= self.money < math.inf:
            raise ValueError(f"budget.money must be at least 0 US dollars, not {self.money}")


class Hold:
    """Money set aside for one call in flight; `cost` may be corrected before it ends.

    The HTTP client tells it what becomes of the call's tries (`current` finds it): money is spent
    on what went out, and on nothing else.
    """

    def __init__(self, budget: "Budget", provider: str, price: float):
        self.cost = self.price = price
        self.provider, self._budget = provider, budget
        self.out = False  # the last try went out, and it is not known to be free
        self.doubts = 0  # earlier tries of which the same is true

    def sent(self) -> None:
        """A request begins to go out. From here on the service may bill it."""
        self.out = True

    def refused(self, status: int) -> None:
        """The service answered; some answers are known to cost nothing."""
        if status in FREE_STATUSES or status >= 500:
            self.out = False

    def again(self) -> bool:
        """May there be another try? The one before may be billed, so it needs money of its own."""
        if self.out:
            if not self._budget.widen(self):
                return False
            self.out, self.doubts = False, self.doubts + 1
        return True


_CURRENT: contextvars.ContextVar[Hold | None] = contextvars.ContextVar("hold", default=None)


def current() -> Hold | None:
    """The money set aside for the call that this task is part of; one request a call."""
    return _CURRENT.get()


class Budget:
    """Counts money, and refuses what would cost more than there is.

    Money is set aside before a call goes out, and corrected after it. Both are lines of the ledger,
    written under its lock, so processes that share a ledger share the money too. What a kill cuts
    off stays spent: the service may have billed it. Only an answer that costs more than the
    configured price can pass the limit, by the difference.

    Args:
      money: US dollars in all; 0 for no limit.
      ledger: a file to which every payment and correction is appended, a line each, and from which
        a continued run learns what it spent before; None keeps the count in memory only.
    """

    def __init__(self, money: float = 0.0, ledger: pathlib.Path | None = None):
        self.money = money
        self.calls = 0  # paid calls of this process
        self.stopped = ""  # why, once a call was refused
        self._unwritten = False  # and whether it was for want of a ledger, not of money
        self._total = 0.0  # spent, and set aside
        self._held = 0.0  # set aside by this process
        self._lock = threading.Lock()
        self._ledger = ledger
        self._read = 0  # bytes of the ledger that are counted
        self._catch_up()

    @property
    def spent(self) -> float:
        """US dollars, of all restarts and processes; theirs with what they have set aside."""
        return max(round(self._total - self._held, 9), 0.0)

    def _catch_up(self) -> None:
        """Counts what was appended to the ledger, by whomever."""
        if self._ledger is None or not self._ledger.exists():
            return
        with self._ledger.open("rb") as file:
            if file.seek(0, 2) < self._read:  # somebody began a new one: what was spent, was spent
                self._read = 0
            file.seek(self._read)
            lines, newline, _ = file.read().rpartition(b"\n")
        self._read += len(lines) + len(newline)
        for line in lines.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # empty, or cut by a kill
                self._total += float(json.loads(line)["cost"])

    @contextlib.contextmanager
    def hold(self, provider: str, price: float) -> Iterator[Hold]:
        """Sets `price` aside during a call, and spends it when the call was, or may be, billed.

        A call that ends well costs `Hold.cost`, one that fails its price, if its request went out
        and the service did not say that it bills nothing; tries before the last one come on top.

        Raises:
          ToolError: "budget", when the money does not suffice, or the payment cannot be written
            down; `stopped` then says so.
        """
        held = Hold(self, provider, price)
        if price and not self._set_aside(provider, price):
            raise ToolError("budget", self.stopped)
        token = _CURRENT.set(held)
        cost = None
        try:
            yield held
            cost = held.cost
        except ToolError as error:
            cost = 0.0 if error.kind in NOT_BILLED else None
            raise
        finally:
            _CURRENT.reset(token)
            if cost is None:
                cost = price if held.out else 0.0
            self._settle(held, cost + held.doubts * price)

    def widen(self, held: Hold) -> bool:
        """Sets the price of a call aside once more; False when the money does not suffice."""
        return not held.price or self._set_aside(held.provider, held.price)

    def _set_aside(self, provider: str, price: float) -> bool:
        try:
            with self._lock, self._alone():
                return self._granted(provider, price)
        except OSError as error:
            # Nobody wants to find out after a night that it trained on errors.
            self._unwritten = True
            self.stopped = f"payments cannot be written to {self._ledger}: {error.strerror}"
            return False

    def _granted(self, provider: str, price: float) -> bool:
        if self.money and self._total + price > self.money + 1e-9:
            self.stopped = (
                f"the budget of {self.money:g} US dollars for search is spent: "
                f"{self.spent:.4f} paid, {self._held:.4f} in calls under way, and a call to "
                f"{provider} costs {price:g}"
            )
            return False
        self._write(provider, price)
        self._held += price
        return True

    def _settle(self, held: Hold, cost: float) -> None:
        """Puts what a call cost in the place of what was set aside for it."""
        aside = held.price * (1 + held.doubts)
        if not aside and not cost:
            return
        with self._lock:
            self._held -= aside
            self.calls += cost > 0
            if not round(cost - aside, 9):
                return
            try:
                with self._alone():
                    self._write(held.provider, round(cost - aside, 9))
            except OSError as error:  # the answer is paid for, and worth more than this line
                _log.warning("%s: a correction of %g US dollars is lost: %s", self._ledger,
                             cost - aside, error.strerror)  # fmt: skip

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Locks the ledger and reads what others wrote. Other processes wait, a line's time."""
        if self._ledger is None:
            yield
            return
        self._ledger.parent.mkdir(parents=True, exist_ok=True)
        with self._ledger.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # closing the file ends it, and so does a kill
            self._catch_up()
            yield

    def _write(self, provider: str, cost: float) -> None:
        if self._ledger is None:
            self._total += cost
        else:
            line = {"time": round(time.time(), 3), "provider": provider, "cost": cost}
            with self._ledger.open("ab") as file:  # one short write: whole, or not there
                file.write(b"\n" + json.dumps(line).encode() + b"\n")
            self._catch_up()

    def check(self) -> None:
        """Raises SearchStopped once a call was refused, BudgetSpent if for want of money."""
        if self._unwritten:
            raise SearchStopped(
                f"{self.stopped}. What was trained is saved; when they can be, the same command "
                "continues"
            )
        if self.stopped:
            raise BudgetSpent(
                f"{self.stopped}. What was trained is saved; a higher --tools.budget.money and "
                "the same command continue"
            )
