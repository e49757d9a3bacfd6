"""Search engines that live in the process: BM25 over sentences, and nearest pictures."""

import functools
import io
import re
import sqlite3
import threading
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from PIL import Image

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.decoders import decoded_pixels, known_formats

TITLE_WEIGHT = 3.0  # a match in the title counts this much more than one in the passage
MAX_QUERY_CHARS = 1000
MAX_QUERY_TERMS = 32


class Passage(NamedTuple):
    """A piece of an article, the unit of text search."""

    title: str
    link: str  # the article's; passages with one link are one article
    text: str


class LocalTextIndex:
    """Full-text index in memory: sqlite FTS5, BM25 over title and passage (FTS5's own k1, b).

    Safe to use from several threads.
    """

    def __init__(self, passages: Iterable[Passage]):
        self._lock = threading.Lock()
        self._db = sqlite3.connect(":memory:", check_same_thread=False)
        try:
            self._db.execute(
                "CREATE VIRTUAL TABLE passages USING fts5(title, link UNINDEXED, text, "
                "tokenize='unicode61 remove_diacritics 2')"
            )
        except sqlite3.OperationalError as error:
            raise RuntimeError(f"this Python's sqlite has no FTS5: {error}") from error
        self._db.executemany("INSERT INTO passages VALUES (?, ?, ?)", passages)
        (self._count,) = self._db.execute("SELECT count(*) FROM passages").fetchone()
        # The index never changes, and the samples of a group ask the same again and again.
        self._scored = functools.lru_cache(maxsize=4096)(self._scored)

    def __len__(self) -> int:
        """Passages."""
        return self._count

    def search(self, query: str, topk: int) -> list[Passage]:
        """The best passage of each of the `topk` best articles; may be empty, never raises.

        Terms are joined by OR. No character of the query is an operator: each term is quoted.
        """
        return [passage for passage, _ in self._scored(query, topk)]

    def scored(self, query: str, topk: int) -> list[tuple[Passage, float]]:
        """What `search` finds, with BM25 scores; higher is better."""
        return list(self._scored(query, topk))

    def _scored(self, query: str, topk: int) -> tuple[tuple[Passage, float], ...]:
        terms = dict.fromkeys(re.findall(r"\w+", query[:MAX_QUERY_CHARS].casefold()))
        if not terms:
            return ()
        match = " OR ".join(f'"{term}"' for term in list(terms)[:MAX_QUERY_TERMS])
        best: dict[str, tuple[Passage, float]] = {}
        score = f"bm25(passages, {TITLE_WEIGHT}, 0.0, 1.0)"
        with self._lock:
            rows = self._db.execute(
                f"SELECT title, link, text, {score} FROM passages WHERE passages MATCH ? "
                f"ORDER BY {score}, rowid",
                (match,),
            )
            for *fields, value in rows:
                passage = Passage(*fields)
                best.setdefault(passage.link, (passage, -value))
                if len(best) == topk:
                    break
            rows.close()
        return tuple(best.values())


class PictureEntry(NamedTuple):
    """A picture that can be found."""

    title: str
    link: str
    thumbnail: bytes  # encoded picture that is shown in results


MAX_PIXELS = 89_000_000  # decoded, of a picture that is indexed: up to 1 GB while it is read
QUERY_PIXELS = 16_000_000  # of one that is searched with, by many at a time: up to 200 MB

GRID = (12, 8)  # colour grid, columns x rows
HASH = (9, 9)  # grey grid whose neighbours are compared
DEAD_ZONE = 0.25  # differences below this (in standard deviations of grey) count as equal


