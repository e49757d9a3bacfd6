"""SearXNG, self-hosted: query -> links with snippets.

Format: https://docs.searxng.org/dev/search_api.html, GET /search?format=json. The JSON format has
to be switched on in its settings.yml (`search: formats: [html, json]`); it answers 403 otherwise.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.hits import Found
from mmsr_jax.tools.http import Http, HttpRequest
from mmsr_jax.tools.providers import answers

NAME = "searxng"


@dataclasses.dataclass(frozen=True)
class SearxngConfig:
    """Where and how a SearXNG instance is asked."""

    url: str = "http://127.0.0.1:8080"
    language: str = "en"
    engines: str = ""  # comma-separated; empty: the instance's own choice
    categories: str = "general"
    safesearch: int = 0
    price: float = 0.0  # US dollars a search; it is your own machine

    def __post_init__(self):
        answers.base_url(self.url, "SearXNG")
        answers.price(self.price, "web.searxng.price")


class SearxngText:
    """A SearXNG instance."""

    name = NAME
    passages = False

    def __init__(self, config: SearxngConfig, http: Http):
        self._config, self._http = config, http
        self._url = answers.base_url(config.url, "SearXNG")
        self.price = config.price
        self._params = {
            "language": config.language,
            "categories": config.categories,
            "safesearch": str(config.safesearch),
        } | ({"engines": config.engines} if config.engines else {})

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"engine": "searxng", **self._params, "url": self._url}

    async def search(self, query: str, count: int, deadline: float) -> Found:
        request = HttpRequest(
            NAME, "GET", f"{self._url}/search",
            params={"q": query, "format": "json"} | self._params, deadline=deadline,
        )  # fmt: skip
        try:
            answer = answers.table(await self._http.send(request), "SearXNG")
        except ToolError as error:
            if error.kind == "unauthorized":
                raise ToolError(
                    "unauthorized", "SearXNG refuses: is json among search.formats in settings.yml?"
                ) from None
            raise
        results = answers.entries(answer, "results", "SearXNG")
        hits = answers.links(results, "title", "url", "content")[:count]
        if not hits and answer.get("unresponsive_engines"):
            # Nothing was found because nobody was asked: that is no answer to keep.
            raise ToolError("server_error", "no engine of SearXNG answered")
        return Found(tuple(hits), self.price, provider=NAME)
