"""Opens an index folder, and makes tools of it."""

import dataclasses
import pathlib

from mmsr_jax.tools.base import Tool
from mmsr_jax.tools.image_search import LocalImageSearch
from mmsr_jax.tools.index import manifest as manifests
from mmsr_jax.tools.index.embed import Embedder
from mmsr_jax.tools.index.embed_hash import HashEmbedder
from mmsr_jax.tools.index.manifest import Manifest
from mmsr_jax.tools.index.pictures import PictureIndex
from mmsr_jax.tools.index.text import TextIndex
from mmsr_jax.tools.index.text_fts import FtsIndex
from mmsr_jax.tools.index.text_tantivy import TantivyIndex
from mmsr_jax.tools.text_search import LocalTextSearch

TEXT_INDICES = {"fts": FtsIndex, "tantivy": TantivyIndex}


@dataclasses.dataclass(frozen=True)
class FolderConfig:
    """The index that `tools.backend` "index" searches, in the process."""

    folder: str = ""  # made by `mmsr search index`
    weights: str = ""  # of the pictures' model, where they are no longer where the manifest says


@dataclasses.dataclass(frozen=True)
class LocalIndex:
    """An index that is open. Its parts are safe to use from several threads."""

    folder: pathlib.Path
    manifest: Manifest
    text: TextIndex | None  # None: there are no documents in it
    pictures: PictureIndex | None

    def close(self) -> None:
        for part in (self.text, self.pictures):
            if part is not None:
                part.close()

    def __enter__(self) -> "LocalIndex":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def open_index(folder: pathlib.Path | str, embedder: Embedder | None = None) -> LocalIndex:
    """Opens the index that `build` has made.

    Args:
        embedder: the one its pictures were embedded with; None makes the one without weights.

    Raises:
        ValueError: no index, a damaged one, another format, or another embedder.
    """
    folder = pathlib.Path(folder)
    manifest = manifests.read(folder)
    text = pictures = None
    if manifest.text is not None:
        kind = TEXT_INDICES.get(manifest.text.back_end)
        if kind is None:
            raise ValueError(
                f"{folder} has text by {manifest.text.back_end!r}, known: {sorted(TEXT_INDICES)}"
            )
        text = kind(folder)
        if len(text) != manifest.text.passages:
            raise ValueError(
                f"{folder} has {len(text)} passages, its manifest says {manifest.text.passages}"
            )
    if manifest.pictures is not None:
        if embedder is None:
            embedder = HashEmbedder()
        pictures = PictureIndex(folder, manifest.pictures, embedder)
    return LocalIndex(folder, manifest, text, pictures)


def index_tools(
    index: LocalIndex, image_results: int = 3, text_results: int = 3
) -> dict[str, Tool]:
    """The tools that the index has something for, as `Toolbox` takes them."""
    tools: dict[str, Tool] = {}
    if index.pictures is not None:
        tools[LocalImageSearch.name] = LocalImageSearch(index.pictures, image_results)
    if index.text is not None:
        tools[LocalTextSearch.name] = LocalTextSearch(index.text, text_results)
    return tools
