"""Image search: picture -> titles and thumbnails, over a local index or on the web."""

import asyncio
import base64
import binascii
import concurrent.futures
import dataclasses
import functools
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mmsr_jax.tools.attempts import first_good
from mmsr_jax.tools.base import LEAST, ToolError, began, left
from mmsr_jax.tools.hits import Found, Hit, ImageProvider
from mmsr_jax.tools.index.pictures import PictureIndex
from mmsr_jax.tools.local import LocalImageIndex
from mmsr_jax.tools.recorded import Recorder, Request
from mmsr_jax.types import ResultItem, ToolCall

PICTURED = frozenset({"retriever"})  # providers whose matches come with pictures, to be cleaned
DECODERS = 4  # pictures decoded at the same time, by all tools of a kind: each may take 300 MB


class LocalImageSearch:
    """Finds the entries of an index that look most like the user's picture."""

    name = "image_search"

    def __init__(self, index: LocalImageIndex | PictureIndex, topk: int = 3):
        if topk < 1:
            raise ValueError(f"topk must be at least 1, not {topk}")
        self._index = index
        self._topk = topk
        self._decoders = concurrent.futures.ThreadPoolExecutor(DECODERS, "image-search")

    async def run(self, call: ToolCall) -> tuple[ResultItem, ...]:
        """Ranked titles and thumbnails. ToolError "failed" for an undecodable picture."""
        entries = await asyncio.get_running_loop().run_in_executor(
            self._decoders, self._index.search, call.image, self._topk
        )
        return tuple(
            ResultItem(entry.title, entry.link, thumbnail=entry.thumbnail) for entry in entries
        )


class WebImageSearch:
    """Image search through a provider. A result whose thumbnail cannot be had is replaced.

    Args:
      fetch: (URL, seconds) -> the bytes behind it, from public addresses only; or ToolError.
      clean: hostile bytes -> a decoded and re-encoded picture, or ToolError; may take a while,
        so it runs in a thread. The settings that a `functools.partial` binds to it are part of
        what the answers depend on.
      results: titles with thumbnails wanted.
      candidates: matches to try at the most.
      deadline: seconds for everything, from the call's submission; what is done by then is the
        result.
    """

    name = "image_search"

    def __init__(
        self,
        provider: ImageProvider,
        fetch: Callable[[str, float], Awaitable[bytes]],
        clean: Callable[[bytes], bytes],
        recorder: Recorder,
        *,
        results: int = 5,
        candidates: int = 15,
        deadline: float = 25.0,
    ):
        if not 1 <= results <= candidates:
            raise ValueError(
                f"{candidates} candidates cannot give {results} results: at least 1 result, and "
                "no fewer candidates than results"
            )
        self._provider, self._fetch, self._clean = provider, fetch, clean
        self._recorder = recorder
        self._results, self._candidates, self._deadline = results, candidates, deadline
        self._decoders = concurrent.futures.ThreadPoolExecutor(DECODERS, "thumbnails")
        self.provider = provider.name
        self._pictures = _bound(clean)
        self.identity: Mapping[str, Any] = {
            "provider": dict(provider.identity),
            "pictures": self._pictures,
            "results": results,
            "candidates": candidates,
        }

    async def run(self, call: ToolCall) -> tuple[ResultItem, ...]:
        found = await self.find(call)
        if not found.hits:
            raise ToolError("no_results")
        return tuple(hit.item() for hit in found.hits)

    async def find(self, call: ToolCall) -> Found:
        """Titles and thumbnails; none when the provider knows no match, or none with a thumbnail.

        Raises:
          ToolError: the provider's, "budget", "timeout" when no thumbnail came in time, "unread"
            when they failed for the moment.
        """
        until = began() + self._deadline
        matches = await self._matches(call.image, until)

        async def show(hit: Hit) -> Hit:
            if hit.picture is not None:
                return hit
            data = inline(hit.thumbnail) or await self._fetch(hit.thumbnail, left(until))
            return dataclasses.replace(hit, picture=await self._cleaned(data))

        tried = await first_good(matches.hits, show, self._results, until - time.monotonic())
        if matches.hits and not tried.good and not tried.complete:
            none = f"none of {len(matches.hits)} thumbnails"
            if tried.late or until - time.monotonic() < LEAST:  # who joined may have some
                raise ToolError("timeout", f"{none} in time")
            raise ToolError("unread", f"{none}: {tried.errors[0]}"[:200])
        return Found(
            tried.good, matches.cost, matches.paid, provider=self.provider, complete=tried.complete
        )

    async def _matches(self, picture: bytes, until: float) -> Found:
        provider = self._provider
        content = {
            "identity": dict(provider.identity),
            "image": hashlib.sha256(picture).hexdigest(),
            "count": self._candidates,
        }
        if provider.name in PICTURED:
            content["pictures"] = self._pictures
        request = Request("lens", provider.name, content)

        async def live() -> Found:
            found = await provider.search(picture, self._candidates, left(until))
            hits = [
                hit if hit.picture is None
                else dataclasses.replace(hit, picture=await self._cleaned(hit.picture))
                for hit in found.hits
            ]  # fmt: skip
            return dataclasses.replace(found, hits=tuple(hits))

        return await self._recorder.ask(request, live, provider.price)

    async def _cleaned(self, data: bytes) -> bytes:
        return await asyncio.get_running_loop().run_in_executor(self._decoders, self._clean, data)


def _bound(function: Callable) -> dict[str, Any]:
    """The settings records bound to a `functools.partial`, by argument, as JSON values."""
    if not isinstance(function, functools.partial):
        return {}
    return {
        name: dataclasses.asdict(value)
        for name, value in function.keywords.items()
        if dataclasses.is_dataclass(value)
    }


def inline(url: str) -> bytes | None:
    """The bytes of a base64 `data:` URL, None for another URL. ToolError when it is broken."""
    if not url.startswith("data:"):
        return None
    head, _, data = url.partition(",")
    try:
        if not head.endswith(";base64"):
            raise ValueError
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ToolError("bad_response", "a data URL that is not base64") from None
