"""From configuration to a run's search tools: providers, reader, store, budget, in one piece."""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Literal

from mmsr_jax.tools.base import Tool, ToolError
from mmsr_jax.tools.budget import Budget, BudgetConfig
from mmsr_jax.tools.fvqa_cache import FvqaImageSearch
from mmsr_jax.tools.hits import ImageProvider, TextProvider
from mmsr_jax.tools.http import Http, HttpConfig, HttpRequest
from mmsr_jax.tools.image_search import WebImageSearch
from mmsr_jax.tools.index.open import LocalIndex, index_tools
from mmsr_jax.tools.limits import Limits
from mmsr_jax.tools.pictures import PictureLimits, reencode
from mmsr_jax.tools.providers import answers
from mmsr_jax.tools.providers.jina import JinaSearchConfig, JinaText
from mmsr_jax.tools.providers.retriever import RetrieverConfig, RetrieverImages, RetrieverText
from mmsr_jax.tools.providers.searxng import SearxngConfig, SearxngText
from mmsr_jax.tools.providers.serpapi import SerpApiConfig, SerpApiLens, SerpApiText
from mmsr_jax.tools.providers.serper import SerperConfig, SerperLens, SerperText
from mmsr_jax.tools.reader import Reader, ReaderConfig, make_reader
from mmsr_jax.tools.recorded import Recorded, Recorder
from mmsr_jax.tools.store import Store, StoreConfig
from mmsr_jax.tools.summarize import SummarizeConfig, make_summarizer
from mmsr_jax.tools.upload import UploadConfig, uploader
from mmsr_jax.tools.web import Stage, WebTextSearch

TextName = Literal["serper", "serpapi", "searxng", "jina", "retriever"]
ImageName = Literal["serper", "serpapi", "retriever"]
Backend = Literal["local", "index", "web", "fvqa"]
# Settings that change how, not what, is read or said: no part of what the store knows a call by.
FREE = {
    "parsers", "parser_memory", "browser_sandbox", "jina_url", "jina_key_env", "base_url",
    "key_env",
}  # fmt: skip
# Paid services are paced as small plans allow: put your plan's numbers into web.http.limits. The
# web at large, where every page is on another host, and machines of one's own are not held back.
LIMITS = {
    "serper": Limits(rate=50, burst=50, concurrency=64),
    "serpapi": Limits(rate=5, burst=10, concurrency=32),
    "jina": Limits(rate=1.6, burst=10, concurrency=16),
    "jina_reader": Limits(rate=8, burst=20, concurrency=32),
    "searxng": Limits(rate=50, burst=50, concurrency=32),
    "retriever": Limits(rate=1000, burst=1000, concurrency=64),
    "summarizer": Limits(rate=1000, burst=1000, concurrency=64),
    "web": Limits(rate=500, burst=500, concurrency=128),
    "browser": Limits(rate=500, burst=500, concurrency=128),
    "thumbnails": Limits(rate=500, burst=500, concurrency=128),
}


@dataclasses.dataclass(frozen=True)
class WebConfig:
    """Search on the web: who is asked, how far, and what it costs."""

    text: TextName = "serper"
    image: ImageName = "serper"
    read: bool = True  # False: the text provider's snippets are the results, no page is read
    text_candidates: int = 10  # links tried at the most
    image_candidates: int = 15  # matches tried at the most
    deadline: float = 25.0  # seconds for a search with all its pages; below tools.deadline
    page_price: float = 0.0  # US dollars that reading a page costs; Jina Reader bills tokens
    summary_price: float = 0.0  # US dollars that a summary costs, for a model that is not yours
    serper: SerperConfig = SerperConfig()
    serpapi: SerpApiConfig = SerpApiConfig()
    searxng: SearxngConfig = SearxngConfig()
    jina: JinaSearchConfig = JinaSearchConfig()
    retriever: RetrieverConfig = RetrieverConfig()
    upload: UploadConfig = UploadConfig()
    reader: ReaderConfig = ReaderConfig()
    summarizer: SummarizeConfig = SummarizeConfig()
    pictures: PictureLimits = PictureLimits()
    http: HttpConfig = HttpConfig(limits=LIMITS)

    def __post_init__(self):
        # Whoever sets one provider's limits has said nothing about the others.
        limits = {**LIMITS, **self.http.limits}
        object.__setattr__(self, "http", dataclasses.replace(self.http, limits=limits))
        for name in ("page_price", "summary_price"):
            answers.price(getattr(self, name), f"web.{name}")
        answers.base_url(self.reader.jina_url, "Jina Reader")
        if self.reader.jina_key_env:
            answers.variable(self.reader.jina_key_env, "Jina Reader")
        if not self.deadline > 0:
            raise ValueError(f"web.deadline must be above 0 seconds, not {self.deadline}")


