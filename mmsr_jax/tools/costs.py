"""What a training run costs in searches, with a store and without."""

import dataclasses
from collections.abc import Hashable, Iterable, Sequence

EPOCHS = 5


@dataclasses.dataclass(frozen=True)
class Calls:
    """Calls of one kind in a measured piece of training, and their price.

    Args:
      calls: that the policy made.
      distinct: different requests among them, of the first epoch.
      again: different requests that a later epoch made and no earlier one had.
      questions, samples: the piece of one epoch that was measured.
    """

    name: str
    price: float  # US dollars a live call
    calls: float  # an epoch
    distinct: float  # of an epoch, in the first
    again: float  # new ones in a later epoch
    questions: int
    samples: int

    def __post_init__(self):
        if not 0 <= self.distinct <= self.calls or not 0 <= self.again <= self.calls:
            raise ValueError(
                f"{self.name}: {self.distinct} distinct and {self.again} new ones of {self.calls} "
                "calls cannot be"
            )
        if self.questions < 1 or self.samples < 1:
            raise ValueError(f"{self.name}: {self.questions} questions, {self.samples} samples")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; money in US dollars."""

    name: str
    price: float
    calls: float
    money: float  # without a store, every call alone
    live: float
    money_stored: float  # with a store and joined calls


def measure(
    name: str,
    price: float,
    epochs: Sequence[Sequence[Hashable]],
    questions: int,
    samples: int,
) -> Calls:
    """Counts the requests of one kind that a policy made, epoch by epoch.

    Args:
      epochs: what was asked for, e.g. queries; equal ones are one live call.
    """
    if not epochs:
        raise ValueError(f"{name}: no epoch was measured")
    seen = set(epochs[0])
    first, fresh = len(seen), []
    for later in epochs[1:]:
        fresh.append(len(set(later) - seen))
        seen |= set(later)
    calls = sum(map(len, epochs)) / len(epochs)
    again = sum(fresh) / len(fresh) if fresh else 0.0
    return Calls(name, price, max(calls, first), first, again, questions, samples)


def estimate(
    measured: Iterable[Calls], questions: int = 4856, samples: int = 8, epochs: int = EPOCHS
) -> list[Row]:
    """The cost of `questions` x `samples` x `epochs`, by kind and in all.

    Calls grow with questions and samples, distinct requests with questions only: a group's samples
    share their question's picture, and ask for texts in few ways. So with more samples than were
    measured the cost with a store is a lower bound.

    Raises:
      ValueError: nothing to estimate.
    """
    if min(questions, samples, epochs) < 1:
        raise ValueError(f"{questions} questions x {samples} samples x {epochs} epochs are none")
    rows = []
    for kind in measured:
        size = questions / kind.questions
        calls = kind.calls * size * samples / kind.samples * epochs
        live = (kind.distinct + kind.again * (epochs - 1)) * size
        rows.append(Row(kind.name, kind.price, calls, calls * kind.price, live, live * kind.price))
    if not rows:
        raise ValueError("no kind of call to estimate the cost of")
    total = [sum(getattr(row, name) for row in rows) for name in ("calls", "money")]
    stored = [sum(getattr(row, name) for row in rows) for name in ("live", "money_stored")]
    return [*rows, Row("all", 0.0, *total, *stored)]


def table(rows: Iterable[Row]) -> str:
    """The rows as Markdown."""
    lines = [
        "| call | price $ | calls | $ without store | live calls | $ with store |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        price = f"{row.price:g}" if row.price else ""
        lines.append(
            f"| {row.name} | {price} | {row.calls:,.0f} | {row.money:,.2f} | {row.live:,.0f} | "
            f"{row.money_stored:,.2f} |"
        )
    return "\n".join(lines)
