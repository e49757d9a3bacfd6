"""The image-search results that come with FVQA: from their pickle into the store, once.

The release (huggingface.co/datasets/lmms-lab/FVQA) has them in `fvqa_train_image_search_
results_cache.pkl` and `fvqa_test_...`: a dict by `data_id`, each value a dict with
`tool_returned_web_title_list` and `tool_returned_images_urls`, whose entries are thumbnail URLs or
pickled Pillow pictures. A pickle can run anything, so this one is read by an unpickler that knows
Pillow's pictures and nothing else. Tools see a question's picture, never its `data_id`: the store
knows the results by the picture's sha256.
"""

import asyncio
import dataclasses
import hashlib
import io
import pathlib
import pickle
import pickletools
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from PIL import Image

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.hits import Found, Hit
from mmsr_jax.tools.recorded import Recorder, Request, write
from mmsr_jax.tools.store import Record, Store
from mmsr_jax.types import ResultItem, ToolCall

PROVIDER = "fvqa"
KIND = "image_search"
TITLES, PICTURES = "tool_returned_web_title_list", "tool_returned_images_urls"
MAX_BYTES = 1 << 30  # of a pickle; the release's have 11 and 4 MB
MAX_PIXELS = 16_000_000  # of a pickled thumbnail
MAX_RESULTS = 100  # of a question
AT_ONCE = 32  # thumbnails that are fetched at the same time

# Pillow pickles a picture as its class, made empty, and a state (see Image.__setstate__).
ALLOWED = frozenset({
    ("PIL.Image", "Image"),
    ("PIL.JpegImagePlugin", "JpegImageFile"),
    ("PIL.PngImagePlugin", "PngImageFile"),
    ("PIL.WebPImagePlugin", "WebPImageFile"),
    ("PIL.GifImagePlugin", "GifImageFile"),
    ("PIL.MpoImagePlugin", "MpoImageFile"),
})  # fmt: skip


class Pickled:
    """Stands in for every picture class: holds the state, runs no Pillow code while unpickling."""

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def picture(self) -> bytes:
        """PNG. ValueError when the state is not that of a picture."""
        # Kept: a pickle may name one picture very many times, and each would be held for itself.
        if not hasattr(self, "_png"):
            self._png = self._encoded()
        return self._png

    def _encoded(self) -> bytes:
        state = self.state if isinstance(getattr(self, "state", None), (list, tuple)) else ()
        if len(state) < 5:
            raise ValueError("a pickled picture without its state")
        _, mode, size, palette, data = state[:5]  # info, mode, size, palette, pixels; then lines
        if (
            not isinstance(mode, str)
            or not isinstance(size, tuple)
            or len(size) != 2
            or not all(isinstance(n, int) and n > 0 for n in size)
            or size[0] * size[1] > MAX_PIXELS
            or not isinstance(data, bytes)
        ):
            raise ValueError(f"a pickled picture of mode {mode!r} and size {size!r}"[:200])
        image = Image.frombytes(mode, size, data)
        if mode in ("P", "L", "LA", "PA") and palette:
            image.putpalette(bytes(palette) if not isinstance(palette, list) else palette)
        out = io.BytesIO()
        image.convert("RGB").save(out, "PNG")
        return out.getvalue()


class _Remark:
    """Stands in for what formats note beside a picture (text chunks, resolutions): unread."""

    def __new__(cls, *_: object) -> "_Remark":
        return super().__new__(cls)

    def __init__(self, *_: object):
        pass

    def __setstate__(self, _: object) -> None:
        pass


REMARKS = frozenset({
    ("PIL.PngImagePlugin", "iTXt"),
    ("PIL.TiffImagePlugin", "IFDRational"),
})  # fmt: skip


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type:
        if (module, name) in ALLOWED:
            return Pickled
        if (module, name) in REMARKS:
            return _Remark
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a cache of pictures")

    def persistent_load(self, pid: object) -> object:
        raise pickle.UnpicklingError("references to the outside have no place in it")


def _check_memo(data: bytes) -> None:
    """Raises UnpicklingError for a place in the memo that no pickler would use.

    The memo is as long as its largest number: five bytes of a stranger's could make it 34 GB. What
    is longer than the file is found on the way.
    """
    for count, (code, number, _) in enumerate(pickletools.genops(data)):
        if code.name.endswith("PUT") and number > count:
            raise pickle.UnpicklingError(f"{count} steps do not fill a memo of {number}")


