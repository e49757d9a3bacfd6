"""FVQA's cached image searches: read without running anything, converted once, then served."""

import asyncio
import hashlib
import io
import os
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, PngImagePlugin

from mmsr_jax.tools import fvqa_cache
from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.recorded import Recorder
from mmsr_jax.tools.store import Store
from mmsr_jax.types import ToolCall

TITLES, PICTURES = "tool_returned_web_title_list", "tool_returned_images_urls"


def encoded(mode: str, format: str, seed: int = 0, **options) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(out, format, **options)
    return out.getvalue()


def opened(*args, **options) -> Image.Image:
    return Image.open(io.BytesIO(encoded(*args, **options)))


def chunk() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("title", "a remark")
    return info


@pytest.fixture
def release(tmp_path):
    """A small release: the pickle as FVQA's is, and the parquet of its questions."""
    cache = {
        "fvqa_train_0": {
            TITLES: ["Nepal", "Flag of Nepal", " ", "Himalaya", "Gone"],
            PICTURES: [opened("RGB", "JPEG"), "https://a/1.png", "https://a/2.png",
                       opened("P", "PNG"), "https://a/gone.png"],
        },
        "fvqa_train_1": {TITLES: ["Only a dead link"], PICTURES: ["https://a/gone.png"]},
        "fvqa_train_9": {TITLES: ["Nobody's"], PICTURES: ["https://a/1.png"]},
    }  # fmt: skip
    (tmp_path / "cache.pkl").write_bytes(pickle.dumps(cache))
    pictures = [encoded("RGB", "PNG", seed) for seed in (1, 2, 3)]
    rows = {
        "data_id": [f"fvqa_train_{n}" for n in range(3)],
        "images": [[{"bytes": p, "path": None}] for p in pictures],
    }
    pq.write_table(pa.table(rows), tmp_path / "train.parquet")
    return tmp_path, pictures


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize(
    ("mode", "format", "options"),
    [("RGB", "JPEG", {}), ("RGB", "PNG", {}), ("L", "PNG", {}), ("P", "PNG", {}), ("1", "PNG", {}),
     ("RGBA", "PNG", {}), ("RGB", "WEBP", {"lossless": True}), ("P", "GIF", {}),
     ("RGB", "PNG", {"pnginfo": chunk()}), ("RGB", "JPEG", {"dpi": (72, 72)})],
)  # fmt: skip
def test_a_pickled_picture_is_the_picture_it_was(protocol, mode, format, options, tmp_path):
    image = opened(mode, format, **options)
    cache = {"fvqa_test_0": {TITLES: ["t"], PICTURES: [image]}}
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(cache, protocol))
    (read,) = fvqa_cache.load(tmp_path / "c.pkl")["fvqa_test_0"][PICTURES]
    again = Image.open(io.BytesIO(read.picture()))
    assert again.format == "PNG"
    np.testing.assert_array_equal(np.asarray(again), np.asarray(image.convert("RGB")))


def test_conversion_and_search(release):
    folder, pictures = release
    store = Store(folder / "s.db")

    async def fetch(url):
        if "gone" in url:
            raise ToolError("bad_response", "404")
        return f"clean {url}".encode()

    async def main():
        cache = fvqa_cache.load(folder / "cache.pkl")
        digests = fvqa_cache.question_digests([folder / "train.parquet"])
        counts = await fvqa_cache.convert(cache, digests, store, fetch)
        assert counts == fvqa_cache.Converted(
            questions=1, results=3, embedded=2, fetched=1, failed=2, empty=1, unknown=1
        )
        tool = fvqa_cache.FvqaImageSearch(Recorder(store, "replay"), results=2)
        items = await tool.run(ToolCall("image_search", "", pictures[0], "?"))
        assert [item.title for item in items] == ["Nepal", "Flag of Nepal"]
        assert items[1].thumbnail == b"clean https://a/1.png"
        for picture in (pictures[1], pictures[2], b"another"):
            for mode in ("replay", "cache", "live"):
                tool = fvqa_cache.FvqaImageSearch(Recorder(store, mode), results=2)
                with pytest.raises(ToolError, match="not_recorded"):
                    await tool.run(ToolCall("image_search", "", picture, "?"))

        await old_and_live()

    async def old_and_live():
        """Nobody can be asked for them again: no mode and no age makes them go."""
        for mode, ttl in (("live", 0.0), ("cache", 1e-9), ("replay", 1e-9)):
            recorder = Recorder(store, mode, ttl)
            tool = fvqa_cache.FvqaImageSearch(recorder, results=2)
            assert len(await tool.run(ToolCall("image_search", "", pictures[0], "?"))) == 2
            assert recorder.counters()["from_store"] == 1

    asyncio.run(main())
    key = fvqa_cache.request(hashlib.sha256(pictures[0]).hexdigest()).key
    assert store.get(key) is not None and store.check() == []


class Evil:
    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


