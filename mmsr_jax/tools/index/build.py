"""Builds an index folder beside its place, then renames it: it is there whole, or not at all."""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator

from mmsr_jax.tools.index import manifest as manifests
from mmsr_jax.tools.index.embed import Embedder
from mmsr_jax.tools.index.manifest import Manifest, TextPart
from mmsr_jax.tools.index.pictures import PictureWriter
from mmsr_jax.tools.index.records import Source, passages
from mmsr_jax.tools.index.text import TextWriter
from mmsr_jax.tools.index.text_fts import FtsWriter
from mmsr_jax.tools.index.text_tantivy import TantivyWriter

TEXT_WRITERS: dict[str, Callable[[pathlib.Path], TextWriter]] = {
    "fts": FtsWriter,
    "tantivy": TantivyWriter,
}
VECTORS = ("auto", "exact", "usearch")
PASSAGES = 10_000  # handed to the text back end at a time
PICTURES = 256  # decoded and embedded at a time
PICTURE_BYTES = 128_000_000  # encoded, at most waiting
LOCK = "building.lock"

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclasses.dataclass(frozen=True)
class IndexConfig:
    """How a source is indexed."""

    text: str = "fts"  # a key of TEXT_WRITERS
    vectors: str = "auto"  # one of VECTORS; auto: a graph for more than 100,000 pictures
    words: int = 100  # most words of a passage
    thumbnail: int = 224  # pixels of a thumbnail's longer side

    def __post_init__(self):
        if self.text not in TEXT_WRITERS:
            raise ValueError(f"no text back end {self.text!r}, only {', '.join(TEXT_WRITERS)}")
        if self.vectors not in VECTORS:
            raise ValueError(f"no vector back end {self.vectors!r}, only {', '.join(VECTORS)}")
        if self.words < 1 or self.thumbnail < 1:
            raise ValueError(
                f"words {self.words} and thumbnail {self.thumbnail} must be at least 1"
            )


def build(
    source: pathlib.Path | str,
    out: pathlib.Path | str,
    config: IndexConfig,
    embedder: Embedder,
    *,
    replace: bool = False,
    progress: Progress = lambda stage, done, total: None,
) -> tuple[Manifest, bool]:
    """Builds the index of `source` at `out`, unless it is there already.

    An index of the same source (names, sizes, times) built the same way is left as it is. A build
    that was stopped leaves nothing at `out`; what it left beside it goes with the next build.

    Args:
        replace: whether an index of something else at `out` may give way.

    Returns: the manifest, and whether anything was built.

    Raises:
        ValueError: no source, nothing in it, or something else at `out`.
    """
    reading, out = Source(source), pathlib.Path(out)
    fingerprint = _fingerprint(reading, config, embedder)
    manifests.restore(out)
    if out.exists() or out.is_symlink():
        try:
            there = manifests.read(out)
        except ValueError:
            there = None
        if there is not None and there.fingerprint == fingerprint:
            return there, False
        if there is None and not (replace and (out / manifests.FILE).is_file()):
            raise ValueError(f"{out} is there and is no index: choose another name, or remove it")
        if not replace:
            raise ValueError(
                f"{out} is an index of {there.source}, built from other files or in another way: "
                "give another name, or --replace it"
            )
    with _beside(out) as folder:
        made = _write(reading, folder, config, embedder, fingerprint, progress)
        manifests.write(folder, made)
        _settle(folder, out)
    return made, True


def _write(reading, folder, config, embedder, fingerprint, progress) -> Manifest:
    text = TEXT_WRITERS[config.text](folder)
    pictures = PictureWriter(folder, embedder, config.thumbnail, config.vectors)
    total, done, count, broken = reading.size(), 0, 0, 0
    said: list = []  # passages not yet written
    shown: list[tuple[str, str, bytes]] = []
    waiting = told = 0
    for record, size in reading.read():
        done += size
        if record is not None:
            pieces = list(passages(record, config.words))
            said += pieces
            count += len(pieces)
            if record.image is not None:
                shown.append((record.title, record.link, record.image))
                waiting += len(record.image)
        if len(said) >= PASSAGES:
            text.add(said)
            said = []
        if len(shown) >= PICTURES or waiting > PICTURE_BYTES:
            broken += pictures.add(shown)
            shown, waiting = [], 0
        if done - told >= total / 1000:  # a bar drawn for each of a million rows takes a while
            progress("reading", min(done, total), total)
            told = done
    progress("reading", total, total)
    text.add(said)
    broken += pictures.add(shown)
    if broken:
        reading.skipped["broken picture"] += broken
    if not count and not pictures.count:
        raise ValueError(f"{reading.path} has nothing to index; left out: {dict(reading.skipped)}")
    progress("writing the text index", 0, 1)
    text.finish()
    progress("writing the text index", 1, 1)
    linked = 0

    def advance(rows: int) -> None:
        nonlocal linked
        linked += rows
        progress("linking pictures", linked, pictures.count)

    part = pictures.finish(advance)
    return Manifest(
        format=manifests.FORMAT,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        source=str(reading.path),
        fingerprint=fingerprint,
        text=TextPart(config.text, count, config.words) if count else None,
        pictures=part,
        skipped=dict(reading.skipped),
    )


def _fingerprint(reading: Source, config: IndexConfig, embedder: Embedder) -> str:
    how = [dataclasses.asdict(config), embedder.name, embedder.identity, reading.fingerprint()]
    return hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()


@contextlib.contextmanager
def _beside(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder beside `out`, removed at the end if it is still there.

    Folders of builds that were killed are removed too: nobody holds their lock.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out.name}.building-"
    for left in out.parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), open(left / LOCK) as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
    folder.chmod(0o777 & ~_umask())
    try:
        with open(folder / LOCK, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _settle(folder: pathlib.Path, out: pathlib.Path) -> None:
    """Puts a finished folder in its place; an older index goes only when it is there."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    if out.exists():
        manifests.replace(folder, out)
    else:
        os.rename(folder, out)
    (out / LOCK).unlink()  # last: a folder that a kill leaves beside must still have it to go
