"""Groups for one update after another; with carry-over the slow ones are left in flight.

Without it a step ends with the slowest search of its last trajectory. With it a step takes the
groups that are complete, and the others stay in the engine across the change of weights: each of
their tokens remembers the policy that sampled it, and the loss corrects for the difference.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal

from mmsr_jax.agent.rollout import Ask, Rollouts
from mmsr_jax.types import Author, Trajectory


@dataclasses.dataclass(frozen=True)
class CarryConfig:
    """What stays in the engine at the end of a step."""

    questions: int = 0  # in flight beyond those of a step; 0: each step waits for all of its own
    staleness: int = 1  # updates between the weights a group began with and those it trains
    # Keys and values of trajectories in flight when the weights change: computed anew, or kept
    # (cheaper; what is then sampled is the new policy's word on the old one's reading).
    cache: Literal["recompute", "keep"] = "recompute"

    def check(self, prompts: int, sampler_correction: float) -> None:
        """Raises ValueError for what cannot be meant, before anything is sampled."""
        if self.questions < 0 or self.staleness < 1:
            raise ValueError(
                f"carry.questions is {self.questions} and carry.staleness {self.staleness}; "
                "at least 0 and 1"
            )
        if self.questions > self.staleness * prompts:
            raise ValueError(
                f"carry.questions is {self.questions}, but groups at most {self.staleness} updates "
                f"old (carry.staleness) at {prompts} a step (grpo.prompts) are no more than "
                f"{self.staleness * prompts}"
            )
        if self.questions and not sampler_correction > 0:
            raise ValueError(
                "carry.questions needs the truncated importance weight that corrects for tokens "
                "of older policies: set grpo.loss.sampler_correction, for example to 2"
            )


@dataclasses.dataclass(frozen=True)
class Drawn:
    """A question, and where it came from: what is in flight is asked again after a restart."""

    ask: Ask
    origin: dict  # state of the data before it was drawn, plain JSON


class Supply:
    """Hands out `prompts` complete groups at a time.

    A question that cannot be asked (see `Rollouts`) is replaced by another.
    """

    def __init__(
        self, rollouts: Rollouts, config: CarryConfig, prompts: int, draw: Callable[[], Drawn]
    ):
        """`draw` gives the next question."""
        self.rollouts, self.config, self.prompts, self.draw = rollouts, config, prompts, draw
        self.drawn = 0  # questions so far
        self._left = 1
        self._flying: dict[int, Drawn] = {}  # by ticket: not handed out yet
        self._complete: dict[int, list[Trajectory]] = {}

    def add(self, drawn: Drawn) -> None:
        self.drawn += 1
        self._flying[self.rollouts.add(drawn.ask)] = drawn

    @property
    def in_flight(self) -> list[Drawn]:
        """Questions whose groups have not been handed out, oldest first."""
        return [self._flying[ticket] for ticket in sorted(self._flying)]

    def take(self, left: int) -> list[list[Trajectory]]:
        """The next groups: those that may not grow older, then the oldest that are complete.

        There are `prompts` of them, or more when more may not wait (after slow searches have
        held up many questions of one step).

        Args:
          left: steps to come, this one included: nothing is asked that no step would learn from.
        """
        self._left = left
        self._fill()
        now = self.rollouts.engine.version
        groups = self.rollouts.groups()
        while not self._enough(now):
            ticket, group = next(groups)
            if not group:  # it could not be asked: another one takes its place
                del self._flying[ticket]
                self._fill()
                continue
            self._complete[ticket] = group
        due = [t for t, group in self._complete.items() if self._due(_oldest(group), now)]
        chosen = sorted(self._complete, key=lambda t: (t not in due, t))
        chosen = chosen[: max(self.prompts, len(due))]
        for ticket in chosen:
            del self._flying[ticket]
        return [self._complete.pop(ticket) for ticket in sorted(chosen)]

    def _fill(self) -> None:
        wanted = self.prompts + self.config.questions
        while len(self._flying) < min(wanted, self.prompts * self._left):
            self.add(self.draw())

    def _due(self, began: int, now: int) -> bool:
        """Whether a group would be too old for the update after this one."""
        if not self.config.questions:
            return True
        return now + 1 - began > self.config.staleness

    def _enough(self, now: int) -> bool:
        waits = any(self._due(began, now) for began in self.rollouts.unfinished.values())
        return len(self._complete) >= self.prompts and not waits


def _oldest(group: list[Trajectory]) -> int:
    """The oldest policy that sampled a token of the group."""
    return min(
        int(t.tokens.versions[t.tokens.authors == Author.MODEL].min(initial=2**31 - 1))
        for t in group
    )
