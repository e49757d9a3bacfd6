"""Trying several things at once until enough of them have worked."""

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from mmsr_jax.tools.base import ToolError

# Failures of the moment, or of our settings: asked again tomorrow, the same thing may work.
PASSING = frozenset({
    "timeout", "unreachable", "server_error", "rate_limited", "circuit_open", "quota", "budget",
    "unauthorized", "failed", "refused",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Tried:
    """What came of it."""

    good: tuple[Any, ...]  # in the order of the candidates
    errors: tuple[ToolError, ...]
    late: bool  # the time was over before enough had worked or failed
    enough: bool

    @property
    def complete(self) -> bool:
        """Would another try, later, find no more than this one?"""
        failing = any(error.kind in PASSING for error in self.errors)
        return self.enough or not (self.late or failing)


async def first_good(
    candidates: Sequence[Any],
    work: Callable[[Any], Awaitable[Any]],
    wanted: int,
    seconds: float,
) -> Tried:
    """Does `work` on the first `wanted` candidates side by side; who fails, the next one replaces.

    Args:
      work: raises ToolError when a candidate is no good. "budget" ends everything.
      seconds: for all together; what is done by then counts.

    Raises:
      ToolError: "budget".
    """
    waiting = list(enumerate(candidates))[::-1]
    good: dict[int, Any] = {}
    errors: list[ToolError] = []

    async def worker() -> None:
        while waiting:
            place, candidate = waiting.pop()
            try:
                good[place] = await work(candidate)
                return
            except ToolError as error:
                errors.append(error)
                if error.kind == "budget":
                    waiting.clear()
                    return

    tasks = [asyncio.ensure_future(worker()) for _ in range(min(wanted, len(candidates)))]
    late: set[asyncio.Future] = set()
    try:
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=max(seconds, 0.0))
    finally:
        for task in tasks:
            task.cancel()
    for task in tasks:
        if task not in late:
            task.result()  # anything but a ToolError is a defect, and shown as one
    for error in errors:
        if error.kind == "budget":
            raise error
    found = tuple(good[place] for place in sorted(good))
    return Tried(found, tuple(errors), bool(late), len(found) >= wanted)
