"""`manifest.json`: what an index folder is, how it was built, and from what."""

import dataclasses
import json
import os
import pathlib

import pydantic

FILE = "manifest.json"
FORMAT = 1  # goes up when older programs could no longer read the folder, or newer ones the old


@dataclasses.dataclass(frozen=True)
class TextPart:
    """The text index of a folder."""

    back_end: str  # fts or tantivy
    passages: int
    words: int  # most words of a passage


@dataclasses.dataclass(frozen=True)
class PicturePart:
    """The picture index of a folder."""

    back_end: str  # exact or usearch
    pictures: int
    size: int  # numbers of one vector
    embedder: str  # Embedder.name
    identity: str  # Embedder.identity
    weights: str = ""  # Embedder.source


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The whole of it."""

    format: int
    created: str  # ISO 8601, UTC
    source: str  # folder or file that was indexed
    fingerprint: str  # of that source, and of how it was indexed
    text: TextPart | None  # None: there were no documents
    pictures: PicturePart | None
    skipped: dict[str, int]  # reason -> how many


def write(folder: pathlib.Path, manifest: Manifest) -> None:
    with open(folder / FILE, "w", encoding="utf-8") as opened:
        json.dump(dataclasses.asdict(manifest), opened, indent=2, ensure_ascii=False)
        opened.write("\n")
        opened.flush()
        os.fsync(opened.fileno())


def read(folder: pathlib.Path) -> Manifest:
    """The manifest of an index folder.

    Raises:
        ValueError: no index there, a damaged manifest, or another format.
    """
    path = folder / FILE
    again = "build the index again: mmsr search index SOURCE OUT"
    try:
        raw = path.read_bytes()
    except OSError:
        raise ValueError(f"{folder} is no index: it has no {FILE} ({again})") from None
    try:
        version = json.loads(raw)["format"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}); {again}") from None
    if version != FORMAT:
        raise ValueError(f"{path} is of format {version!r}, this program reads {FORMAT}; {again}")
    try:
        return pydantic.TypeAdapter(Manifest).validate_json(raw, strict=True)
    except pydantic.ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"])) or "the whole"
        reason = error.errors()[0]["msg"]
        raise ValueError(f"{path} is damaged ({where}: {reason}); {again}") from None
