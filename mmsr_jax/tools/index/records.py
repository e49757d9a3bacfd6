"""What an index is built from: documents and pictures of a folder, or rows of parquet."""

import base64
import binascii
import collections
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Iterator

from mmsr_jax.tools.index.html_text import title_and_text
from mmsr_jax.tools.local import Passage

TEXTS = {".txt", ".md", ".html", ".htm"}
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"}
MAX_FILE_BYTES = 64_000_000  # one document or picture; larger ones are skipped and counted
MAX_LINE_BYTES = 64_000_000  # one line of .jsonl
MAX_BESIDE_BYTES = 1_000_000  # .json beside a picture
PARQUET_ROWS = 1024  # read at a time
PARQUET_PICTURES = 16  # of rows with pictures


@dataclasses.dataclass(frozen=True)
class Record:
    """A document, a picture, or both."""

    id: str
    title: str
    link: str
    text: str = ""
    image: bytes | None = None  # encoded


class Source:
    """A folder of .txt, .md, .html, .jsonl and pictures, or parquet (one file, or a folder).

    Rows (of .jsonl and of parquet) have `id`, `title`, `link` or `url`, `text`, `image`, all of
    them optional; or Search-R1's `id` and `contents`, whose first line is the title. A picture in
    .jsonl is base64 or a path inside the folder; in parquet bytes or a struct with `bytes`.
    `NAME.json` beside a picture gives its `title` and `link`.

    Links that lead out of the folder are not followed. What cannot be read is left out and counted
    in `skipped` (reason -> count).

    Raises:
        ValueError: no such source, or nothing in it that could be indexed.
    """

    def __init__(self, path: pathlib.Path | str):
        self.path = pathlib.Path(path)
        self.skipped: collections.Counter[str] = collections.Counter()
        if self.path.is_file() and self.path.suffix == ".parquet":
            self.root, found = self.path.parent, [self.path]
        elif self.path.is_dir():
            self.root = self.path
            found = sorted(p for p in self.path.rglob("*") if p.is_file())
        else:
            raise ValueError(f"{path} is neither a folder nor a .parquet file")
        known = TEXTS | PICTURES | {".jsonl", ".parquet"}
        self.files = [p for p in found if p.suffix.lower() in known]
        if not self.files:
            kinds = ", ".join(sorted(known))
            raise ValueError(f"{path} holds no file of a known kind ({kinds})")

    def fingerprint(self) -> str:
        """Of names, sizes and times of change: equal when nothing was touched."""
        digest = hashlib.sha256()
        for file in self.files:
            stat = file.stat()
            entry = (str(file.relative_to(self.root)), stat.st_size, stat.st_mtime_ns)
            digest.update(repr(entry).encode("utf-8", "surrogatepass") + b"\n")
        return digest.hexdigest()

    def size(self) -> int:
        """Bytes of all files: what `read` counts its progress in."""
        return sum(file.stat().st_size for file in self.files)

    def read(self) -> Iterator[tuple[Record | None, int]]:
        """Records, each with the bytes that were read for it; None when there is no record."""
        self.skipped.clear()
        for file in self.files:
            kind = file.suffix.lower()
            if not self._inside(file):
                self.skipped["link that leads out of the folder"] += 1
                yield None, 0
                continue
            try:
                if kind == ".parquet":
                    yield from self._parquet(file)
                elif kind == ".jsonl":
                    yield from self._lines(file)
                else:
                    yield self._file(file, kind), file.stat().st_size
            except OSError as error:
                self.skipped[f"unreadable file ({error.strerror})"] += 1
                yield None, 0

    def _inside(self, file: pathlib.Path) -> bool:
        """A folder of a stranger's must not be able to show the rest of the disk."""
        return file.resolve().is_relative_to(self.root.resolve())

    def _file(self, file: pathlib.Path, kind: str) -> Record | None:
        name = _clean(file.relative_to(self.root).as_posix())
        if file.stat().st_size > MAX_FILE_BYTES:
            self.skipped["file too large"] += 1
            return None
        data = file.read_bytes()
        title = re.sub(r"[_\s]+", " ", _clean(file.stem)).strip()
        if kind in PICTURES:
            beside = self._beside(file.with_suffix(".json"))
            return Record(
                name,
                _text(beside.get("title")) or title,
                _text(beside.get("link") or beside.get("url")) or name,
                image=data,
            )
        text = data.decode("utf-8", "replace")
        if kind in (".html", ".htm"):
            found, text = title_and_text(text)
            title = found or title
        elif kind == ".md" and (heading := re.search(r"^#\s+(.+)$", text, re.M)):
            title = heading[1].strip()
        return Record(name, _clean(title), name, _clean(text))

    def _beside(self, file: pathlib.Path) -> dict:
        if not file.is_file():
            return {}
        found = None
        if self._inside(file) and file.stat().st_size <= MAX_BESIDE_BYTES:
            with contextlib.suppress(ValueError, RecursionError):
                found = json.loads(file.read_bytes())
        if not isinstance(found, dict):
            self.skipped["broken, large or linked .json beside a picture"] += 1
            return {}
        return found

    def _lines(self, file: pathlib.Path) -> Iterator[tuple[Record | None, int]]:
        name = file.relative_to(self.root).as_posix()
        with open(file, "rb") as opened:
            number = 0
            while line := opened.readline(MAX_LINE_BYTES):
                number += 1
                if len(line) == MAX_LINE_BYTES and not line.endswith(b"\n"):
                    self.skipped["line too long"] += 1
                    while (rest := opened.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                        pass
                    yield None, len(line)
                    continue
                yield self._line(line, f"{name}:{number}"), len(line)

    def _line(self, line: bytes, name: str) -> Record | None:
        if not line.strip():
            return None
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            self.skipped["broken line of .jsonl"] += 1
            return None
        image = row.get("image")
        if image is not None:
            image = self._named_picture(image)
        return self._row(row, name, image)

    def _named_picture(self, image: object) -> bytes | None:
        """A picture given as a path in the folder, or as base64."""
        try:
            path = (self.root / str(image)).resolve()
            if self._inside(path) and path.is_file():
                return path.read_bytes() if path.stat().st_size <= MAX_FILE_BYTES else None
        except (OSError, ValueError):  # base64 is too long for a name, or has odd characters
            pass
        try:
            return base64.b64decode(str(image), validate=True)
        except (binascii.Error, ValueError):
            self.skipped["picture neither a file of the folder nor base64"] += 1
            return None

    def _parquet(self, file: pathlib.Path) -> Iterator[tuple[Record | None, int]]:
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ImportError as error:
            raise ValueError("reading parquet needs pyarrow: pip install pyarrow") from error
        columns = {"id", "title", "link", "url", "text", "contents", "image"}
        name = file.relative_to(self.root).as_posix()
        try:
            opened = parquet.ParquetFile(file)
            present = [column for column in opened.schema_arrow.names if column in columns]
            if not {"text", "contents", "image"} & set(present):
                there = ", ".join(opened.schema_arrow.names)
                raise ValueError(f"{file} has columns {there}; text, contents or image needed")
            number, share = 0, file.stat().st_size / max(1, opened.metadata.num_rows)
            rows = PARQUET_PICTURES if "image" in present else PARQUET_ROWS
            for batch in opened.iter_batches(rows, columns=present):
                for row in batch.to_pylist():
                    image = row.get("image")
                    if isinstance(image, dict):
                        image = image.get("bytes")
                    if image is not None and not isinstance(image, bytes):
                        self.skipped["picture that is not bytes"] += 1
                        image = None
                    if image is not None and len(image) > MAX_FILE_BYTES:
                        self.skipped["picture too large"] += 1
                        image = None
                    number += 1
                    done = round(number * share) - round((number - 1) * share)
                    yield self._row(row, f"{name}:{number}", image), done
        except (arrow.ArrowException, OSError) as error:
            self.skipped[f"broken parquet file ({type(error).__name__})"] += 1
            yield None, 0

    def _row(self, row: dict, name: str, image: bytes | None) -> Record | None:
        title, text = _text(row.get("title")), _text(row.get("text"))
        if not text and row.get("contents"):
            first, _, rest = _text(row["contents"]).partition("\n")
            title, text = title or first.strip().strip('"'), rest or first
        if not text and image is None:
            self.skipped["row without text or picture"] += 1
            return None
        key = _text(row.get("id")) or _clean(name)
        return Record(key, title, _text(row.get("link") or row.get("url")) or key, text, image)


def passages(record: Record, words: int) -> Iterator[Passage]:
    """The record's text in pieces of at most `words` words, cut at the ends of sentences.

    A sentence longer than that is cut inside.
    """
    piece: list[str] = []
    for sentence in re.split(r"(?<=[.!?。！？])\s+|\n\s*\n", record.text):
        said = sentence.split()
        for begin in range(0, len(said), words):
            if piece and len(piece) + len(said) - begin > words:
                yield Passage(record.title, record.link, " ".join(piece))
                piece = []
            piece += said[begin : begin + words]
    if piece:
        yield Passage(record.title, record.link, " ".join(piece))


def _text(value: object) -> str:
    return "" if value is None else _clean(str(value))


def _clean(text: str) -> str:
    """Text that UTF-8 can write: halves of surrogate pairs and NUL become question marks."""
    return text.replace("\x00", "?").encode("utf-8", "replace").decode("utf-8")
