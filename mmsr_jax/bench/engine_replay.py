"""A replay of recorded conversations through the engine, with tools that take their time.

What the model says is sampled freely; every turn is as long as the recorded one, and what a tool
answers is the recorded result. So the work is that of the record, whatever the weights say. Tools
are coroutines that sleep, behind the real toolbox.
"""

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import math
import time
from collections.abc import Iterator, Sequence

import numpy as np

from mmsr_jax.bench.trace_file import spread
from mmsr_jax.bench.traces import Trace, by_group, distinct_tokens
from mmsr_jax.engine.engine import Engine, EngineConfig
from mmsr_jax.engine.requests import Request, Resume, stream
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import ResultItem, ToolCall

P99 = 2.3263478740408408  # of the standard normal distribution
TOOL = "recorded"


@dataclasses.dataclass(frozen=True)
class Latency:
    """Seconds of a tool call: lognormal, so that most are quick and a few take very long.

    Or as recorded, when each call ends as it did: median, p99 and deadline then mean nothing.
    """

    median: float = 1.0
    p99: float = 20.0
    deadline: float = 30.0  # calls end there
    scale: float = 1.0  # of all three; 0: tools answer at once
    recorded: bool = False  # what the traces say, times `scale`

    def __post_init__(self):
        if self.scale < 0 or not 0 < self.median <= self.p99 or self.deadline <= 0:
            raise ValueError(
                f"a latency of median {self.median} s, p99 {self.p99} s and deadline "
                f"{self.deadline} s, times {self.scale}"
            )

    def seconds(self, trace: Trace, turn: int) -> float:
        """Of the call after that turn: the same in every replay."""
        if not self.scale:
            return 0.0
        if self.recorded:
            return self.scale * trace.seconds[turn]
        name = repr((trace.group, trace.sample, turn)).encode()
        seed = int.from_bytes(hashlib.sha256(name).digest()[:8], "big")
        sigma = math.log(self.p99 / self.median) / P99
        drawn = np.random.default_rng(seed).standard_normal()
        return self.scale * self.median * math.exp(sigma * drawn)

    def described(self, traces: Sequence[Trace]) -> dict:
        """What a record says of it.

        Raises:
            ValueError: latencies as recorded, of traces that have none.
        """
        if not self.recorded:
            return dataclasses.asdict(self)
        for trace in traces:
            if len(trace.seconds) != len(trace.tools):
                raise ValueError(
                    f"group {trace.group}, sample {trace.sample} does not say how long its "
                    f"{len(trace.tools)} tool calls took: record a run (mmsr bench traces), or "
                    "draw latencies (--latency drawn)"
                )
        seconds = spread(second for trace in traces for second in trace.seconds)
        return {"recorded": True, "scale": self.scale, **seconds}


class Sleeper:
    """A tool whose query is the number of seconds that it takes."""

    name = TOOL

    async def run(self, call: ToolCall) -> tuple[ResultItem, ...]:
        await asyncio.sleep(float(call.query))
        return (ResultItem(title=TOOL),)


@contextlib.contextmanager
def tools(latency: Latency, at_once: int) -> Iterator[Toolbox]:
    """A toolbox in which so many calls run at the same time."""
    # Recorded calls end as they ended: nothing cuts them a second time.
    deadline = math.inf if latency.recorded else latency.deadline * (latency.scale or 1.0)
    with Toolbox({TOOL: Sleeper()}, deadline, at_once) as toolbox:
        yield toolbox


def call(latency: Latency, trace: Trace, turn: int) -> ToolCall:
    return ToolCall(TOOL, repr(latency.seconds(trace, turn)), b"", "")


