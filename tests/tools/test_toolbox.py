"""The toolbox never raises and never hangs, whatever a tool does."""

import asyncio
import contextlib
import threading
import time

import pytest

from mmsr_jax.tools import toolbox as toolbox_lib
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.toolbox import Toolbox
from mmsr_jax.types import ResultItem, ToolCall

ITEM = ResultItem("Nepal", "flags:NP", "The capital of Nepal is Kathmandu.")


class Scripted:
    """A tool that does what the function does."""

    name = "t"

    def __init__(self, act):
        self.run = act


def ask(act, **options):
    """One call to a scripted tool; returns its result and how long it took."""
    with Toolbox({"t": Scripted(act)}, **options) as box:
        start = time.monotonic()
        result = box.submit(ToolCall("t", "q", b"", "?")).result(timeout=10)
        return result, time.monotonic() - start


def test_items_come_back():
    async def act(call):
        assert (call.query, call.question) == ("q", "?")
        return [ITEM]

    result, _ = ask(act)
    assert result.items == (ITEM,) and result.error is None and result.tool == "t"
    assert 0 <= result.seconds < 5


def test_hanging_tool_times_out():
    async def act(call):
        await asyncio.sleep(60)

    result, seconds = ask(act, deadline=0.1)
    assert (result.error, result.items) == ("timeout", ())
    assert 0.1 <= result.seconds < 2 and seconds < 2


def test_tool_that_refuses_cancellation_times_out():
    async def act(call):
        for _ in range(100):
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.2)

    result, seconds = ask(act, deadline=0.1)
    assert result.error == "timeout" and seconds < 2


def test_tool_that_blocks_the_loop_times_out(monkeypatch, caplog):
    monkeypatch.setattr(toolbox_lib, "STUCK", 0.0)
    monkeypatch.setattr(toolbox_lib, "HEARTBEAT", 0.05)
    release = threading.Event()

    async def act(call):
        if call.query == "block":
            release.wait(60)
        return (ITEM,)

    with Toolbox({"t": Scripted(act)}, deadline=0.5) as box:
        blocked = box.submit(ToolCall("t", "block", b"", ""))
        behind = box.submit(ToolCall("t", "", b"", ""))
        assert blocked.result(30).error == "timeout"
        assert behind.result(30).error == "timeout"
        release.set()  # only now: both results came while the loop was blocked
        assert "blocked the event loop" in caplog.text
        until = time.monotonic() + 30  # afterwards the toolbox works again
        while box.submit(ToolCall("t", "", b"", "")).result(30).error:
            assert time.monotonic() < until


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("no network"), "failed: RuntimeError: no network"),
        (ToolError("no_results"), "no_results"),
        (ToolError("failed", "quota used up"), "failed: quota used up"),
        (asyncio.CancelledError(), "failed: the tool cancelled itself"),
        (SystemExit(3), "failed: the tool raised SystemExit"),
        (KeyboardInterrupt(), "failed: the tool raised KeyboardInterrupt"),
    ],
)
def test_every_exception_becomes_a_named_error(error, named):
    async def act(call):
        if call.query == "raise":
            raise error
        return (ITEM,)

    with Toolbox({"t": Scripted(act)}) as box:
        assert box.submit(ToolCall("t", "raise", b"", "")).result(5).error == named
        assert box.submit(ToolCall("t", "", b"", "")).result(5).items == (ITEM,)  # still alive


def test_exception_without_text_still_gives_a_result():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("nothing to say")

    async def act(call):
        raise Mute

    assert ask(act)[0].error.startswith("failed: ")


def test_long_errors_are_cut():
    async def act(call):
        raise ValueError("x" * 10_000)

    assert len(ask(act)[0].error) == toolbox_lib.MAX_ERROR_CHARS


