"""A store of a stranger's: all of it is checked before any of it is taken."""

import dataclasses
import hashlib
import io
import json
import time
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image, PngImagePlugin

from mmsr_jax.tools import store_parquet
from mmsr_jax.tools.hits import Found, Hit
from mmsr_jax.tools.pictures import reencode
from mmsr_jax.tools.recorded import Request, read, write
from mmsr_jax.tools.store import Record, Store


def picture(format="PNG", **more) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (30, 40, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, format, **more)
    return out.getvalue()


def record(query: str, shown: bytes | None = None, **more) -> Record:
    asked = Request("links", "serper", {"query": query})
    response, pictures = write(Found((Hit("t", "l", "x", picture=shown),)))
    made = Record(asked.key, "links", "serper", asked.text, response, 1.0, 0.5, 0.25, 100.0,
                  pictures=pictures)  # fmt: skip
    return dataclasses.replace(made, **more)


def parquet(path, *records):
    rows = [store_parquet._row(given) for given in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, store_parquet.SCHEMA), path)
    return path


@pytest.fixture
def store(tmp_path):
    made = Store(tmp_path / "s.db")
    yield made
    made.close()


def test_there_and_back_pixels_stay_and_money_is_the_spenders(store, tmp_path):
    plain = [reencode(picture("PNG")), reencode(picture("JPEG")), None]
    given = [record(str(n), shown) for n, shown in enumerate(plain)]
    assert store_parquet.read(store, parquet(tmp_path / "p", *given)) == (3, 0)
    for one in given:
        assert store.get(one.key) == dataclasses.replace(one, paid=0.0)
    assert store.summary()["paid"] == 0
    assert store_parquet.write(store, tmp_path / "again") == 3
    assert store_parquet.read(store, tmp_path / "again") == (0, 3)


def test_nothing_comes_from_the_future(store, tmp_path):
    late = record("a", created=time.time() + 1e6)
    store_parquet.read(store, parquet(tmp_path / "p", late))
    assert store.get(late.key).created <= time.time()


def remark() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("who", "took it")
    return info


@pytest.mark.parametrize(
    "given",
    [picture("GIF"), picture("WEBP"), picture("TIFF"), picture("PNG", pnginfo=remark()),
     picture("PNG") + b"and more", picture("JPEG", comment=b"took it"),
     picture("JPEG") + b"<script>"],
)  # fmt: skip
def test_odd_pictures_are_encoded_anew(given, store, tmp_path):
    odd = record("a", given)
    assert store_parquet.read(store, parquet(tmp_path / "p", odd)) == (1, 0)
    (hit,) = read(store.get(odd.key)).hits
    assert hit.picture == reencode(given) and hit.title == "t" and store.check() == []


def altered(**more):
    return lambda: record("bad", picture(), **more)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (altered(request='{"kind":"links"}'), "has another hash"),
        (altered(response="[]"), "no request with a response"),
        (altered(response='{"hits": [{"title": 1}]}'), "no request with a response"),
        (altered(response='{"hits": [{"colour": "red"}]}'), "no request with a response"),
        (altered(response="[" * 100_000), "no request with a response"),
        (altered(response='{"hits": []}'), "shows 0 pictures and has 1"),
        (altered(kind="page"), "no request with a response"),
        (altered(provider="fvqa"), "no request with a response"),
        (altered(cost=-1.0), "none may be below 0"),
        (altered(created=float("nan")), "none may be below 0"),
        (altered(pictures={"0" * 64: b"x"}, response=json.dumps({"hits": [{"picture": "0" * 64}]})),
         "a picture of 1 bytes is not 0000"),
        (lambda: record("bad", b"%!PS-Adobe-3.0"), "is refused: bad_picture"),
        (lambda: record("bad", picture()[:-40]), "is refused: bad_picture"),
    ],
)  # fmt: skip
def test_one_bad_record_and_none_is_taken(bad, said, store, tmp_path):
    path = parquet(tmp_path / "p", record("good"), bad())
    with pytest.raises(ValueError, match=said):
        store_parquet.read(store, path)
    assert store.summary()["records"] == 0


def test_other_types_and_empty_cells_are_named(store, tmp_path):
    table = pyarrow.Table.from_pylist([store_parquet._row(record("a"))], store_parquet.SCHEMA)
    names = table.column_names
    wrong = table.set_column(names.index("cost"), "cost", pyarrow.array(["much"]))
    pyarrow.parquet.write_table(wrong, tmp_path / "wrong")
    with pytest.raises(ValueError, match="is damaged, or no export"):
        store_parquet.read(store, tmp_path / "wrong")
    empty = table.set_column(
        names.index("response"), "response", pyarrow.array([None], pyarrow.string())
    )
    pyarrow.parquet.write_table(empty, tmp_path / "empty")
    with pytest.raises(ValueError, match="a record without response"):
        store_parquet.read(store, tmp_path / "empty")
    assert store.summary()["records"] == 0


def test_a_record_that_is_repeated_is_not_held_as_often(store, tmp_path):
    """A few kilobytes of parquet may hold 4 MB in each of very many records."""
    asked = json.dumps({"kind": "links", "provider": "x"})
    said = json.dumps({"hits": [{"text": "x" * (1 << 20)}]})
    key = hashlib.sha256(asked.encode()).hexdigest()
    row = {"key": key, "kind": "links", "provider": "x", "request": asked, "response": said}
    row |= {"seconds": 0.0, "cost": 0.0, "paid": 0.0, "created": 0.0, "complete": True}
    table = pyarrow.Table.from_pylist([row | {"pictures": []}] * 64, store_parquet.SCHEMA)
    pyarrow.parquet.write_table(table, tmp_path / "bomb.parquet", compression="zstd")
    assert (tmp_path / "bomb.parquet").stat().st_size < 100_000
    tracemalloc.start()
    try:
        assert store_parquet.read(store, tmp_path / "bomb.parquet") == (1, 63)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
