"""SerpApi: Google for texts, Google Lens for pictures.

Formats: https://serpapi.com/search-api, https://serpapi.com/google-lens-api and
https://serpapi.com/api-errors. A 200 without results has `error` beside
`search_metadata.status` "Success"; an account without searches left answers 429, like a rate
limit, and only its words tell the two apart. The status "Cached" is their clients' word for an
answer from SerpApi's own cache, which is free.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.hits import Found, Hit
from mmsr_jax.tools.http import Http, HttpRequest
from mmsr_jax.tools.providers import answers
from mmsr_jax.tools.upload import Uploader, publish

NAME = "serpapi"


@dataclasses.dataclass(frozen=True)
class SerpApiConfig:
    """Where and how SerpApi is asked."""

    url: str = "https://serpapi.com"
    key_variable: str = "SERPAPI_API_KEY"  # environment variable that holds the key
    language: str = "en"  # hl
    country: str = "us"  # gl of Google, country of Lens
    # US dollars a search: 75 a month for 5,000 (serpapi.com/pricing); put your plan's price here.
    price: float = 0.015

    def __post_init__(self):
        answers.base_url(self.url, "SerpApi")
        answers.price(self.price, "web.serpapi.price")
        answers.variable(self.key_variable, "SerpApi")


class _SerpApi:
    name = NAME

    def __init__(self, config: SerpApiConfig, http: Http, key: str):
        self._config, self._http, self._key = config, http, key
        self._url = answers.base_url(config.url, "SerpApi")
        self.price = config.price

    async def _search(self, engine: str, deadline: float, **params: str) -> dict[str, Any]:
        request = HttpRequest(
            NAME, "GET", f"{self._url}/search.json",
            params={"engine": engine, "hl": self._config.language, "api_key": self._key, **params},
            deadline=deadline, secrets=(self._key,),
        )  # fmt: skip
        try:
            answer = answers.table(await self._http.send(request), "SerpApi")
        except ToolError as error:
            if "run out of searches" in answers.said(error):
                raise ToolError("quota", "the SerpApi account has no searches left") from None
            raise
        metadata = answer.get("search_metadata")
        status = metadata.get("status") if isinstance(metadata, dict) else None
        if status == "Error":
            raise ToolError("server_error", "SerpApi could not complete the search")
        if status not in ("Success", "Cached"):
            raise ToolError("bad_response", f"SerpApi's search has status {str(status)[:40]!r}")
        return answer

    def _found(self, hits: list[Hit], count: int, answer: dict[str, Any]) -> Found:
        cached = answer["search_metadata"]["status"] == "Cached"  # in their cache: free
        return Found(tuple(hits[:count]), 0.0 if cached else self.price, provider=NAME)


class SerpApiText(_SerpApi):
    """Google through SerpApi: query -> links with snippets (`organic_results`)."""

    passages = False

    @property
    def identity(self) -> Mapping[str, Any]:
        c = self._config
        return {"engine": "google", "hl": c.language, "gl": c.country, "url": self._url}

    async def search(self, query: str, count: int, deadline: float) -> Found:
        answer = await self._search("google", deadline, q=query, gl=self._config.country)
        results = answers.entries(answer, "organic_results", "SerpApi")
        return self._found(answers.links(results, "title", "link", "snippet"), count, answer)


class SerpApiLens(_SerpApi):
    """Google Lens through SerpApi: picture -> titles and thumbnails (`visual_matches`)."""

    def __init__(self, config: SerpApiConfig, http: Http, key: str, uploader: Uploader):
        super().__init__(config, http, key)
        self._uploader = uploader

    @property
    def identity(self) -> Mapping[str, Any]:
        c = self._config
        return {"engine": "google_lens", "hl": c.language, "gl": c.country, "url": self._url}

    async def search(self, picture: bytes, count: int, deadline: float) -> Found:
        url, left = await publish(self._uploader, picture, deadline)
        answer = await self._search(
            "google_lens", left, url=url, country=self._config.country, type="visual_matches"
        )
        return self._found(lens_hits(answer, "visual_matches", "SerpApi"), count, answer)


def lens_hits(answer: dict[str, Any], name: str, service: str) -> list[Hit]:
    """Matches with a title and a picture to show; SerpApi's and Serper's names of the fields."""
    return [
        Hit(title, answers.address(entry, "link"), thumbnail=thumbnail)
        for entry in answers.entries(answer, name, service)
        if (title := answers.text(entry, "title"))
        and (thumbnail := answers.address(entry, "thumbnail", "thumbnailUrl", "image", "imageUrl"))
    ]