@pytest.mark.parametrize(
    "garbage",
    [
        None,
        "text",
        3,
        [None],
        [{"title": "x"}],
        (ResultItem(5),),
        (ResultItem("a", thumbnail="b"),),
    ],
)
def test_garbage_becomes_a_named_error(garbage):
    async def act(call):
        return garbage

    result, _ = ask(act)
    assert result.error.startswith("failed: the tool returned") and result.items == ()


def test_no_items_is_no_results():
    async def act(call):
        return ()

    assert ask(act)[0].error == "no_results"


def test_tool_that_is_not_async():
    def act(call):
        return (ITEM,)

    assert ask(act)[0].error.startswith("failed: TypeError")


def test_unknown_tool_is_named():
    with Toolbox({}) as box:
        result = box.submit(ToolCall("web", "q", b"", "")).result(5)
        assert result.error == "failed: no tool 'web', only []"
        assert box.counters() == {"web/calls": 1, "web/errors": 1, "web/seconds": result.seconds}


def test_calls_run_side_by_side_but_not_too_many():
    running, most = 0, 0

    async def act(call):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.05)
        running -= 1
        return (ITEM,)

    with Toolbox({"t": Scripted(act)}, max_concurrent=4) as box:
        start = time.monotonic()
        futures = [box.submit(ToolCall("t", "", b"", "")) for _ in range(12)]
        assert time.monotonic() - start < 0.05  # submitting does not wait
        assert all(future.result(5).error is None for future in futures)
        assert most == 4 and time.monotonic() - start >= 0.15


def test_counters_add_up():
    async def act(call):
        if call.query == "bad":
            raise ValueError
        return (ITEM,)

    with Toolbox({"t": Scripted(act)}) as box:
        for query in ("", "bad", ""):
            box.submit(ToolCall("t", query, b"", "")).result(5)
        counters = box.counters()
    assert (counters["t/calls"], counters["t/errors"]) == (3, 1)
    assert counters["t/seconds"] > 0


def test_closing_ends_calls_threads_and_later_calls():
    async def act(call):
        await asyncio.sleep(60)

    before = threading.active_count()
    box = Toolbox({"t": Scripted(act)})
    future = box.submit(ToolCall("t", "", b"", ""))
    assert not future.cancel()  # nobody can take away a call's result
    start = time.monotonic()
    box.close()
    box.close()
    assert time.monotonic() - start < 2 and threading.active_count() == before
    assert future.result(1).error == toolbox_lib.CLOSED
    assert box.submit(ToolCall("t", "", b"", "")).result(1).error == toolbox_lib.CLOSED


def test_what_tools_share_is_closed_on_their_own_loop(caplog):
    async def act(call):
        await asyncio.sleep(60 if call.query else 0)
        return (ITEM,)

    seen = []

    async def closing():
        await asyncio.sleep(0.01)
        seen.append(threading.current_thread().name)

    box = Toolbox({"t": Scripted(act)}, closing=closing)
    box.submit(ToolCall("t", "", b"", "")).result(5)
    box.submit(ToolCall("t", "hang", b"", ""))
    box.close()
    box.close()
    assert seen == ["tools"]

    async def broken():
        raise OSError("disk full")

    with Toolbox({}, closing=broken):
        pass
    assert "the tools did not close well: OSError" in caplog.text


def test_many_threads_may_submit():
    async def act(call):
        return (ResultItem(call.query),)

    with Toolbox({"t": Scripted(act)}) as box:
        titles = []

        def work(name):
            for _ in range(20):
                titles.append(box.submit(ToolCall("t", name, b"", "")).result(5).items[0].title)

        threads = [threading.Thread(target=work, args=(str(i),)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(titles) == sorted(str(i) for i in range(4) for _ in range(20))


@pytest.mark.parametrize(
    "options", [{"deadline": 0}, {"deadline": float("nan")}, {"max_concurrent": 0}]
)
def test_wrong_limits_are_refused(options):
    with pytest.raises(ValueError, match="not (0|nan)"):
        Toolbox({}, **options)
