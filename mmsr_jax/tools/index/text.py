"""What the text back ends share: their shape, and the words of a query."""

import pathlib
import re
import unicodedata
from collections.abc import Callable, Iterable
from typing import Protocol

from mmsr_jax.tools.local import MAX_QUERY_CHARS, MAX_QUERY_TERMS, Passage

Scored = list[tuple[Passage, float]]
MOST_PASSAGES = 4096  # of the best passages are looked at, to find those of different articles


class TextIndex(Protocol):
    """An opened text index, safe to use from several threads."""

    def __len__(self) -> int:
        """Passages."""
        ...

    def scored(self, query: str, topk: int) -> Scored:
        """The best passage of each of the `topk` best articles (`link`) with its BM25 score,
        higher is better. May be empty, never raises, whatever the query."""
        ...

    def search(self, query: str, topk: int) -> list[Passage]:
        """`scored` without the scores: what `LocalTextSearch` asks."""
        ...

    def close(self) -> None: ...


class TextWriter(Protocol):
    """Adds passages to a new index; nothing can be found before `finish`."""

    def add(self, passages: Iterable[Passage]) -> None: ...

    def finish(self) -> None: ...


def words(query: str) -> list[str]:
    """Distinct words of a query in their order, folded as the indices fold their text."""
    return list(dict.fromkeys(re.findall(r"\w+", folded(query[:MAX_QUERY_CHARS]))))[
        :MAX_QUERY_TERMS
    ]


def folded(text: str) -> str:
    """Small letters without accents."""
    parts = unicodedata.normalize("NFD", text.lower())
    kept = "".join(c for c in parts if not unicodedata.combining(c))
    return unicodedata.normalize("NFC", kept)  # Hangul whole again


def best_by_link(fetch: Callable[[int], Scored], topk: int) -> Scored:
    """One passage an article: asks `fetch` for more and more until there are enough articles.

    Fewer than `topk` come back where `MOST_PASSAGES` of them belong to fewer articles.

    Args:
        fetch: limit -> the best passages, best first.
    """
    limit = 4 * topk
    while True:
        found = fetch(limit)
        best: dict[str, tuple[Passage, float]] = {}
        for passage, score in found:
            best.setdefault(passage.link, (passage, score))
        if len(best) >= topk or len(found) < limit or limit >= MOST_PASSAGES:
            return list(best.values())[:topk]
        limit *= 4


def file_bytes(folder: pathlib.Path) -> int:
    """Bytes of all files under a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
