"""What a tool is, and how it fails."""

from typing import Protocol

from mmsr_jax.types import ResultItem, ToolCall


class ToolError(Exception):
    """A failure with a name that ends up in `ToolResult.error`: "kind" or "kind: message"."""

    def __init__(self, kind: str, message: str = ""):
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind


class Tool(Protocol):
    """One search engine.

    `run` must not block the event loop (long computations go to `asyncio.to_thread`), returns
    ranked items, and raises `ToolError` when it has none to give.
    """

    name: str

    async def run(self, call: ToolCall) -> tuple[ResultItem, ...]: ...
