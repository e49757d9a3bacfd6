"""Runs tools in the background: the caller gets a future at once and never an exception."""

import asyncio
import concurrent.futures
import contextlib
import contextvars
import dataclasses
import logging
import threading
import time
from collections.abc import Awaitable, Callable, Mapping

from mmsr_jax.tools.base import BEGAN, Tool, ToolError
from mmsr_jax.types import ResultItem, ToolCall, ToolResult

log = logging.getLogger(__name__)

Future = concurrent.futures.Future
HEARTBEAT = 0.25  # seconds between two signs of life of the event loop, and two looks at the calls
STUCK = 1.0  # seconds without one after which a timeout is also the loop's fault
CLOSING = 4.0  # seconds that ending what the tools share may take
MAX_ERROR_CHARS = 300
CLOSED = "failed: the toolbox is closed"


@dataclasses.dataclass
class _Entry:
    """A call without a result yet."""

    call: ToolCall
    started: float  # when it was submitted
    task: asyncio.Task | None = None  # once the event loop has heard of it


@dataclasses.dataclass
class Counter:
    """What became of one tool's calls."""

    calls: int = 0  # finished calls, good or bad
    errors: int = 0
    seconds: float = 0.0  # sum over calls, from submission to result


class Toolbox:
    """All tools behind one asyncio thread.

    Args:
        tools: by the name that `ToolCall.tool` uses.
        deadline: seconds from a call's submission to its result, the queue and all else included.
        max_concurrent: calls that run at the same time; others queue.
        closing: run at the end, on the tools' own event loop: ends what they share.
        clock: stands in for the time, in tests.

    Every future that `submit` returns gets a `ToolResult`: items, or a named error ("timeout",
    "no_results", "failed: ..."). The deadline is kept in one place, by a thread that does nothing
    else: whatever a call is doing then, in the queue, on the loop or in a thread of its own that
    nobody can end, its result is the timeout, and what it brings later is dropped (a recorder may
    still have kept it).
    """

    def __init__(
        self,
        tools: Mapping[str, Tool],
        deadline: float = 30.0,
        max_concurrent: int = 64,
        closing: Callable[[], Awaitable[None]] | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
    ):
        if not deadline > 0:
            raise ValueError(f"deadline must be above 0 seconds, not {deadline}")
        if max_concurrent < 1:
            raise ValueError(f"max_concurrent must be at least 1, not {max_concurrent}")
        self._tools = dict(tools)
        self._deadline = deadline
        self._closing, self._clock = closing, clock
        self._counters = {name: Counter() for name in self._tools}
        self._lock = threading.Lock()
        self._pending: dict[Future, _Entry] = {}  # in the order of submission: so they time out
        self._closed = threading.Event()
        self._beat = time.monotonic()
        self._loop = asyncio.new_event_loop()
        self._slots = asyncio.Semaphore(max_concurrent)
        self._tasks: set[asyncio.Task] = set()  # asyncio itself holds tasks only weakly
        self._loop_thread = threading.Thread(target=self._live, name="tools", daemon=True)
        self._watch_thread = threading.Thread(target=self._watch, name="tools-watch", daemon=True)
        self._loop_thread.start()
        self._watch_thread.start()

    def submit(self, call: ToolCall) -> "Future[ToolResult]":
        """Starts a call and returns at once. May be called from any thread."""
        future: Future = Future()
        future.set_running_or_notify_cancel()  # from here on nobody can cancel it
        with self._lock:
            closed = self._closed.is_set()
            if not closed:
                entry = self._pending[future] = _Entry(call, self._clock())
        if closed:
            future.set_result(ToolResult(call.tool, (), 0.0, CLOSED))
            return future
        try:
            self._loop.call_soon_threadsafe(self._start, future, entry)
        except RuntimeError:  # closed in between
            self._resolve(future, (), CLOSED)
        return future

    def counters(self) -> dict[str, float]:
        """Totals since the start, flat: "image_search/calls", ".../errors", ".../seconds"."""
        with self._lock:
            return {
                f"{name}/{field}": value
                for name, counter in self._counters.items()
                for field, value in dataclasses.asdict(counter).items()
            }

    def close(self, wait: float = 5.0) -> None:
        """Ends the threads; calls that still run get an error. May be called twice."""
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
            pending = list(self._pending)
        for future in pending:
            self._resolve(future, (), CLOSED)
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in (self._loop_thread, self._watch_thread):
            if thread is not threading.current_thread():
                thread.join(wait)

    def __enter__(self) -> "Toolbox":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _live(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.call_soon(self._pulse)
        self._loop.run_forever()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        # One more turn of the loop lets cancelled tools clean up; who does not is left behind.
        self._loop.run_until_complete(asyncio.sleep(0))
        if self._closing is not None:
            try:
                self._loop.run_until_complete(asyncio.wait_for(self._closing(), CLOSING))
            except Exception as error:
                log.warning("the tools did not close well: %s", type(error).__name__)
        self._loop.close()

    def _pulse(self) -> None:
        self._beat = time.monotonic()
        self._loop.call_later(HEARTBEAT, self._pulse)

    def _watch(self) -> None:
        wait = 0.0
        while not self._closed.wait(wait):
            late = []
            with self._lock:
                now = self._clock()
                for future, entry in self._pending.items():
                    if now - entry.started < self._deadline:
                        break  # those that follow came later
                    late.append((future, entry))
            if late and (silent := time.monotonic() - self._beat) > HEARTBEAT + STUCK:
                log.warning(
                    "a tool has blocked the event loop for %.1f s; %d calls time out",
                    silent, len(late),
                )  # fmt: skip
            for future, entry in late:
                self._resolve(future, (), "timeout")
                self._give_up(entry)
            with self._lock:
                oldest = next(iter(self._pending.values()), None)
                due = self._deadline + (0.0 if oldest is None else oldest.started - self._clock())
            # No call that comes meanwhile is due before that.
            wait = max(0.0, min(HEARTBEAT, self._deadline, due))

    def _give_up(self, entry: _Entry) -> None:
        """Cancels what a call still does. Without a task it has not begun, and never will."""
        if entry.task is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(entry.task.cancel)

    def _start(self, future: Future, entry: _Entry) -> None:
        context = contextvars.copy_context()
        context.run(BEGAN.set, entry.started)
        with self._lock:  # so that who gives the call up finds its task, or it never gets one
            if future not in self._pending:
                return
            entry.task = self._loop.create_task(self._run(future, entry.call), context=context)
        self._tasks.add(entry.task)
        entry.task.add_done_callback(self._tasks.discard)

    async def _run(self, future: Future, call: ToolCall) -> None:
        async with self._slots:
            if future.done():  # too late already, only nobody has cancelled us yet
                return
            try:
                self._resolve(future, await self._ask(call), None)
            except ToolError as error:
                self._resolve(future, (), str(error)[:MAX_ERROR_CHARS])
            except BaseException as error:
                text = f"failed: {type(error).__name__}: {error}"
                self._resolve(future, (), text[:MAX_ERROR_CHARS])
            finally:
                self._resolve(future, (), "failed: the tool's error cannot be shown")

    async def _ask(self, call: ToolCall) -> tuple[ResultItem, ...]:
        """Runs the tool. ToolError for a worthless answer."""
        tool = self._tools.get(call.tool)
        if tool is None:
            raise ToolError("failed", f"no tool {call.tool!r}, only {sorted(self._tools)}")
        task = self._loop.create_task(_contained(tool, call))
        try:
            # Cancelled, `wait` does not insist that the tool's task really ends.
            await asyncio.wait({task})
        except asyncio.CancelledError:
            task.cancel()
            task.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise
        if task.cancelled():
            raise ToolError("failed", "the tool cancelled itself")
        return checked(task.result())

    def _resolve(self, future: Future, items: tuple[ResultItem, ...], error: str | None) -> None:
        """Gives the future its result, the first time; later ones are dropped.

        At the deadline and after it the result is the timeout, whatever has come.
        """
        with self._lock:
            entry = self._pending.pop(future, None)
            if entry is None:
                return
            seconds = self._clock() - entry.started
            if seconds >= self._deadline:
                items, error = (), "timeout"
            counter = self._counters.setdefault(entry.call.tool, Counter())
            counter.calls += 1
            counter.errors += error is not None
            counter.seconds += seconds
        future.set_result(ToolResult(entry.call.tool, items, seconds, error))


async def _contained(tool: Tool, call: ToolCall) -> object:
    """Runs a tool so that not even SystemExit reaches the event loop, which would end with it."""
    try:
        return await tool.run(call)
    except (SystemExit, KeyboardInterrupt) as error:
        raise ToolError("failed", f"the tool raised {type(error).__name__}") from error


def checked(items: object) -> tuple[ResultItem, ...]:
    """What a tool returned, if it is what a tool should return; else ToolError."""
    if not isinstance(items, (tuple, list)):
        raise ToolError("failed", f"the tool returned {type(items).__name__}, not result items")
    for item in items:
        if not isinstance(item, ResultItem):
            raise ToolError("failed", f"the tool returned an item of type {type(item).__name__}")
        if not all(isinstance(text, str) for text in (item.title, item.link, item.text)):
            raise ToolError("failed", "the tool returned an item whose texts are no strings")
        if not isinstance(item.thumbnail, (bytes, type(None))):
            raise ToolError("failed", "the tool returned a thumbnail that is not bytes")
    if not items:
        raise ToolError("no_results")
    return tuple(items)
