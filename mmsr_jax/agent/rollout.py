"""Many episodes through one engine: nothing waits for a search but the episode that asked it."""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator

from mmsr_jax.agent import episode as episode_lib
from mmsr_jax.agent.episode import Episode, Setting
from mmsr_jax.engine.engine import Engine
from mmsr_jax.engine.requests import Request, Resume, SampledTurn, stream
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import Example, Trajectory


@dataclasses.dataclass(frozen=True)
class Ask:
    """Samples wanted of one question."""

    example: Example
    samples: int
    visit: int = 0  # tells times apart at which it is asked: each has fresh random streams
    forced: str = ""  # beginning of the first response, for constant policies


@dataclasses.dataclass
class _Open:
    """A question some of whose samples have not ended."""

    ask: Ask
    version: int  # of the engine's weights when it was admitted
    trajectories: list[Trajectory | None]
    missing: int


@dataclasses.dataclass
class _Live:
    """One sample in the engine."""

    ticket: int
    episode: Episode
    since: float  # perf_counter at the start


class Rollouts:
    """Questions in, complete groups out, in the order in which they become complete.

    Questions may be added at any time, also while groups are being taken out; what has not ended
    stays in the engine when the caller stops taking, across a change of weights if it likes.

        rollouts = Rollouts(engine, toolbox, setting, seed=0, temperature=1.0)
        tickets = [rollouts.add(ask) for ask in asks]
        for ticket, group in rollouts.groups():
            ...
    """

    def __init__(
        self,
        engine: Engine,
        toolbox: Toolbox,
        setting: Setting,
        *,
        seed: int,
        temperature: float,
        done: Callable[[int], None] = lambda n: None,
        skipped: Callable[[Ask, ValueError], None] | None = None,
    ):
        """Args:
        seed: run seed; with the example id, the visit and the sample index it names a trajectory's
          random stream, so the samples do not depend on their neighbours.
        temperature: 0 for greedy.
        done: called with the number of trajectories that have just ended.
        skipped: called when a question cannot be asked (broken picture, too long); without it the
          error is raised.
        """
        self.engine, self.toolbox, self.setting = engine, toolbox, setting
        self.seed, self.temperature = seed, temperature
        self.done, self.skipped = done, skipped
        self.tools_wait = 0.0  # seconds in which nothing but a tool was waited for
        self._waiting: collections.deque[tuple[int, Ask]] = collections.deque()
        self._open: dict[int, _Open] = {}
        self._live: dict[int, _Live] = {}  # by the engine's number
        self._calls: dict[concurrent.futures.Future, int] = {}  # running tool call -> number
        self._complete: collections.deque[tuple[int, list[Trajectory]]] = collections.deque()
        self._tickets = 0

    def add(self, ask: Ask) -> int:
        """Takes in a question; returns its ticket."""
        ticket, self._tickets = self._tickets, self._tickets + 1
        self._waiting.append((ticket, ask))
        return ticket

    @property
    def unfinished(self) -> dict[int, int]:
        """Ticket and `engine.version` at its start of each question that is not complete."""
        now = self.engine.version
        waiting = {ticket: now for ticket, _ in self._waiting}
        return {ticket: opened.version for ticket, opened in self._open.items()} | waiting

    def groups(self) -> Iterator[tuple[int, list[Trajectory]]]:
        """Complete groups (empty for a skipped question), until nothing is in flight.

        The caller may stop in between and ask again later.
        """
        while True:
            while self._complete:
                yield self._complete.popleft()
            if not (self._waiting or self._open):
                return
            self._look()

    def abandon(self) -> None:
        """Leaves nothing behind in the engine, whatever was in flight."""
        for number in self._live:
            self.engine.release(number)
        for kept in (self._live, self._calls, self._open, self._waiting, self._complete):
            kept.clear()

    def _look(self) -> None:
        """Moves everything on by one step of the engine, or waits for a tool if nothing can."""
        while self._room():
            self._admit(*self._waiting.popleft())
        turns = self.engine.step(self.temperature)
        for turn in turns:
            self._said(turn)
        if not (turns or self._calls or self._complete or self.engine.busy or self._room()):
            raise RuntimeError(
                f"{len(self._live)} trajectories of {len(self._open)} questions are in flight, but "
                "none of them can go on: somebody else uses the engine"
            )
        if self._calls and not self.engine.busy and not self._complete and not self._room():
            start = time.perf_counter()
            concurrent.futures.wait(self._calls, return_when=concurrent.futures.FIRST_COMPLETED)
            self.tools_wait += time.perf_counter() - start
        for future in [f for f in self._calls if f.done()]:
            self._answered(self._calls.pop(future), future)

    def _room(self) -> bool:
        """Whether the next question may enter the engine. A large group may enter an empty one."""
        if not self._waiting:
            return False
        live = self.engine.live
        return not live or live + self._waiting[0][1].samples <= self.engine.flight

    def _admit(self, ticket: int, ask: Ask) -> None:
        streams = [stream(self.seed, ask.example.id, ask.visit, s) for s in range(ask.samples)]
        try:
            first = episode_lib.start(ask.example, 0, self.setting, ask.forced)
            budget = episode_lib.budget(first, self.setting)
            numbers = self.engine.submit(Request(first.tokens, tuple(streams), budget))
        except ValueError as error:
            if self.skipped is None:
                raise
            self.skipped(ask, error)
            self._complete.append((ticket, []))
            return
        version = self.engine.version
        self._open[ticket] = _Open(ask, version, [None] * ask.samples, ask.samples)
        now = time.perf_counter()
        for sample, number in enumerate(numbers):
            episode = dataclasses.replace(first, sample=sample)
            self._live[number] = _Live(ticket, episode, now)

    def _said(self, turn: SampledTurn) -> None:
        live = self._live[turn.number]
        live.episode, call = episode_lib.said(
            live.episode, turn.ids, turn.logprobs, turn.stopped, self.setting, turn.versions
        )
        if call is None:
            self._finish(turn.number)
        else:
            self._calls[self.toolbox.submit(call)] = turn.number

    def _answered(self, number: int, future: concurrent.futures.Future) -> None:
        live, result = self._live[number], future.result()
        before = live.episode
        while True:
            live.episode, piece = episode_lib.answered(before, result, self.setting)
            if piece is None:
                self._finish(number)
                return
            room = episode_lib.budget(live.episode, self.setting)
            pictures = live.episode.tokens.pictures
            try:
                self.engine.resume(Resume(number, piece, pictures, room))
            except ValueError as error:  # a picture too large for the engine, say
                if result.error is not None:
                    raise
                result = dataclasses.replace(result, items=(), error=f"failed: {error}")
            else:
                return

    def _finish(self, number: int) -> None:
        """Takes an ended trajectory out of the engine; its group may be complete with it."""
        live = self._live.pop(number)
        self.engine.release(number)
        group = self._open[live.ticket]
        trajectory = episode_lib.finish(live.episode, time.perf_counter() - live.since)
        group.trajectories[live.episode.sample] = trajectory
        group.missing -= 1
        self.done(1)
        if not group.missing:
            del self._open[live.ticket]
            self._complete.append((live.ticket, group.trajectories))


def rollout(
    engine: Engine,
    toolbox: Toolbox,
    asks: Iterable[Ask],
    setting: Setting,
    *,
    seed: int,
    temperature: float,
    done: Callable[[int], None] = lambda n: None,
    skipped: Callable[[Ask, ValueError], None] | None = None,
) -> tuple[list[list[Trajectory]], dict[str, float]]:
    """Runs every ask to its end (see `Rollouts`).

    Returns:
      Trajectories by ask (an empty list for a skipped one), and timings in seconds:
      `tools_wait` is the time in which nothing but a tool was waited for.
    """
    rollouts = Rollouts(
        engine, toolbox, setting, seed=seed, temperature=temperature, done=done, skipped=skipped
    )
    began = time.perf_counter()
    tickets = [rollouts.add(ask) for ask in asks]
    found = dict(rollouts.groups())
    timings = {"rollout": time.perf_counter() - began, "tools_wait": rollouts.tools_wait}
    return [found[ticket] for ticket in tickets], timings