class Nobody:
    """Stands where a service would be asked, in a replay: there is no key, and no need of one."""

    async def _refuse(self, *_: object) -> Any:
        raise ToolError("not_recorded")

    read = summarize = publish = _refuse

    async def close(self) -> None:
        """Nothing to end."""


class Search:
    """A run's search tools, and what they share. `tools` go into a `Toolbox`."""

    def __init__(
        self,
        tools: Mapping[str, Tool],
        recorder: Recorder | None = None,
        http: Http | None = None,
        reader: Reader | None = None,
        index: LocalIndex | None = None,
    ):
        self.tools = dict(tools)
        self.recorder, self._http, self._reader, self._index = recorder, http, reader, index

    def counters(self) -> dict[str, float]:
        """Totals since the start: "tools/live", "tools/from_store", "tools/joined",
        "tools/recorded", "tools/failed", "tools/paid" (US dollars, restarts included) and
        "tools/paid_calls"; empty for local tools without a store."""
        if self.recorder is None:
            return {}
        return {f"tools/{name}": value for name, value in self.recorder.counters().items()}

    def check(self) -> None:
        """Raises SearchStopped when the money is spent, or a provider takes us no more."""
        if self.recorder is not None:
            self.recorder.check()

    async def close(self) -> None:
        """Ends connections and processes, closes store and index; on the tools' event loop."""
        # From the last to the first. One that fails, or is cut off, does not keep the others open.
        async with contextlib.AsyncExitStack() as closing:
            if self.recorder is not None:
                closing.callback(self.recorder.close)
            if self._index is not None:
                closing.callback(self._index.close)
            for part in (self._http, self._reader):
                if part is not None:
                    closing.push_async_callback(part.close)


def assemble(
    backend: Backend,
    web: WebConfig,
    store: StoreConfig,
    budget: BudgetConfig,
    *,
    image_results: int,
    text_results: int,
    deadline: float,
    local: Callable[[], Mapping[str, Tool]],
    local_identity: Mapping[str, Any],
    index: Callable[[], LocalIndex] | None = None,
    ledger: pathlib.Path | None = None,
    only: str = "",
) -> Search:
    """The tools that a configuration describes.

    Args:
      deadline: of the toolbox, in seconds.
      local, local_identity: makes the tools of the embedded world; what their answers depend on.
      index: opens the index folder that backend "index" searches; nothing else needs it.
      ledger: where payments are written down; None for nowhere.
      only: "text_search" or "image_search" when the other is not wanted, nor its keys.

    Raises:
      ValueError: settings that clash, a key that is not in the environment, no such index.
    """
    if backend == "local" and not store.path:
        return Search(local())
    if backend == "index":
        return _indexed(index(), store, budget, image_results, text_results, only, ledger)
    if backend == "fvqa" and not store.path:
        raise ValueError(
            "tools.backend 'fvqa' takes its picture searches from tools.store.path: make the store "
            "with `mmsr search store PATH --fvqa CACHE.pkl --questions PARQUET...`"
        )
    if backend != "local" and not web.deadline < deadline:
        raise ValueError(
            f"tools.web.deadline is {web.deadline:g} s, tools.deadline {deadline:g} s: the "
            "search must end first, or its results are lost"
        )
    recorder = _recorder(store, budget, ledger)
    if backend == "local":
        tools = local().values()
        return Search({t.name: Recorded(t, recorder, local_identity) for t in tools}, recorder)
    try:
        return _web(backend, web, recorder, image_results, text_results, only)
    except BaseException:
        recorder.close()
        raise


def _recorder(store: StoreConfig, budget: BudgetConfig, ledger: pathlib.Path | None) -> Recorder:
    create = store.mode != "replay"
    opened = Store(store.path, store.max_bytes, create) if store.path else None
    return Recorder(opened, store.mode, store.ttl, Budget(budget.money, ledger))


