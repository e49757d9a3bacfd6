"""`manifest.json`: what an index folder is, how it was built, and from what."""

import contextlib
import dataclasses
import fcntl
import glob
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

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


@contextlib.contextmanager
def _held(folder: pathlib.Path) -> Iterator[None]:
    """Waits until no other process holds the folder, and holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def replace(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Puts a finished index in the place of the one at `out`, which goes after that.

    A kill between the two renames leaves the old one as `.NAME.old-*` beside; `restore` knows it.
    """
    old = folder.with_name(f".{out.name}.old-{folder.name.rpartition('-')[2]}")
    with _held(out):
        os.rename(out, old)
        try:
            os.rename(folder, out)
        except OSError:
            os.rename(old, out)
            raise
        shutil.rmtree(old)


def restore(out: pathlib.Path) -> None:
    """Ends what a killed `replace` has begun: an old index comes back where there is no new one,
    and goes where there is. Nothing happens where files may not be changed."""
    for old in out.parent.glob(f".{glob.escape(out.name)}.old-*"):
        # Held by a living `replace`, it will be gone in a moment, and the new one there.
        with contextlib.suppress(OSError), _held(old):
            if out.exists():
                shutil.rmtree(old)
            else:
                os.rename(old, out)


def read(folder: pathlib.Path) -> Manifest:
    """The manifest of an index folder.

    Raises:
        ValueError: no index there, a damaged manifest, or another format.
    """
    restore(folder)
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