def sizes(traces: Sequence[Trace], rows: int, flight: int, pages: int = 0) -> EngineConfig:
    """An engine in which these fit, with pages for everything in flight unless `pages` says so."""
    slots = max(trace.tokens for trace in traces) + 1
    slots = -(-slots // EngineConfig.page) * EngineConfig.page
    pictures = [p for trace in traces for p in trace.pictures(len(trace.pieces))]
    largest = max((len(picture.patches) for picture in pictures), default=4)
    return EngineConfig(
        rows=rows,
        flight=flight,
        slots=slots,
        pages=pages or flight * (slots // EngineConfig.page) + rows,
        turn_tokens=max(max(trace.turns) for trace in traces),
        picture_patches=largest,
        patches=max(EngineConfig.patches, largest),
        feature_rows=max(EngineConfig.feature_rows, largest),
    )


def warm(config: ModelConfig, params: dict, settings: EngineConfig) -> Engine:
    """An engine with its programs compiled. `params` have their layers stacked."""
    engine = Engine(qwen.abstract(config)[0], config, settings, eos_ids=())
    engine.set_params(params)
    engine.warm_up()
    return engine


def admit(engine: Engine, group: Sequence[Trace]) -> tuple[int, ...]:
    """Submits traces of one prompt."""
    streams = tuple(stream(trace.group, trace.sample) for trace in group)
    numbers = engine.submit(Request(group[0].prompt, streams, max(t.turns[0] for t in group)))
    for number, trace in zip(numbers, group, strict=True):
        # A request has one budget; here every sample knows how much it will say.
        engine.schedule.sequences[number].left = trace.turns[0]
    return numbers


def replay(engine: Engine, traces: Sequence[Trace], latency: Latency) -> dict:
    """Plays all traces, as many in flight as the engine likes.

    Returns: the figures. `steady` is the time until the last prompt had entered the engine: in a
        run that goes on, the end has no weight.
    """
    engine.device.features.clear()
    before, began, idle = engine.counters, time.perf_counter(), 0.0
    waiting = collections.deque(by_group(traces))
    live: dict[int, tuple[Trace, int]] = {}  # number -> trace, turns said
    calls: dict[concurrent.futures.Future, int] = {}
    timeouts, steady = 0, None

    def room() -> bool:
        return bool(waiting) and (not engine.live or engine.live + len(waiting[0]) <= engine.flight)

    with tools(latency, max(engine.flight, 1)) as toolbox:
        while waiting or live:
            while room():
                group = waiting.popleft()
                live |= {n: (t, 0) for n, t in zip(admit(engine, group), group, strict=True)}
            if not waiting and steady is None:
                steady = time.perf_counter() - began, _sampled(engine, before)
            for turn in engine.step(1.0):
                trace, said = live[turn.number]
                live[turn.number] = trace, said + 1
                if said + 1 == len(trace.turns):
                    engine.release(turn.number)
                    del live[turn.number]
                else:
                    calls[toolbox.submit(call(latency, trace, said))] = turn.number
            if calls and not engine.busy and not room():
                start = time.perf_counter()
                concurrent.futures.wait(calls, return_when=concurrent.futures.FIRST_COMPLETED)
                idle += time.perf_counter() - start
            for future in [f for f in calls if f.done()]:
                number = calls.pop(future)
                timeouts += future.result().error == "timeout"
                trace, said = live[number]
                pictures = trace.pictures(2 * said + 1)
                engine.resume(Resume(number, trace.tools[said - 1], pictures, trace.turns[said]))
    seconds = time.perf_counter() - began
    return figures(engine, before, traces, seconds) | {
        "no_work_share": idle / seconds,
        "timeouts": timeouts,
        "steady": {
            "seconds": steady[0],
            "tokens": steady[1],
            "tokens_per_s": steady[1] / max(steady[0], 1e-9),
        },
    }


def figures(engine: Engine, before: dict, traces: Sequence[Trace], seconds: float) -> dict:
    """What every replay through an engine reports. `before`: its counters at the start."""
    grown = {name: value - before[name] for name, value in engine.counters.items()}
    distinct = distinct_tokens(traces)
    shown = {p.digest for trace in traces for p in trace.pictures(len(trace.pieces))}
    return {
        "seconds": seconds,
        "tokens": grown["sampled_tokens"],
        "tokens_per_s": grown["sampled_tokens"] / seconds,
        "occupancy": grown["sampled_tokens"] / grown["row_steps"],
        "prefill_tokens": grown["prefill_tokens"],
        "distinct_tokens": distinct,
        "prefill_ratio": grown["prefill_tokens"] / distinct,
        "extensions": grown["extensions"],
        "decode_steps": grown["decode_steps"],
        "dropped": grown["dropped"],
        "again_tokens": grown["again_tokens"],
        "encoded_pictures": grown["encoded_pictures"],
        "distinct_pictures": len(shown),
    }


def _sampled(engine: Engine, before: dict) -> int:
    return engine.counters["sampled_tokens"] - before["sampled_tokens"]
