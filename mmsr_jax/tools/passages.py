"""Sentences of a page, ranked by BM25: what of it has to do with a query. No model, no chance."""

import math
import re
from collections import Counter
from collections.abc import Sequence

K1, B = 1.5, 0.75  # of BM25, as Lucene and most others set them (k1 1.2 to 2)
NEIGHBOUR = 0.3  # share of the sentences beside it that a sentence gets: answers stand near words
MAX_SENTENCES = 5000
MAX_SENTENCE_CHARS = 500

_TERM = re.compile(r"[぀-ヿ㐀-鿿가-힯]|[^\W_぀-ヿ㐀-鿿가-힯]+")
# A mark, perhaps a closing quote, space, perhaps an opening quote, and no small letter.
_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'”’»)\]]))\s+(?=[\"'“‘«(\[]*[^\Wa-z_])|(?<=[。！？])\s*|\n+"
)


def terms(text: str) -> list[str]:
    """Words in one case; of scripts that write no spaces, characters."""
    return _TERM.findall(text.casefold())


def sentences(text: str) -> list[str]:
    """Sentences and lines of a text, long ones cut, white space made one."""
    found = []
    for piece in _END.split(text):
        piece = " ".join(piece.split())
        while piece:
            cut = len(piece)
            if cut > MAX_SENTENCE_CHARS:
                cut = piece.rfind(" ", 1, MAX_SENTENCE_CHARS) + 1 or MAX_SENTENCE_CHARS
            found.append(piece[:cut].strip())
            piece = piece[cut:]
            if len(found) == MAX_SENTENCES:
                return found
    return found


def scores(texts: Sequence[str], query: str) -> list[float]:
    """BM25 of each text, as a document of the collection `texts`. 0.0: no word of the query."""
    counts = [Counter(terms(text)) for text in texts]
    lengths = [sum(count.values()) for count in counts]
    mean = sum(lengths) / len(lengths) if sum(lengths) else 1.0
    result = [0.0] * len(texts)
    for term in dict.fromkeys(terms(query)):
        inside = [number for number, count in enumerate(counts) if term in count]
        weight = math.log(1 + (len(texts) - len(inside) + 0.5) / (len(inside) + 0.5))
        for number in inside:
            count = counts[number][term]
            norm = count + K1 * (1 - B + B * lengths[number] / mean)
            result[number] += weight * count * (K1 + 1) / norm
    return result


def best(text: str, query: str, most: int, max_chars: int) -> list[str]:
    """The sentences that fit a query best, in the order in which they stand.

    Args:
        most: sentences at the most.
        max_chars: characters at the most, over all of them.

    Returns:
        Distinct sentences; none if no word of the query occurs.
    """
    pieces = sentences(text)
    plain = scores(pieces, query)
    if not any(plain):
        return []
    padded = [0.0, *plain, 0.0]
    near = [
        own + NEIGHBOUR * (padded[number] + padded[number + 2]) / 2
        for number, own in enumerate(plain)
    ]
    chosen: list[int] = []
    seen: set[str] = set()
    room = max_chars
    for number in sorted(range(len(pieces)), key=lambda i: (-near[i], i)):
        if near[number] <= 0 or len(chosen) == most:
            break
        piece = pieces[number]
        if piece not in seen and len(piece) <= room:
            chosen.append(number)
            seen.add(piece)
            room -= len(piece) + 1
    return [pieces[number] for number in sorted(chosen)]
