"""Image search over a local index: picture -> titles and thumbnails."""

import asyncio

from mmsr_jax.tools.index.pictures import PictureIndex
from mmsr_jax.tools.local import LocalImageIndex
from mmsr_jax.types import ResultItem, ToolCall


class LocalImageSearch:
    """Finds the entries of an index that look most like the user's picture."""

    name = "image_search"

    def __init__(self, index: LocalImageIndex | PictureIndex, topk: int = 3):
        if topk < 1:
            raise ValueError(f"topk must be at least 1, not {topk}")
        self._index = index
        self._topk = topk

    async def run(self, call: ToolCall) -> tuple[ResultItem, ...]:
        """Ranked titles and thumbnails. ToolError "failed" for an undecodable picture."""
        entries = await asyncio.to_thread(self._index.search, call.image, self._topk)
        return tuple(
            ResultItem(entry.title, entry.link, thumbnail=entry.thumbnail) for entry in entries
        )
