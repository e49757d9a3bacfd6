"""Text search on the web: query -> links -> pages -> summaries.

The pipeline of MMSearch-R1 (arXiv 2506.20670, section 3.2): the first links are read and
summarised side by side, the next ones replace those that fail, and five summaries with their
links come back. Links, pages and summaries are recorded apart, so that another question with the
same query, or another query that finds the same page, pays only for what is new.
"""

import dataclasses
import hashlib
import time
from collections.abc import Mapping
from typing import Any

from mmsr_jax.tools.attempts import first_good
from mmsr_jax.tools.base import LEAST, ToolError, began, left
from mmsr_jax.tools.hits import Found, Hit, TextProvider
from mmsr_jax.tools.reader import Page, Reader
from mmsr_jax.tools.recorded import Recorder, Request
from mmsr_jax.tools.summarize import Summarizer
from mmsr_jax.types import ResultItem, ToolCall

# Goes up with every change of prompts, or of how sentences are chosen (summarize.py, passages.py):
# older summaries are then asked for anew.
SUMMARIES = 2


@dataclasses.dataclass(frozen=True)
class Stage:
    """How a stage of the pipeline is recorded, and what it costs."""

    name: str
    identity: Mapping[str, Any]  # what its answers depend on; JSON values, no secrets
    price: float = 0.0  # US dollars a page


class WebTextSearch:
    """Text search through a provider, a reader and a summarizer.

    Args:
      reader, summarizer: each with its stage; both None show the provider's snippets, unread. A
        provider of passages needs neither.
      results: summaries wanted.
      candidates: links to try at the most.
      deadline: seconds for everything, from the call's submission; what is done by then is the
        result.
    """

    name = "text_search"

    def __init__(
        self,
        provider: TextProvider,
        reader: tuple[Reader, Stage] | None,
        summarizer: tuple[Summarizer, Stage] | None,
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
            "reader": None if reader is None else dict(reader[1].identity),
            "summarizer": None if summarizer is None else dict(summarizer[1].identity),
            "summaries": None if summarizer is None else SUMMARIES,
            "results": results,
            "candidates": self._candidates,
        }

    async def run(self, call: ToolCall) -> tuple[ResultItem, ...]:
        found = await self.find(call)
        if not found.hits:
            raise ToolError("no_results")
        return tuple(hit.item() for hit in found.hits)

    async def find(self, call: ToolCall) -> Found:
        """The results; none when the provider knows no links, or no page says anything useful.

        Raises:
          ToolError: the provider's, "budget", "timeout" when no page came in time, "unread" when
            they failed for the moment.
        """
        until = began() + self._deadline
        links = await self._links(call.query, until)
        if self._reader is None:
            hits = [hit for hit in links.hits if hit.text][: self._results]
            return Found(tuple(hits), links.cost, links.paid, provider=self.provider)

        async def use(hit: Hit) -> Found:
            return await self._use(hit, call, until)

        tried = await first_good(links.hits, use, self._results, until - time.monotonic())
        if links.hits and not tried.good and not tried.complete:
            none = f"none of {len(links.hits)} pages"
            if tried.late or until - time.monotonic() < LEAST:  # who joined may have some
                raise ToolError("timeout", f"{none} in time")
            raise ToolError("unread", f"{none}: {tried.errors[0]}"[:200])
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
            request, lambda: provider.search(query, count, left(until)), provider.price
        )

    async def _use(self, hit: Hit, call: ToolCall, until: float) -> Found:
        """One link, read and summarised. ToolError when it is no use."""
        read = await self._page(hit.link, until)
        page = Page(hit.link, hit.title or read.hits[0].title, read.hits[0].text)
        summarizer, stage = self._summarizer
        text = page.text.encode("utf-8", "surrogatepass")
        request = Request(
            "summary",
            stage.name,
            {
                "identity": dict(stage.identity),
                "question": call.question,
                "query": call.query,
                "version": SUMMARIES,
                "title": page.title,
                "page": hashlib.sha256(text).hexdigest(),
            },
        )

        async def live() -> Found:
            said = await summarizer.summarize(call.question, call.query, page, left(until))
            return Found((Hit("", text=said),), stage.price)

        summary = await self._stage(request, live, stage.price, "no_results")
        return Found(
            (Hit(page.title, hit.link, summary.hits[0].text),),
            read.cost + summary.cost,
            read.paid + summary.paid,
        )

    async def _page(self, url: str, until: float) -> Found:
        reader, stage = self._reader
        request = Request("page", stage.name, {"identity": dict(stage.identity), "url": url})

        async def live() -> Found:
            page = await reader.read(url, left(until))
            return Found((Hit(page.title, page.url, page.text),), stage.price)

        return await self._stage(request, live, stage.price, "no_text")

    async def _stage(self, request: Request, live, price: float, nothing: str) -> Found:
        """Asks the recorder; that there is `nothing` is an answer too, and recorded."""

        async def known() -> Found:
            try:
                return await live()
            except ToolError as error:
                if error.kind != nothing:
                    raise
                return Found((), price)

        found = await self._recorder.ask(request, known, price)
        if not found.hits:
            raise ToolError(nothing)
        return found