class WithState:
    def __reduce__(self):
        return (bytearray, (b"x",), {"a": 1})


def evil_pickles(flag: str) -> dict[str, bytes]:
    """Pickles that would leave a file behind, call something, or build what is no picture."""
    inside = {"fvqa_train_0": {TITLES: ["t"], PICTURES: [Evil(os.system, f"touch {flag}")]}}
    return {
        "os.system": pickle.dumps(Evil(os.system, f"touch {flag}")),
        "inside": pickle.dumps(inside),
        "eval": pickle.dumps(Evil(eval, f"open({flag!r}, 'w')")),
        "exec": pickle.dumps(Evil(exec, f"open({flag!r}, 'w')")),
        "open": pickle.dumps(Evil(open, flag, "w")),
        "getattr": b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.",
        "dotted": b"\x80\x04\x8c\x09PIL.Image\x8c\x0fImage.tobitmap.x\x93.",
        "PIL.Image.open": b"\x80\x04\x8c\x09PIL.Image\x8c\x04open\x93\x8c\x01x\x85R.",
        "os via PIL": b"\x80\x04\x8c\x09PIL.Image\x8c\x02os\x93.",
        "PIL.ImageMath": b"\x80\x04\x8c\x0dPIL.ImageMath\x8c\x0bunsafe_eval\x93.",
        "numpy": pickle.dumps(np.zeros(3)),
        "persistent": b"\x80\x04\x8c\x01aQ.",
        "bytearray": pickle.dumps(WithState()),
        "unsafe text": b"cos\nsystem\n(S'touch " + flag.encode() + b"'\ntR.",
        "memo": b"\x80\x04}r\x00\x00\x00\x01.",  # 268 MB; with the largest number 34 GB
        "memo in words": b"(dp99999\n.",
        "longer than the file": b"\x80\x04\x96\x00\x00\x00\x00\x08\x00\x00\x00x.",
        "cut": pickle.dumps({"a": 1})[:-3],
        "empty": b"",
        "no dict": pickle.dumps([1, 2]),
        "no lists": pickle.dumps({"fvqa_train_0": {TITLES: "x", PICTURES: []}}),
        "deep": b"\x80\x04" + b"]" * 10 + b"a" * 50 + b".",
    }


@pytest.mark.parametrize("name", evil_pickles("x"))
def test_hostile_pickles_run_nothing(name, tmp_path):
    flag = tmp_path / "was_here"
    (tmp_path / "c.pkl").write_bytes(evil_pickles(str(flag))[name])
    with pytest.raises(ValueError, match="c.pkl"):
        fvqa_cache.load(tmp_path / "c.pkl")
    assert not flag.exists()


@pytest.mark.parametrize(
    "state",
    [None, 5, [], [{}, "RGB", (8, 6), None], [{}, "RGB", (8, 6), None, b"short"],
     [{}, "RGB", (10**6, 10**6), None, b""], [{}, "RGB", (-8, 6), None, b""],
     [{}, "Nonsense", (8, 6), None, b"x"], [{}, 3, (8, 6), None, b"x"],
     [{}, "P", (1, 1), [300] * 9, b"x"]],
)  # fmt: skip
def test_a_broken_picture_costs_its_result_only(state, release):
    folder, pictures = release
    broken = fvqa_cache.Pickled()
    broken.state = state
    cache = {"fvqa_train_0": {TITLES: ["bad", "good"], PICTURES: [broken, "https://a"]}}
    store = Store(folder / "s.db")

    async def fetch(url):
        return b"picture"

    async def main():
        digests = fvqa_cache.question_digests([folder / "train.parquet"])
        return await fvqa_cache.convert(cache, digests, store, fetch)

    counts = asyncio.run(main())
    assert (counts.questions, counts.results, counts.failed) == (1, 1, 1)


def test_a_parquet_of_another_kind_is_named(tmp_path):
    pq.write_table(pa.table({"x": [1]}), tmp_path / "other.parquet")
    with pytest.raises(ValueError, match="has no column data_id"):
        list(fvqa_cache.question_digests([tmp_path / "other.parquet"]))


def test_a_picture_that_is_named_very_often_is_made_once(release, tmp_path):
    """By its memo a pickle of a few bytes could fill the memory with copies."""
    image = opened("RGB", "PNG")
    cache = {"fvqa_train_0": {TITLES: ["t"] * 5000, PICTURES: [image] * 5000}}
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(cache))
    loaded = fvqa_cache.load(tmp_path / "c.pkl")
    first, last = (loaded["fvqa_train_0"][PICTURES][at] for at in (0, -1))
    assert first.picture() is last.picture()
    folder, _ = release
    store = Store(tmp_path / "s.db")
    digests = fvqa_cache.question_digests([folder / "train.parquet"])
    counts = asyncio.run(fvqa_cache.convert(loaded, digests, store, None))
    assert counts.results == fvqa_cache.MAX_RESULTS
    store.close()
