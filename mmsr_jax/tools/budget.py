"""Money: what a run may spend on paid calls, and what it has spent."""

import contextlib
import dataclasses
import json
import pathlib
import threading
import time
from collections.abc import Iterator

from mmsr_jax.tools.base import ToolError

# Errors after which nothing is billed: services count answered requests only (SerpApi says so:
# https://serpapi.com/account-api). After a timeout or a broken answer they may well have.
NOT_BILLED = frozenset({
    "unauthorized", "quota", "rate_limited", "server_error", "unreachable", "refused",
    "circuit_open", "budget", "upload",
})  # fmt: skip


class SearchStopped(RuntimeError):
    """The run has to stop: searching makes no sense any more."""


class BudgetSpent(SearchStopped):
    """Its money is spent."""


@dataclasses.dataclass(frozen=True)
class BudgetConfig:
    """What a run may spend on paid calls, all its restarts together. Prices: with the providers."""

    money: float = 0.0  # US dollars; 0: no limit

    def __post_init__(self):
        if self.money < 0:
            raise ValueError(f"budget.money must be at least 0 US dollars, not {self.money}")


class Hold:
    """Money set aside for one call in flight; `cost` may be corrected before it ends."""

    def __init__(self, price: float):
        self.cost = price


class Budget:
    """Counts money, and refuses what would cost more than there is.

    Args:
      money: US dollars in all; 0 for no limit.
      ledger: a file to which every payment is appended, a line each, and from which a continued
        run learns what it spent before, and one of several processes what the others spend; None
        keeps the count in memory only.
    """

    def __init__(self, money: float = 0.0, ledger: pathlib.Path | None = None):
        self.money = money
        self.spent = 0.0
        self.calls = 0  # paid calls of this process
        self.stopped = ""  # why, once a call was refused
        self._held = 0.0
        self._lock = threading.Lock()
        self._ledger = ledger
        self._read = 0  # bytes of the ledger that are counted
        self._catch_up()

    def _catch_up(self) -> None:
        """Counts what was appended to the ledger, by whomever."""
        if self._ledger is None or not self._ledger.exists():
            return
        with self._ledger.open("rb") as file:
            file.seek(self._read)
            lines, newline, _ = file.read().rpartition(b"\n")
        self._read += len(lines) + len(newline)
        for line in lines.splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # empty, or cut by a kill
                self.spent += float(json.loads(line)["cost"])

    @contextlib.contextmanager
    def hold(self, provider: str, price: float) -> Iterator[Hold]:
        """Sets `price` aside during a call, and spends it when the call was, or may be, billed.

        Raises:
          ToolError: "budget", when the money does not suffice; `stopped` then says so.
        """
        held = Hold(price)
        with self._lock:
            if price and self.money:
                self._catch_up()
            after = self.spent + self._held + price
            if price and self.money and after > self.money + 1e-9:
                self.stopped = (
                    f"the budget of {self.money:g} US dollars for search is spent: "
                    f"{self.spent:.4f} paid, {self._held:.4f} in calls under way, and a call to "
                    f"{provider} costs {price:g}"
                )
                raise ToolError("budget", self.stopped)
            self._held += price
        billed = True
        try:
            yield held
        except ToolError as error:
            billed = error.kind not in NOT_BILLED
            raise
        finally:
            with self._lock:
                self._held -= price
                if billed and held.cost:
                    self._spend(provider, held.cost)

    def _spend(self, provider: str, cost: float) -> None:
        self.calls += 1
        if self._ledger is None:
            self.spent += cost
        else:
            line = {"time": round(time.time(), 3), "provider": provider, "cost": cost}
            self._ledger.parent.mkdir(parents=True, exist_ok=True)
            with self._ledger.open("ab") as file:  # one short write: whole, or not there
                file.write(b"\n" + json.dumps(line).encode() + b"\n")
            self._catch_up()

    def check(self) -> None:
        """Raises BudgetSpent once a call was refused for want of money."""
        if self.stopped:
            raise BudgetSpent(
                f"{self.stopped}. What was trained is saved; a higher --tools.budget.money and "
                "the same command continue"
            )