def load(picture: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decodes a picture to RGB on white.

    A JPEG above `max_pixels` (and below `MAX_PIXELS`) is decoded at 1/2, 1/4 or 1/8 of its sides,
    which takes no more memory than its result; not a progressive one, whose decoder keeps it all.

    Raises:
      ToolError: "failed" when it cannot be decoded, or has more pixels than allowed.
    """
    try:
        image = Image.open(io.BytesIO(picture), formats=known_formats())
        width, height = image.size
        small = image.format == "JPEG" and "progressive" not in image.info
        if small and max_pixels < width * height <= MAX_PIXELS:  # `draft` works once
            scales = [n for n in (2, 4, 8) if -(-width // n) * -(-height // n) <= max_pixels]
            scale = scales[0] if scales else 8
            image.draft("RGB", (width // scale, height // scale))
        if (pixels := decoded_pixels(image)) > max_pixels:
            tiles = "" if pixels == image.width * image.height else f", a tile has {pixels}"
            raise ValueError(f"{width} x {height} pixels, at most {max_pixels}{tiles}")
        if image.mode == "RGB" and "transparency" not in image.info:
            image.load()
            return image.copy()  # plain: no file of its own, no format
        image = image.convert("RGBA")
    except Exception as error:  # decoders of hostile bytes raise anything
        raise ToolError("failed", f"the picture cannot be decoded: {error}") from error
    canvas = Image.new("RGBA", image.size, "white")
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def features(image: Image.Image) -> np.ndarray:
    """Describes an RGB picture, blind to its size, brightness and contrast. -> [n] float32.

    Three parts, each scaled to unit length and weighted: a colour grid (what is where), a colour
    histogram (what there is, wherever), and a difference hash (edges).
    """
    small = np.asarray(image.resize((48, 32), Image.Resampling.BOX), np.float32) / 255
    small = (small - small.mean()) / (small.std() + 1e-3)
    columns, rows = GRID
    grid = small.reshape(rows, 32 // rows, columns, 48 // columns, 3).mean((1, 3)).ravel()

    # 5 bins a channel over +-2 standard deviations, counted softly between neighbours.
    place = np.clip((small.reshape(-1, 3) + 2), 0, 3.999)
    low = place.astype(int)
    share = place - low
    histogram = np.zeros((5, 5, 5), np.float32)
    for corner in np.ndindex(2, 2, 2):
        weight = np.prod(np.where(corner, share, 1 - share), axis=1)
        np.add.at(histogram, tuple((low + corner).T), weight)
    histogram = np.sqrt(histogram).ravel()

    grey = np.asarray(image.convert("L").resize(HASH, Image.Resampling.BOX), np.float32) / 255
    grey = (grey - grey.mean()) / (grey.std() + 1e-3)
    steps = np.concatenate([np.diff(grey, axis=0).ravel(), np.diff(grey, axis=1).ravel()])
    hashed = np.where(np.abs(steps) > DEAD_ZONE, np.sign(steps), 0.0)

    parts = ((grid, 1.0), (histogram, 0.5), (hashed, 0.15))
    return np.concatenate(
        [weight * part / (np.linalg.norm(part) + 1e-6) for part, weight in parts]
    ).astype(np.float32)


class LocalImageIndex:
    """Exact nearest neighbours over `features`."""

    def __init__(self, pictures: Iterable[tuple[bytes, PictureEntry]]):
        vectors, self._entries = [], []
        for picture, entry in pictures:
            vectors.append(features(load(picture)))
            self._entries.append(entry)
        if not vectors:
            raise ValueError("an image index needs at least 1 picture, not 0")
        self._vectors = np.stack(vectors)  # [entries, n]
        self._scored = functools.lru_cache(maxsize=512)(self._scored)  # the index never changes

    def __len__(self) -> int:
        """Pictures."""
        return len(self._entries)

    def search(self, picture: bytes, topk: int) -> list[PictureEntry]:
        """The `topk` most similar entries, best first. ToolError for an undecodable picture."""
        return [entry for entry, _ in self._scored(picture, topk)]

    def scored(self, picture: bytes, topk: int) -> list[tuple[PictureEntry, float]]:
        """What `search` finds, with inner products of the features."""
        return list(self._scored(picture, topk))

    def _scored(self, picture: bytes, topk: int) -> tuple[tuple[PictureEntry, float], ...]:
        scores = self._vectors @ features(load(picture, QUERY_PIXELS))
        best = np.argsort(-scores, kind="stable")[:topk]
        return tuple((self._entries[i], float(scores[i])) for i in best)
