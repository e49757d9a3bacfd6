"""Serper: Google for texts (`/search`), Google Lens for pictures (`/lens`).

Format: https://serper.dev/playground. POST with JSON and the header X-API-KEY; both answer a list
`organic` and the `credits` they took. An account without credits answers 400 with the words
"Not enough credits".
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.hits import Found, Hit
from mmsr_jax.tools.http import Http, HttpRequest
from mmsr_jax.tools.providers import answers
from mmsr_jax.tools.providers.serpapi import lens_hits
from mmsr_jax.tools.upload import Uploader, publish

NAME = "serper"


@dataclasses.dataclass(frozen=True)
class SerperConfig:
    """Where and how Serper is asked."""

    url: str = "https://google.serper.dev"
    key_variable: str = "SERPER_API_KEY"  # environment variable that holds the key
    language: str = "en"  # hl
    country: str = "us"  # gl
    # US dollars a credit: 50 for 50,000 (serper.dev); put your plan's price here.
    price: float = 0.001
    lens_credits: int = 3  # set aside for a Lens search; the answer says what it really took

    def __post_init__(self):
        answers.base_url(self.url, "Serper")
        answers.price(self.price, "web.serper.price")
        answers.variable(self.key_variable, "Serper")
        if self.lens_credits < 1:
            raise ValueError(
                f"web.serper.lens_credits must be at least 1, not {self.lens_credits}: a call "
                "without a price is not counted, whatever its answer says"
            )


class _Serper:
    name = NAME

    def __init__(self, config: SerperConfig, http: Http, key: str):
        self._config, self._http, self._key = config, http, key
        self._url = answers.base_url(config.url, "Serper")
        self.price = config.price

    async def _search(self, path: str, deadline: float, **content: object) -> dict[str, Any]:
        c = self._config
        request = HttpRequest(
            NAME, "POST", f"{self._url}/{path}", headers={"X-API-KEY": self._key},
            json={"gl": c.country, "hl": c.language, **content}, deadline=deadline,
            secrets=(self._key,),
        )  # fmt: skip
        try:
            return answers.table(await self._http.send(request), "Serper")
        except ToolError as error:
            if "not enough credits" in answers.said(error):
                raise ToolError("quota", "the Serper account has no credits left") from None
            raise

    def _found(self, hits: list[Hit], count: int, answer: dict[str, Any]) -> Found:
        credits = answer.get("credits")
        known = isinstance(credits, int) and not isinstance(credits, bool) and credits >= 0
        cost = credits * self._config.price if known else self.price
        return Found(tuple(hits[:count]), cost, provider=NAME)


class SerperText(_Serper):
    """Google through Serper: query -> links with snippets."""

    passages = False

    @property
    def identity(self) -> Mapping[str, Any]:
        c = self._config
        return {"engine": "search", "hl": c.language, "gl": c.country, "url": self._url}

    async def search(self, query: str, count: int, deadline: float) -> Found:
        answer = await self._search("search", deadline, q=query)
        results = answers.entries(answer, "organic", "Serper")
        return self._found(answers.links(results, "title", "link", "snippet"), count, answer)


class SerperLens(_Serper):
    """Google Lens through Serper: picture -> titles and thumbnails."""

    def __init__(self, config: SerperConfig, http: Http, key: str, uploader: Uploader):
        super().__init__(config, http, key)
        self._uploader = uploader
        self.price = config.price * config.lens_credits

    @property
    def identity(self) -> Mapping[str, Any]:
        c = self._config
        return {"engine": "lens", "hl": c.language, "gl": c.country, "url": self._url}

    async def search(self, picture: bytes, count: int, deadline: float) -> Found:
        url, left = await publish(self._uploader, picture, deadline)
        answer = await self._search("lens", left, url=url)
        return self._found(lens_hits(answer, "organic", "Serper"), count, answer)
