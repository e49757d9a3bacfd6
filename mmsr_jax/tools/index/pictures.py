"""Pictures on disk: titles, links and thumbnails in SQLite, vectors in a file beside it."""

import concurrent.futures
import io
import os
import pathlib
import sqlite3
import threading
from collections.abc import Sequence

import numpy as np
from PIL import Image

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.index import vectors_exact, vectors_usearch
from mmsr_jax.tools.index.embed import Embedder
from mmsr_jax.tools.index.manifest import PicturePart
from mmsr_jax.tools.index.sqlite_file import open_to_read
from mmsr_jax.tools.local import MAX_PIXELS, QUERY_PIXELS, PictureEntry, load

FILE = "pictures.sqlite"
LONGEST = 1024  # pixels of the longer side that embedders get: what they look at is smaller
MAX_ASPECT = 100  # longer side by shorter; vision models refuse strips (Qwen's at 200)
DECODERS = 4  # pictures that a build decodes at the same time: each may take 1 GB
MANY = 100_000  # above this "auto" builds a graph


def decoded(picture: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """RGB on white, no longer than `LONGEST`.

    ToolError("failed") when it cannot be decoded, is a strip beyond `MAX_ASPECT`, or has more
    pixels than allowed.
    """
    image = load(picture, max_pixels)
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise ToolError(
            "failed",
            f"the picture has {image.width} x {image.height} pixels, one side more than "
            f"{MAX_ASPECT} times the other",
        )
    if max(image.size) > LONGEST:
        shrink = LONGEST / max(image.size)
        size = [max(1, round(side * shrink)) for side in image.size]
        image = image.resize(size, Image.Resampling.BOX)
    return image


def thumbnail(image: Image.Image, longest: int) -> bytes:
    """A JPEG whose longer side has at most `longest` pixels."""
    small = image.copy()
    small.thumbnail((longest, longest))
    out = io.BytesIO()
    small.save(out, "JPEG", quality=85)
    return out.getvalue()


class PictureWriter:
    """Writes pictures into a folder, batch by batch, and their graph at the end.

    Args:
        longest: pixels of a thumbnail's longer side.
        vectors: exact, usearch, or auto: usearch for more than `MANY`.
    """

    def __init__(self, folder: pathlib.Path, embedder: Embedder, longest: int, vectors: str):
        if vectors == "usearch":
            vectors_usearch.require()
        self._folder, self._embedder = folder, embedder
        self._longest, self._vectors = longest, vectors
        self.count = 0
        self._db = sqlite3.connect(folder / FILE, isolation_level=None)
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute(
            "CREATE TABLE entries (row INTEGER PRIMARY KEY, title TEXT, link TEXT, thumbnail BLOB)"
        )
        self._db.execute("BEGIN")
        self._file = open(folder / vectors_exact.FILE, "wb")  # noqa: SIM115, closed in finish
        self._pool = concurrent.futures.ThreadPoolExecutor(
            min(DECODERS, os.cpu_count() or 1), "decode"
        )

    def add(self, batch: Sequence[tuple[str, str, bytes]]) -> int:
        """Adds (title, link, encoded picture); returns how many of them could not be decoded."""
        seen = list(self._pool.map(self._look, (picture for *_, picture in batch)))
        kept = [
            (title, link, *looked)
            for (title, link, _), looked in zip(batch, seen, strict=True)
            if looked is not None
        ]
        if kept:
            vectors = self._embedder.embed([image for *_, image, _ in kept])
            if vectors.shape != (len(kept), self._embedder.size):
                raise RuntimeError(
                    f"{self._embedder.name} made {vectors.shape} of {len(kept)} pictures, "
                    f"{self._embedder.size} numbers each were promised"
                )
            self._file.write(np.ascontiguousarray(vectors, np.float32).tobytes())
            rows = [
                (self.count + at, title, link, small)
                for at, (title, link, _, small) in enumerate(kept)
            ]
            self._db.executemany("INSERT INTO entries VALUES (?, ?, ?, ?)", rows)
            self.count += len(kept)
            if self._vectors == "auto" and self.count > MANY:
                vectors_usearch.require()  # now, not after hours
        return len(batch) - len(kept)

    def finish(self, advance=lambda rows: None) -> PicturePart | None:
        """Writes the rest; `advance` hears of rows that went into the graph."""
        self._pool.shutdown()
        self._file.close()
        self._db.execute("COMMIT")
        self._db.close()
        if not self.count:
            (self._folder / FILE).unlink()
            (self._folder / vectors_exact.FILE).unlink()
            return None
        back_end, size = self._vectors, self._embedder.size
        if back_end == "auto":
            back_end = "usearch" if self.count > MANY else "exact"
        if back_end == "usearch":
            vectors_usearch.write(self._folder, self.count, size, advance)
        embedder = self._embedder
        return PicturePart(
            back_end, self.count, size, embedder.name, embedder.identity, embedder.source
        )

    def _look(self, picture: bytes) -> tuple[Image.Image, bytes] | None:
        try:
            image = decoded(picture)
            return image, thumbnail(image, self._longest)
        except (ToolError, OSError, ValueError):
            return None


class PictureIndex:
    """Nearest pictures of an index folder. Safe to use from several threads.

    Raises:
        ValueError: files that do not fit the manifest, or another embedder than it was built with.
    """

    def __init__(self, folder: pathlib.Path, part: PicturePart, embedder: Embedder):
        if (embedder.name, embedder.identity) != (part.embedder, part.identity):
            raise ValueError(
                f"{folder} was built with {part.embedder} ({part.identity}), it cannot be searched "
                f"with {embedder.name} ({embedder.identity})"
            )
        kinds = {
            "exact": vectors_exact.ExactVectors,
            "usearch": vectors_usearch.UsearchVectors,
        }
        if part.back_end not in kinds:
            raise ValueError(f"{folder} has pictures by {part.back_end!r}, known: {sorted(kinds)}")
        self.vectors = kinds[part.back_end](folder, part.pictures, part.size)
        self._embedder, self._count = embedder, part.pictures
        self._lock = threading.Lock()
        path = (folder / FILE).resolve()
        try:
            self._db = open_to_read(path)
            (there,) = self._db.execute("SELECT count(*) FROM entries").fetchone()
        except sqlite3.Error as error:
            raise ValueError(f"{path} is no picture index: {error}") from error
        if there != part.pictures:
            raise ValueError(f"{path} has {there} pictures, the manifest says {part.pictures}")

    def __len__(self) -> int:
        return self._count

    def scored(self, picture: bytes, topk: int) -> list[tuple[PictureEntry, float]]:
        """The `topk` most similar entries with their cosines, best first.

        Raises:
            ToolError: "failed", the picture cannot be decoded, or the index is damaged.
        """
        (vector,) = self._embedder.embed([decoded(picture, QUERY_PIXELS)])
        rows, scores = self.vectors.nearest(vector, topk)
        with self._lock:
            entries = [
                self._db.execute(
                    "SELECT title, link, thumbnail FROM entries WHERE row = ?", (int(row),)
                ).fetchone()
                for row in rows
            ]
        for row, entry in zip(rows, entries, strict=True):
            if entry is None:
                raise ToolError("failed", f"the index is damaged: it has no picture {row}")
        entries = [PictureEntry(*entry) for entry in entries]
        return [(entry, float(score)) for entry, score in zip(entries, scores, strict=True)]

    def search(self, picture: bytes, topk: int) -> list[PictureEntry]:
        """`scored` without the scores: what `LocalImageSearch` asks."""
        return [entry for entry, _ in self.scored(picture, topk)]

    def close(self) -> None:
        with self._lock:
            self._db.close()