def _indexed(
    index: LocalIndex,
    store: StoreConfig,
    budget: BudgetConfig,
    images: int,
    texts: int,
    only: str,
    ledger: pathlib.Path | None,
) -> Search:
    """Tools over an open index folder, which is closed with them."""
    try:
        tools = index_tools(index, images, texts)
        for name, content in (("image_search", "pictures"), ("text_search", "documents")):
            if only in ("", name) and name not in tools:
                raise ValueError(
                    f"the index {index.folder} has no {content}, so there is no {name}: build it "
                    f"from a source that has {content} too (mmsr search index SOURCE OUT)"
                )
        if not store.path:
            return Search(tools, index=index)
        # Where it lies is no part of it: the same files, indexed the same way, answer the same.
        identity = {
            "index": index.manifest.fingerprint, "image_results": images, "text_results": texts,
        }  # fmt: skip
        recorder = _recorder(store, budget, ledger)
        recorded = {name: Recorded(tool, recorder, identity) for name, tool in tools.items()}
        return Search(recorded, recorder, index=index)
    except BaseException:
        index.close()
        raise


def _web(
    backend: str, web: WebConfig, recorder: Recorder, images: int, texts: int, only: str
) -> Search:
    replay = recorder.mode == "replay"
    http = Http(web.http)
    tools: dict[str, Tool] = {}
    reader = None
    if only != "image_search":
        provider = text_provider(web, http, replay)
        summarizer = None
        if web.read and not provider.passages:
            summarizer = Nobody() if replay else make_summarizer(http, web.summarizer)
            reader = Nobody() if replay else make_reader(http, web.reader)
        reading = Stage(f"{web.reader.kind}_reader", _kept(web.reader), web.page_price)
        telling = Stage(web.summarizer.kind, _kept(web.summarizer), web.summary_price)
        text = WebTextSearch(
            provider,
            None if reader is None else (reader, reading),
            None if summarizer is None else (summarizer, telling),
            recorder,
            results=texts,
            candidates=max(web.text_candidates, texts),
            deadline=web.deadline,
        )
        tools["text_search"] = Recorded(text, recorder)
    if only != "text_search" and backend == "fvqa":
        tools["image_search"] = FvqaImageSearch(recorder, images)
    elif only != "text_search":
        search = WebImageSearch(
            image_provider(web, http, replay),
            thumbnails(http, web.pictures),
            functools.partial(reencode, limits=web.pictures),
            recorder,
            results=images,
            candidates=max(web.image_candidates, images),
            deadline=web.deadline,
        )
        tools["image_search"] = Recorded(search, recorder)
    return Search(tools, recorder, http, reader)


def thumbnails(http: Http, limits: PictureLimits) -> Callable[[str, float], Awaitable[bytes]]:
    """Gets (URL, seconds) -> the bytes there, from public addresses only."""

    async def fetch(url: str, seconds: float) -> bytes:
        request = HttpRequest(
            "thumbnails", "GET", url, deadline=seconds, public_only=True, max_bytes=limits.max_bytes
        )
        return (await http.send(request)).body

    return fetch


def text_provider(web: WebConfig, http: Http, replay: bool = False) -> TextProvider:
    """The text search engine that `web.text` names. ValueError for a missing key."""
    name = web.text
    if name == "serper":
        return SerperText(web.serper, http, _key(web.serper.key_variable, "Serper", replay))
    if name == "serpapi":
        return SerpApiText(web.serpapi, http, _key(web.serpapi.key_variable, "SerpApi", replay))
    if name == "jina":
        return JinaText(web.jina, http, _key(web.jina.key_variable, "Jina Search", replay))
    if name == "searxng":
        return SearxngText(web.searxng, http)
    return RetrieverText(web.retriever, http)


def image_provider(web: WebConfig, http: Http, replay: bool = False) -> ImageProvider:
    """The image search engine that `web.image` names. ValueError for a missing key or uploader."""
    if web.image == "retriever":
        return RetrieverImages(web.retriever, http)
    publisher = Nobody() if replay else uploader(web.upload)
    if web.image == "serper":
        key = _key(web.serper.key_variable, "Serper", replay)
        return SerperLens(web.serper, http, key, publisher)
    key = _key(web.serpapi.key_variable, "SerpApi", replay)
    return SerpApiLens(web.serpapi, http, key, publisher)


def _key(variable: str, service: str, replay: bool) -> str:
    return "" if replay else answers.key(variable, service)


def _kept(config: Any) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
