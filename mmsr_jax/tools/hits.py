"""What searching yields before it becomes results: hits with their price, and who found them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from mmsr_jax.types import ResultItem, ToolCall

Source = str  # "live", "store" or "joined"


@dataclasses.dataclass(frozen=True)
class Hit:
    """One ranked thing that was found: a link, a picture or a passage."""

    title: str
    link: str = ""
    text: str = ""  # snippet of a link, text of a page, or a whole passage
    thumbnail: str = ""  # URL of a picture, where the provider gives one
    picture: bytes | None = None  # the picture itself, where there is one

    def item(self) -> ResultItem:
        return ResultItem(self.title, self.link, self.text, self.picture)


@dataclasses.dataclass(frozen=True)
class Found:
    """The answer to one request, with what it cost.

    Money is in US dollars. `cost` is what asking for it live costs; `paid` is what this very call
    has spent: nothing, where the store or a call in flight had the answer.
    """

    hits: tuple[Hit, ...]  # best first; none: the service was asked and knows nothing
    cost: float = 0.0
    paid: float = 0.0
    seconds: float = 0.0
    provider: str = "local"
    source: Source = "live"
    complete: bool = True  # False: some of it failed for the moment; good enough, not for keeping


class Finder(Protocol):
    """A tool that tells what its results cost. `identity` is what its answers depend on."""

    name: str
    provider: str
    identity: Mapping[str, Any]  # JSON values, no secrets

    async def find(self, call: ToolCall) -> Found: ...


class TextProvider(Protocol):
    """A text search engine. `passages`: its texts are whole passages, there is nothing to read."""

    name: str
    price: float  # US dollars a call
    identity: Mapping[str, Any]
    passages: bool

    async def search(self, query: str, count: int, deadline: float) -> Found:
        """At most `count` hits within `deadline` seconds; ToolError when it cannot be asked."""
        ...


class ImageProvider(Protocol):
    """An image search engine."""

    name: str
    price: float
    identity: Mapping[str, Any]

    async def search(self, picture: bytes, count: int, deadline: float) -> Found: ...
