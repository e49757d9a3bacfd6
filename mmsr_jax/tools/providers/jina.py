"""Jina Search: query -> links with descriptions.

Format: https://jina.ai/reader (s.jina.ai). GET /?q=... with `Accept: application/json` answers
{"code": 200, "data": [{"title", "url", "description"}]}; `X-Respond-With: no-content` leaves the
pages' texts out, which the reader fetches. A query without results is a 422 that says "No search
results available".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.hits import Found
from mmsr_jax.tools.http import Http, HttpRequest
from mmsr_jax.tools.providers import answers

NAME = "jina"


@dataclasses.dataclass(frozen=True)
class JinaSearchConfig:
    """Where and how Jina Search is asked."""

    url: str = "https://s.jina.ai"
    key_variable: str = "JINA_API_KEY"  # environment variable that holds the key
    language: str = "en"  # hl
    country: str = "us"  # gl
    # US dollars a search: 10,000 tokens each at 0.05 a million (jina.ai/reader); put your plan's.
    price: float = 0.0005

    def __post_init__(self):
        answers.base_url(self.url, "Jina Search")
        answers.price(self.price, "web.jina.price")
        answers.variable(self.key_variable, "Jina Search")


class JinaText:
    """Jina Search."""

    name = NAME
    passages = False

    def __init__(self, config: JinaSearchConfig, http: Http, key: str):
        self._config, self._http, self._key = config, http, key
        self._url = answers.base_url(config.url, "Jina Search")
        self.price = config.price

    @property
    def identity(self) -> Mapping[str, Any]:
        c = self._config
        return {"engine": "jina", "hl": c.language, "gl": c.country, "url": self._url}

    async def search(self, query: str, count: int, deadline: float) -> Found:
        c = self._config
        request = HttpRequest(
            NAME, "GET", f"{self._url}/", params={"q": query, "gl": c.country, "hl": c.language},
            headers={
                "Authorization": f"Bearer {self._key}", "Accept": "application/json",
                "X-Respond-With": "no-content",
            },
            deadline=deadline, secrets=(self._key,),
        )  # fmt: skip
        try:
            answer = answers.table(await self._http.send(request), "Jina Search")
        except ToolError as error:
            if "no search results available" in answers.said(error):
                return Found((), self.price, provider=NAME)
            raise
        results = answers.entries(answer, "data", "Jina Search")
        hits = answers.links(results, "title", "url", "description")[:count]
        return Found(tuple(hits), self.price, provider=NAME)
