"""A retriever of one's own: Search-R1's HTTP interface, and an image search beside it.

Format of texts: Search-R1's retrieval server (github.com/PeterGriffinJin/Search-R1), POST
/retrieve with {"queries": [...], "topk": k, "return_scores": true}; the answer's `result` has a
list for every query of {"document": {"contents": ...}, "score": ...}, or of bare documents. A
document's first line of `contents` is its title, in quotes; `title`, `text` and `link` (or `url`)
are used where they are.
Format of pictures: POST /image with {"image": base64, "topk": k}; the answer's `result` is
a list of {"title", "link", "thumbnail": base64}.
"""

import base64
import binascii
import dataclasses
from collections.abc import Mapping
from typing import Any

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.hits import Found, Hit
from mmsr_jax.tools.http import Http, HttpRequest
from mmsr_jax.tools.providers import answers

NAME = "retriever"


@dataclasses.dataclass(frozen=True)
class RetrieverConfig:
    """Where a retriever is asked; `mmsr search serve` is one."""

    url: str = "http://127.0.0.1:8000"
    index: str = ""  # name or version of its index: what the store knows a call by; empty: by url
    price: float = 0.0  # US dollars a call; it is your own machine

    def __post_init__(self):
        answers.base_url(self.url, "the retriever")
        answers.price(self.price, "web.retriever.price")


class _Retriever:
    name = NAME

    def __init__(self, config: RetrieverConfig, http: Http):
        self._http = http
        self._url = answers.base_url(config.url, "the retriever")
        self.price = config.price
        self._index = config.index

    @property
    def identity(self) -> Mapping[str, Any]:
        # With a name not the address: the same index may be served elsewhere tomorrow.
        where = {} if self._index else {"url": self._url}
        return {"engine": "retriever", "index": self._index, **where}

    async def _post(self, path: str, content: object, deadline: float) -> list[Any]:
        request = HttpRequest(NAME, "POST", f"{self._url}{path}", json=content, deadline=deadline)
        answer = answers.table(await self._http.send(request), "the retriever")
        result = answer.get("result")
        if not isinstance(result, list):
            raise ToolError("bad_response", "the retriever's result is no list")
        return result


class RetrieverText(_Retriever):
    """query -> passages. There is nothing to read behind them."""

    passages = True

    async def search(self, query: str, count: int, deadline: float) -> Found:
        content = {"queries": [query], "topk": count, "return_scores": True}
        result = await self._post("/retrieve", content, deadline)
        if len(result) != 1 or not isinstance(result[0], list):
            raise ToolError("bad_response", f"{len(result)} results for 1 query")
        hits = [hit for entry in result[0] if (hit := _passage(entry)) is not None]
        return Found(tuple(hits[:count]), self.price, provider=NAME)


class RetrieverImages(_Retriever):
    """picture -> titles and thumbnails."""

    async def search(self, picture: bytes, count: int, deadline: float) -> Found:
        content = {"image": base64.b64encode(picture).decode(), "topk": count}
        hits = []
        for entry in await self._post("/image", content, deadline):
            if not isinstance(entry, dict) or not (title := answers.text(entry, "title")):
                continue
            thumbnail = entry.get("thumbnail")
            try:
                shown = base64.b64decode(thumbnail, validate=True) if thumbnail else None
            except (binascii.Error, TypeError, ValueError):
                raise ToolError("bad_response", "a thumbnail is not base64") from None
            hits.append(Hit(title, answers.address(entry, "link", "url"), picture=shown))
        return Found(tuple(hits[:count]), self.price, provider=NAME)


def _passage(entry: Any) -> Hit | None:
    if not isinstance(entry, dict):
        return None
    document = entry.get("document", entry)
    if not isinstance(document, dict):
        return None
    title, link = answers.text(document, "title"), answers.address(document, "link", "url")
    body = answers.text(document, "text")
    first, _, rest = answers.text(document, "contents").partition("\n")
    if not body:
        body = rest.strip() or first.strip()
    if not title and rest.strip():
        title = first.strip().strip('"')
    return Hit(title, link, body) if body else None
