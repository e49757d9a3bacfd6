"""Text search on the web: query -> links -> pages -> summaries.

The pipeline of MMSearch-R1 (arXiv 2506.20670, section 3.2): the first links are read and
summarised side by side, the next ones replace those that fail, and five summaries with their
links come back. Links, pages and summaries are recorded apart, so that another question with the
same query, or another query that finds the same page, pays only for what is new.
"""

import hashlib
import time
from collections.abc import Mapping
from typing import Any, Protocol

from mmsr_jax.tools.attempts import first_good
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.hits import Found, Hit, TextProvider
from mmsr_jax.tools.recorded import Recorder, Request
from mmsr_jax.types import ResultItem, ToolCall

LEAST = 0.1  # seconds: with less there is no use in asking anybody


class PageReader(Protocol):
    """Gets a page's text."""

    name: str
    price: float
    identity: Mapping[str, Any]

    async def page(self, url: str, deadline: float) -> tuple[str, str]:
        """(title, text) within `deadline` seconds; ToolError when there is no text to be had."""
        ...


class PageSummarizer(Protocol):
    """Says what a page holds for a question."""

    name: str
    price: float
    identity: Mapping[str, Any]

    async def summary(self, question: str, query: str, text: str, deadline: float) -> str:
        """A few sentences within `deadline` seconds; ToolError when there are none."""
        ...


class WebTextSearch:
    """Text search through a provider, a reader and a summarizer.

    Args:
      reader: None shows the provider's snippets, unread. A provider of passages needs none.
      summarizer: None only together with the reader.
      results: summaries wanted.
      candidates: links to try at the most.
      deadline: seconds for everything; what is done by then is the result.
    """

    name = "text_search"

    def __init__(
        self,
        provider: TextProvider,
        reader: PageReader | None,
        summarizer: PageSummarizer | None,
        recorder: Recorder,
        *,
        results: int = 5,
        candidates: int = 10,
        deadline: float = 25.0,
    ):
        if (reader is None) != (summarizer is None):
            raise ValueError("a reader needs a summarizer, and a summarizer a reader")
        if not 1 <= results <= candidates:
            raise ValueError(
                f"{candidates} candidates cannot give {results} results: at least 1 result, and "
                "no fewer candidates than results"
            )
        if provider.passages:
            reader = summarizer = None
        self._provider, self._reader, self._summarizer = provider, reader, summarizer
        self._recorder = recorder
        self._results, self._deadline = results, deadline
        self._candidates = candidates if reader is not None else results
        self.provider = provider.name
        self.identity: Mapping[str, Any] = {
            "provider": dict(provider.identity),
            "reader": None if reader is None else dict(reader.identity),
            "summarizer": None if summarizer is None else dict(summarizer.identity),
            "results": results,
            "candidates": self._candidates,
        }

    async def run(self, call: ToolCall) -> tuple[ResultItem, ...]:
        found = await self.find(call)
        if not found.hits:
            raise ToolError("no_results")
        return tuple(hit.item() for hit in found.hits)

    async def find(self, call: ToolCall) -> Found:
        """The results; none when the provider knows no links.

        Raises:
          ToolError: the provider's, "budget", or "unread" when no page could be used.
        """
        until = time.monotonic() + self._deadline
        links = await self._links(call.query, until)
        if self._reader is None:
            hits = [hit for hit in links.hits if hit.text][: self._results]
            return Found(tuple(hits), links.cost, links.paid, provider=self.provider)

        async def use(hit: Hit) -> Found:
            return await self._use(hit, call, until)

        tried = await first_good(links.hits, use, self._results, until - time.monotonic())
        if links.hits and not tried.good:
            first = str(tried.errors[0]) if tried.errors else "timeout"
            raise ToolError("unread", f"none of {len(links.hits)} pages: {first}"[:200])
        return Found(
            tuple(hit for found in tried.good for hit in found.hits),
            links.cost + sum(found.cost for found in tried.good),
            links.paid + sum(found.paid for found in tried.good),
            provider=self.provider,
            complete=tried.complete,
        )

    async def _links(self, query: str, until: float) -> Found:
        provider, count = self._provider, self._candidates
        request = Request(
            "links",
            provider.name,
            {"identity": dict(provider.identity), "query": query, "count": count},
        )
        return await self._recorder.ask(
            request, lambda: provider.search(query, count, _left(until)), provider.price
        )

    async def _use(self, hit: Hit, call: ToolCall, until: float) -> Found:
        """One link, read and summarised."""
        page = await self._page(hit, until)
        text = page.hits[0].text
        asked = Request("summary", self._summarizer.name, {
            "identity": dict(self._summarizer.identity),
            "question": call.question,
            "query": call.query,
            "page": hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
        })  # fmt: skip

        async def live() -> Found:
            summarizer = self._summarizer
            said = await summarizer.summary(call.question, call.query, text, _left(until))
            if not said.strip():
                raise ToolError("bad_response", "an empty summary")
            return Found((Hit("", text=said.strip()),), summarizer.price)

        summary = await self._recorder.ask(asked, live, self._summarizer.price)
        title = hit.title or page.hits[0].title
        return Found(
            (Hit(title, hit.link, summary.hits[0].text),),
            page.cost + summary.cost,
            page.paid + summary.paid,
        )

    async def _page(self, hit: Hit, until: float) -> Found:
        reader = self._reader
        request = Request("page", reader.name, {"identity": dict(reader.identity), "url": hit.link})

        async def live() -> Found:
            title, text = await reader.page(hit.link, _left(until))
            if not text.strip():
                raise ToolError("bad_response", "a page without text")
            return Found((Hit(title, hit.link, text),), reader.price)

        return await self._recorder.ask(request, live, reader.price)


def _left(until: float) -> float:
    """Seconds left. ToolError "timeout" when there are none to speak of."""
    left = until - time.monotonic()
    if left < LEAST:
        raise ToolError("timeout")
    return left
