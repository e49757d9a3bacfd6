"""One deadline over a whole call, from its submission on, whatever the call is doing then."""

import asyncio
import threading
import time

import pytest

from mmsr_jax.tools import toolbox as toolbox_lib
from mmsr_jax.tools.base import ToolError, began, left
from mmsr_jax.tools.hits import Found, Hit
from mmsr_jax.tools.recorded import Recorded, Recorder
from mmsr_jax.tools.store import Store
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.tools.web import WebTextSearch
from mmsr_jax.types import ResultItem, ToolCall

ITEM = ResultItem("Nepal", "flags:NP", "The capital of Nepal is Kathmandu.")
CALL = ToolCall("t", "q", b"", "?")
PATIENCE = 30  # real seconds after which a test gives up


class Scripted:
    """A tool that does what the function does."""

    name = "t"

    def __init__(self, act):
        self.run = act


class Clock:
    """Time that passes when a test says so."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(toolbox_lib, "HEARTBEAT", 0.01)  # how soon a clock that jumps is noticed
    return Clock()


def test_the_deadline_counts_from_submission(clock):
    begun = {name: threading.Event() for name in ("first", "second")}

    async def act(call):
        begun[call.query].set()
        await asyncio.Event().wait()

    with Toolbox({"t": Scripted(act)}, 10.0, max_concurrent=1, clock=clock) as box:
        first = box.submit(ToolCall("t", "first", b"", ""))
        assert begun["first"].wait(PATIENCE)
        clock.now += 9
        second = box.submit(ToolCall("t", "second", b"", ""))
        clock.now += 1
        assert first.result(PATIENCE).error == "timeout" and first.result().seconds == 10
        assert begun["second"].wait(PATIENCE)  # it had waited 1 s in the queue
        assert not second.done()
        clock.now += 9
        assert second.result(PATIENCE).error == "timeout" and second.result().seconds == 10


def test_who_is_still_in_the_queue_at_the_deadline_never_begins(clock):
    asked, release = [], threading.Event()

    async def act(call):
        asked.append(call.query)
        if call.query == "block":
            release.wait(PATIENCE)
        return (ITEM,)

    with Toolbox({"t": Scripted(act)}, 10.0, max_concurrent=1, clock=clock) as box:
        futures = [box.submit(ToolCall("t", query, b"", "")) for query in ("block", "a", "b")]
        clock.now += 10
        assert [f.result(PATIENCE).error for f in futures] == ["timeout"] * 3
        release.set()
        assert box.submit(ToolCall("t", "next", b"", "")).result(PATIENCE).items == (ITEM,)
    assert asked in (["block", "next"], ["next"])


def test_a_result_that_comes_at_the_deadline_is_a_timeout(clock):
    async def act(call):
        clock.now += float(call.query)
        return (ITEM,)

    with Toolbox({"t": Scripted(act)}, 10.0, clock=clock) as box:
        in_time = box.submit(ToolCall("t", "9.5", b"", "")).result(PATIENCE)
        late = box.submit(ToolCall("t", "10.5", b"", "")).result(PATIENCE)
        assert (in_time.items, in_time.error) == ((ITEM,), None)
        assert (late.items, late.error) == ((), "timeout")
        assert box.counters()["t/errors"] == 1


def test_a_thread_that_cannot_be_ended_keeps_nobody_waiting():
    release, ended = threading.Event(), threading.Event()

    def parse():
        release.wait(PATIENCE)
        ended.set()
        return (ITEM,)

    async def act(call):
        return await asyncio.to_thread(parse)

    with Toolbox({"t": Scripted(act)}, 0.2) as box:
        result = box.submit(CALL).result(PATIENCE)
        assert not ended.is_set()  # the parser is busy still
        assert (result.error, result.items) == ("timeout", ())
        release.set()
        assert ended.wait(PATIENCE)


def test_a_store_that_blocks_costs_a_timeout_and_loses_no_answer(tmp_path, monkeypatch, clock):
    release, writing = threading.Event(), threading.Event()
    asked = []

    async def act(call):
        asked.append(call.query)
        return (ITEM,)

    store = Store(tmp_path / "calls.db")
    put = store.put

    def slow(record):
        writing.set()
        release.wait(PATIENCE)
        return put(record)

    monkeypatch.setattr(store, "put", slow)
    recorder = Recorder(store)
    with Toolbox({"t": Recorded(Scripted(act), recorder)}, 10.0, clock=clock) as box:
        future = box.submit(CALL)
        assert writing.wait(PATIENCE) and not future.done()
        clock.now += 10
        assert future.result(PATIENCE).error == "timeout"  # the store is blocked still
        release.set()
        assert box.submit(CALL).result(PATIENCE).items == (ITEM,)
    assert asked == ["q"]  # the answer came late, and was kept for the second call
    assert len(list(store.records())) == 1
    recorder.close()


def test_a_pipeline_counts_from_the_submission_too(clock):
    """What is done by `web.deadline` is a result only if it comes before the toolbox's."""
    seen = []

    class Provider:
        name, price, passages, identity = "serper", 0.0, False, {}

        async def search(self, query, count, deadline):
            seen.append(deadline)
            return Found((Hit("title", "https://a.example/", "text"),))

    pipeline = WebTextSearch(Provider(), None, None, Recorder(), deadline=1000.0)
    times = []

    class Waited:
        """A call that stood in the queue for 400 s before its tool began."""

        async def run(self, call):
            times.append(began())
            return await pipeline.run(call)

    at = time.monotonic() - 400
    with Toolbox({"t": Waited()}, 2000.0, clock=lambda: at) as box:
        assert box.submit(CALL).result(PATIENCE).error is None
    assert times == [at] and seen[0] <= 600


def test_no_time_left_asks_nobody():
    with pytest.raises(ToolError, match="timeout"):
        left(began())
