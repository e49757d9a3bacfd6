"""Text search over a local index: query -> titles, links and passages."""

import asyncio

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.index.text import TextIndex
from mmsr_jax.tools.local import LocalTextIndex
from mmsr_jax.types import ResultItem, ToolCall


class LocalTextSearch:
    """Finds the articles that match a query best, each with its best passage."""

    name = "text_search"

    def __init__(self, index: LocalTextIndex | TextIndex, topk: int = 3):
        if topk < 1:
            raise ValueError(f"topk must be at least 1, not {topk}")
        self._index = index
        self._topk = topk

    async def run(self, call: ToolCall) -> tuple[ResultItem, ...]:
        """Ranked passages. ToolError "no_results" when no word of the query occurs anywhere."""
        passages = await asyncio.to_thread(self._index.search, call.query, self._topk)
        if not passages:
            raise ToolError("no_results")
        return tuple(ResultItem(p.title, p.link, p.text) for p in passages)
