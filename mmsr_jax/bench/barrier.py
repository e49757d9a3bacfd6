"""The original's scheduler, over our engine's programs: rounds behind a barrier.

A batch decodes a round to its end, then all its tools are awaited, then whole conversations are
submitted anew; the next batch begins when the last of this one has ended. In its favour: samples of
a prompt share its pass in the first round, and a picture is encoded once.
"""

import concurrent.futures
import time
from collections.abc import Sequence

from mmsr_jax.bench.engine_replay import Latency, admit, call, figures, tools
from mmsr_jax.bench.traces import Trace, by_group
from mmsr_jax.engine.engine import Engine
from mmsr_jax.engine.requests import Request, stream
from mmsr_jax.inputs import chat


def replay(engine: Engine, traces: Sequence[Trace], latency: Latency, batch: int) -> dict:
    """Plays all traces, `batch` at a time. -> figures, as of `engine_replay.replay`.

    `no_work_share` is the time in which tools were awaited and nothing else done.
    """
    engine.device.features.clear()
    before, began, idle, timeouts = engine.counters, time.perf_counter(), 0.0, 0
    with tools(latency, batch) as toolbox:
        for at in range(0, len(traces), batch):
            live, turn = list(traces[at : at + batch]), 0
            while live:
                numbers = _submit(engine, live, turn)
                while engine.busy:
                    engine.step(1.0)
                for number in numbers:
                    engine.release(number)
                turn += 1
                live = [trace for trace in live if len(trace.turns) > turn]
                start = time.perf_counter()
                calls = [toolbox.submit(call(latency, trace, turn - 1)) for trace in live]
                concurrent.futures.wait(calls)
                idle += time.perf_counter() - start
                timeouts += sum(future.result().error == "timeout" for future in calls)
    seconds = time.perf_counter() - began
    found = figures(engine, before, traces, seconds)
    return found | {"no_work_share": idle / seconds, "timeouts": timeouts, "batch": batch}


def _submit(engine: Engine, live: Sequence[Trace], turn: int) -> list[int]:
    numbers: list[int] = []
    if not turn:
        for group in by_group(live):
            numbers += admit(engine, group)
        return numbers
    for trace in live:
        whole = chat.join(*trace.pieces[: 2 * turn + 1])
        streams = (stream(trace.group, trace.sample, turn),)
        numbers += engine.submit(Request(whole, streams, trace.turns[turn]))
    return numbers
