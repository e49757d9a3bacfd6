"""Documents, pictures and questions of any number, drawn from a seed, for `mmsr bench tools`."""

import functools
import io
import json
import pathlib

import numpy as np
from PIL import Image

VOCABULARY = 200_000
NAMES = 5_000  # first names, and as many last names
WORDS = 28  # of a passage, without its title
PASSAGES_AN_ARTICLE = 4
FAMILIES = 2_000  # pictures come in families of alike ones
SIDE = (96, 64)
SYLLABLES = [a + b for a in "bdfgklmnprstvz" for b in ("a", "e", "i", "o", "u", "ai", "or", "en")]


@functools.cache
def vocabulary() -> list[str]:
    """Words by rank; the most frequent are short, as in a language."""
    rng, made = np.random.default_rng(1), dict.fromkeys(SYLLABLES)
    for count, until in ((2, 5_000), (3, 50_000), (4, VOCABULARY)):
        while len(made) < until:  # of 112 ** count words that there are
            made.setdefault("".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=count)))
    return list(made)


@functools.cache
def _names() -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(2)
    drawn: dict[str, None] = {}
    while len(drawn) < 2 * NAMES:
        drawn.setdefault("".join(SYLLABLES[i] for i in rng.integers(len(SYLLABLES), size=3)) + "x")
    names = [name.capitalize() for name in drawn]
    return names[:NAMES], names[NAMES:]


@functools.cache
def _zipf() -> np.ndarray:
    """Cumulative shares [VOCABULARY] of words by rank: about 1 / rank, as in a language."""
    share = 1 / (np.arange(VOCABULARY) + 2.7) ** 1.07
    return np.cumsum(share / share.sum())


def title(article: int) -> str:
    """An entity of two names; few articles share one."""
    first, last = np.random.default_rng([3, article]).integers(NAMES, size=2)
    return f"{_names()[0][first]} {_names()[1][last]}"


def passage_words(start: int, count: int) -> np.ndarray:
    """Ranks [count, WORDS] of the words of passages from `start` on, `start` a whole block."""
    drawn = np.random.default_rng([4, start]).random((count, WORDS))
    return np.minimum(np.searchsorted(_zipf(), drawn), VOCABULARY - 1)


def write_passages(path: pathlib.Path, count: int, seed: int = 0, block: int = 50_000) -> None:
    """Parquet of `count` passages, and beside it `questions.json`.

    Questions are of two kinds, 500 each where there are enough passages: "entity" has the title of
    an article and three words of one of its passages; "words" has six words as frequent as they
    are in the passages, the hardest for an index.
    """
    import pyarrow as arrow
    from pyarrow import parquet

    rng, words = np.random.default_rng(seed), vocabulary()
    wanted = set(rng.choice(count, size=min(500, count), replace=False).tolist())
    entity = []
    writer = None
    for start in range(0, count, block):
        ranks = passage_words(start, min(block, count - start))
        titles = {
            article: title(article)
            for article in range(
                start // PASSAGES_AN_ARTICLE, (start + len(ranks)) // PASSAGES_AN_ARTICLE + 1
            )
        }
        rows: dict[str, list[str]] = {"id": [], "title": [], "link": [], "text": []}
        for at, row in enumerate(ranks.tolist(), start):
            article = at // PASSAGES_AN_ARTICLE
            rows["id"].append(str(at))
            rows["title"].append(titles[article])
            rows["link"].append(f"article:{article}")
            rows["text"].append(" ".join([words[rank] for rank in row]) + ".")
            if at in wanted:
                said = " ".join(words[rank] for rank in rng.choice(row, 3))
                entity.append((f"{titles[article]} {said}", f"article:{article}"))
        table = arrow.table(rows)
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()
    common = passage_words(10**9, 500)[:, :6].tolist()
    asked = {
        "entity": [question for question, _ in entity],
        "entity_links": [link for _, link in entity],
        "words": [" ".join(words[rank] for rank in row) for row in common],
    }
    (path.parent / "questions.json").write_text(json.dumps(asked))


def picture(number: int, *, seen_again: bool = False) -> bytes:
    """A JPEG of coloured blobs; those of one family differ a little.

    Args:
        seen_again: cropped, rescaled, relit and noisy, as a question would show it.
    """
    family = np.random.default_rng([5, number % FAMILIES]).random((4, 6, 3))
    own = np.random.default_rng([6, number]).random((4, 6, 3))
    pixels = (255 * (0.7 * family + 0.3 * own)).astype(np.uint8)
    image = Image.fromarray(pixels).resize(SIDE, Image.Resampling.BICUBIC)
    if seen_again:
        rng = np.random.default_rng([7, number])
        left, top = rng.integers(0, 6, size=2)
        image = image.crop((left, top, SIDE[0] - 3, SIDE[1] - 2)).resize((150, 110))
        relit = np.asarray(image, np.float32) * rng.uniform(0.7, 1.2)
        relit += rng.normal(0, 6, relit.shape)
        image = Image.fromarray(np.clip(relit, 0, 255).astype(np.uint8))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


def write_pictures(path: pathlib.Path, count: int, block: int = 5_000) -> None:
    """Parquet of `count` pictures."""
    import pyarrow as arrow
    from pyarrow import parquet

    writer = None
    for start in range(0, count, block):
        numbers = range(start, min(count, start + block))
        table = arrow.table({
            "id": [str(number) for number in numbers],
            "title": [f"picture {number}" for number in numbers],
            "image": [picture(number) for number in numbers],
        })  # fmt: skip
        writer = writer or parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    writer.close()
