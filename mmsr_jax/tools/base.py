"""What a tool is, how it fails, and since when its call has been waiting."""

import contextvars
import time
from typing import Protocol

from mmsr_jax.types import ResultItem, ToolCall


class ToolError(Exception):
    """A failure with a name that ends up in `ToolResult.error`: "kind" or "kind: message"."""

    def __init__(self, kind: str, message: str = ""):
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind


LEAST = 0.1  # seconds: with less there is no use in asking anybody

BEGAN: contextvars.ContextVar[float | None] = contextvars.ContextVar("began", default=None)


def began() -> float:
    """When the call that this task is part of was submitted, in seconds of `time.monotonic`.

    Whoever has a deadline inside the toolbox's counts from here, so that it always ends first.
    Outside of a toolbox it is now.
    """
    found = BEGAN.get()
    return time.monotonic() if found is None else found


def left(until: float) -> float:
    """Seconds until then. ToolError "timeout" when there are none to speak of."""
    seconds = until - time.monotonic()
    if seconds < LEAST:
        raise ToolError("timeout", "no time is left to ask")
    return seconds


class Tool(Protocol):
    """One search engine.

    `run` must not block the event loop (long computations go to `asyncio.to_thread`), returns
    ranked items, and raises `ToolError` when it has none to give.
    """

    name: str

    async def run(self, call: ToolCall) -> tuple[ResultItem, ...]: ...
