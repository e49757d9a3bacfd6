"""Many episodes through one engine: rows pause for tools while the others decode on."""

import collections
import concurrent.futures
import dataclasses
import time
from collections.abc import Callable, Iterable

from mmsr_jax.agent import episode as episode_lib
from mmsr_jax.agent.episode import Episode, Setting
from mmsr_jax.engine.engine import Engine, Request, Resume, stream
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import Example, Trajectory


@dataclasses.dataclass(frozen=True)
class Ask:
    """Samples wanted of one question."""

    example: Example
    samples: int
    visit: int = 0  # how often the question was asked before (a fresh random stream each time)
    forced: str = ""  # beginning of the first response, for constant policies


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
    """Runs every ask to its end.

    Args:
      seed: run seed; with the example id, the visit and the sample index it names a trajectory's
        random stream, so the samples do not depend on their neighbours.
      temperature: 0 for greedy.
      done: called with the number of trajectories that have just ended.
      skipped: called when a question cannot be asked (broken picture, too long); without it the
        error is raised.

    Returns:
      Trajectories by ask (an empty list for a skipped one), and timings in seconds:
      `tools_wait` is the time in which nothing but a tool was waited for.
    """
    waiting = collections.deque()
    results: list[list[Trajectory | None]] = []
    for number, ask in enumerate(asks):
        try:
            first = episode_lib.start(ask.example, 0, setting, ask.forced)
        except ValueError as error:
            if skipped is None:
                raise
            skipped(ask, error)
            results.append([])
            continue
        results.append([None] * ask.samples)
        for lo in range(0, ask.samples, engine.config.rows):
            hi = min(ask.samples, lo + engine.config.rows)
            waiting.append((number, ask, first, range(lo, hi)))
    live: dict[int, tuple[int, Episode, float]] = {}  # row -> (ask number, episode, start)
    calls: dict[concurrent.futures.Future, int] = {}  # running tool call -> row
    tools_wait = 0.0
    began = time.perf_counter()
    while waiting or live:
        _admit(engine, waiting, live, setting, seed)
        for turn in engine.decode(temperature):
            number, episode, since = live[turn.row]
            episode, call = episode_lib.said(
                episode, turn.ids, turn.logprobs, turn.stopped, setting
            )
            live[turn.row] = (number, episode, since)
            if call is not None:
                calls[toolbox.submit(call)] = turn.row
            else:
                _finish(engine, live, results, turn.row)
                done(1)
        fits = waiting and len(waiting[0][3]) <= engine.free_rows
        if calls and not engine.running and not fits:
            start = time.perf_counter()
            concurrent.futures.wait(calls, return_when=concurrent.futures.FIRST_COMPLETED)
            tools_wait += time.perf_counter() - start
        resumes = []
        for future in [f for f in calls if f.done()]:
            row = calls.pop(future)
            number, episode, since = live[row]
            episode, piece = episode_lib.answered(episode, future.result(), setting)
            live[row] = (number, episode, since)
            if piece is None:
                _finish(engine, live, results, row)
                done(1)
                continue
            room = episode_lib.budget(episode, setting)
            resumes.append(Resume(row, piece, episode.tokens.pictures, room))
        if resumes:
            engine.extend(sorted(resumes, key=lambda r: r.row))
    timings = {"rollout": time.perf_counter() - began, "tools_wait": tools_wait}
    return results, timings


def _admit(engine, waiting, live, setting, seed) -> None:
    """Starts as many waiting questions as there are free rows, first come first served."""
    requests, taken = [], []
    free = engine.free_rows
    while waiting and len(waiting[0][3]) <= free:
        number, ask, first, samples = waiting.popleft()
        free -= len(samples)
        streams = tuple(stream(seed, ask.example.id, ask.visit, s) for s in samples)
        requests.append(Request(first.tokens, streams, episode_lib.budget(first, setting)))
        taken.append((number, first, samples))
    if not requests:
        return
    now = time.perf_counter()
    for (number, first, samples), rows in zip(taken, engine.admit(requests), strict=True):
        for sample, row in zip(samples, rows, strict=True):
            live[row] = (number, dataclasses.replace(first, sample=sample), now)


def _finish(engine, live, results, row: int) -> None:
    number, episode, since = live.pop(row)
    engine.release(row)
    results[number][episode.sample] = episode_lib.finish(episode, time.perf_counter() - since)