def load(path: str | pathlib.Path) -> dict[str, dict[str, list]]:
    """The cache: `data_id` -> {titles, pictures (URL or `Pickled`)}.

    Raises:
      ValueError: too large, no pickle, one with other types in it, or of another form.
    """
    path = pathlib.Path(path)
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, at most {MAX_BYTES}")
    try:
        data = path.read_bytes()
        _check_memo(data)
        cache = _Unpickler(io.BytesIO(data)).load()
    except Exception as error:  # a hostile pickle raises anything
        raise ValueError(f"{path} is no cache of image searches: {error}") from error
    if not isinstance(cache, dict):
        raise ValueError(f"{path} holds a {type(cache).__name__}, not a dict by data_id")
    for name, value in cache.items():
        good = isinstance(name, str) and isinstance(value, dict)
        if not good or not all(isinstance(value.get(k), (list, tuple)) for k in (TITLES, PICTURES)):
            raise ValueError(f"{path}: entry {str(name)[:80]!r} has no lists {TITLES}, {PICTURES}")
    return cache


@dataclasses.dataclass
class Converted:
    """What became of a cache."""

    questions: int = 0  # recorded
    results: int = 0  # with title and thumbnail
    embedded: int = 0  # thumbnails that were in the pickle
    fetched: int = 0  # thumbnails that were fetched
    failed: int = 0  # thumbnails that cannot be had: their results are left out
    empty: int = 0  # questions of which no result is left: not recorded
    unknown: int = 0  # entries whose data_id no question has


def request(digest: str) -> Request:
    return Request(KIND, PROVIDER, {"image": digest})


async def convert(
    cache: Mapping[str, Mapping[str, list]],
    digests: Iterable[tuple[str, str]],
    store: Store,
    fetch: Callable[[str], Awaitable[bytes]] | None,
) -> Converted:
    """Writes the results of every known question into the store.

    Args:
      digests: (data_id, sha256 of the question's picture), as `question_digests` reads them.
      fetch: gets a thumbnail's URL, returns a clean picture or raises ToolError. None: results
        with a URL only are left out, and counted as failed.
    """
    counts = Converted()
    room = asyncio.Semaphore(AT_ONCE)
    known = dict(digests)
    counts.unknown = len(cache.keys() - known.keys())

    async def picture(entry: object) -> bytes | None:
        if isinstance(entry, Pickled):
            try:
                data = await asyncio.to_thread(entry.picture)
            except Exception:  # whatever Pillow says of wrong bytes
                return None
            counts.embedded += 1
            return data
        if not isinstance(entry, str) or fetch is None:
            return None
        async with room:
            try:
                data = await fetch(entry)
            except ToolError:
                return None
        counts.fetched += 1
        return data

    async def question(name: str, digest: str) -> None:
        entry = cache[name]
        pairs = [
            (title.strip(), shown)
            for title, shown in zip(entry[TITLES], entry[PICTURES], strict=False)
            if isinstance(title, str) and title.strip()
        ][:MAX_RESULTS]
        pictures = await asyncio.gather(*(picture(shown) for _, shown in pairs))
        hits = tuple(
            Hit(title, shown if isinstance(shown, str) else "", picture=data)
            for (title, shown), data in zip(pairs, pictures, strict=True)
            if data is not None
        )
        counts.failed += len(pairs) - len(hits)
        if not hits:
            counts.empty += 1
            return
        asked = request(digest)
        response, shown = write(Found(hits, provider=PROVIDER))
        store.put(
            Record(asked.key, KIND, PROVIDER, asked.text, response, 0.0, 0.0, 0.0, time.time(),
                   True, shown)
        )  # fmt: skip
        counts.questions += 1
        counts.results += len(hits)

    names = [name for name in cache if name in known]
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        await asyncio.gather(*(question(name, known[name]) for name in some))
    return counts


def question_digests(paths: Iterable[str | pathlib.Path]) -> Iterable[tuple[str, str]]:
    """(data_id, sha256 of the picture) of every row of the release's parquet files.

    Raises:
      ValueError: a file without the columns `data_id` and `images`.
    """
    import pyarrow.parquet

    for path in paths:
        file = pyarrow.parquet.ParquetFile(path)
        missing = {"data_id", "images"} - set(file.schema_arrow.names)
        if missing:
            raise ValueError(f"{path} has no column {sorted(missing)[0]}: is it FVQA's parquet?")
        for batch in file.iter_batches(batch_size=64, columns=["data_id", "images"]):
            for row in batch.to_pylist():
                if row["images"]:
                    yield row["data_id"], hashlib.sha256(row["images"][0]["bytes"]).hexdigest()


class FvqaImageSearch:
    """Image search as the release answers it: only pictures of FVQA's own questions are known."""

    name = KIND
    provider = PROVIDER

    def __init__(self, recorder: Recorder, results: int):
        self._recorder, self._results = recorder, results

    async def find(self, call: ToolCall) -> Found:
        """ToolError "not_recorded" for a picture without a recorded search.

        The store's mode and the age of a result say nothing here: it is all there is.
        """
        found = await self._recorder.recall(request(hashlib.sha256(call.image).hexdigest()))
        return dataclasses.replace(found, hits=found.hits[: self._results])

    async def run(self, call: ToolCall) -> tuple[ResultItem, ...]:
        return tuple(hit.item() for hit in (await self.find(call)).hits)
