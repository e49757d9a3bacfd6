"""A store as parquet, and back: to share one, to look at one, to move between versions."""

import dataclasses
import hashlib
import io
import json
import math
import os
import pathlib
import time
from collections.abc import Iterator
from typing import Any

import pyarrow
import pyarrow.parquet
from PIL import Image

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.decoders import web_formats
from mmsr_jax.tools.pictures import PictureLimits, reencode
from mmsr_jax.tools.store import Record, Store

SCHEMA = pyarrow.schema([
    ("key", pyarrow.string()), ("kind", pyarrow.string()), ("provider", pyarrow.string()),
    ("request", pyarrow.string()), ("response", pyarrow.string()),
    ("seconds", pyarrow.float64()), ("cost", pyarrow.float64()), ("paid", pyarrow.float64()),
    ("created", pyarrow.float64()), ("complete", pyarrow.bool_()),
    ("pictures", pyarrow.map_(pyarrow.string(), pyarrow.binary())),
])  # fmt: skip
AT_ONCE = 256  # records in memory, while they are written
# And while they are read: a stranger's file of 4 KB may repeat 4 MB in every record.
READ_AT_ONCE = 16
FIELDS = ("title", "link", "text", "thumbnail", "picture")  # of a hit, all of them strings


def write(store: Store, path: str | pathlib.Path) -> int:
    """Every record, one a row, with its pictures; returns how many. The file appears when whole."""
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    count, rows = 0, []
    try:
        with pyarrow.parquet.ParquetWriter(temporary, SCHEMA, compression="zstd") as file:
            for record in store.records():
                rows.append(_row(record))
                count += 1
                if len(rows) == AT_ONCE:
                    file.write_table(pyarrow.Table.from_pylist(rows, SCHEMA))
                    rows = []
            file.write_table(pyarrow.Table.from_pylist(rows, SCHEMA))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def read(store: Store, path: str | pathlib.Path) -> tuple[int, int]:
    """Takes the records of a parquet file into the store: (taken, left out).

    Left out are those that the store has as new or newer. The file may be a stranger's: all of it
    is checked before any of it is taken; pictures that are no plain PNG or JPEG are encoded anew
    (plain ones stay as they are, or a replay would read other pixels); nothing counts as paid here,
    nor as younger than now.

    Raises:
      ValueError: another kind of file, or a record that is not what this program writes.
    """
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file: {str(error)[:100]}") from error
    missing = set(SCHEMA.names) - set(file.schema_arrow.names)
    if missing:
        raise ValueError(f"{path} has no column {sorted(missing)[0]!r}: is it an exported store?")
    for record in _records(file, path):  # the first time only to look
        _checked(record, path)
    taken = left = 0
    for record in (_checked(found, path) for found in _records(file, path)):
        there = store.get(record.key, replay=True)
        if there is not None and there.created >= record.created:
            left += 1
        elif store.put(record):
            taken += 1
        else:
            left += 1
    return taken, left


def _records(file: pyarrow.parquet.ParquetFile, path: object) -> Iterator[Record]:
    try:
        for batch in file.iter_batches(batch_size=READ_AT_ONCE, columns=SCHEMA.names):
            batch = batch.cast(SCHEMA)
            for number in range(len(batch)):
                (row,) = batch.slice(number, 1).to_pylist()
                if None in row.values():
                    empty = next(name for name, value in row.items() if value is None)
                    raise ValueError(f"{path}: a record without {empty}")
                yield Record(**row | {"pictures": dict(row["pictures"])})
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path} is damaged, or no export: {str(error)[:100]}") from error


def _checked(record: Record, path: object) -> Record:
    """The record as it may be kept here. ValueError for one that no store has written."""
    name = f"{path}: the record {record.key[:80]}"
    if hashlib.sha256(record.request.encode("utf-8", "replace")).hexdigest() != record.key:
        raise ValueError(f"{path}: the request of {record.key[:80]} has another hash")
    numbers = (record.seconds, record.cost, record.paid, record.created)
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError(f"{name} has seconds, cost, paid, created {numbers}: none may be below 0")
    try:
        asked, said = json.loads(record.request), json.loads(record.response)
        hits = said["hits"]
        good = asked["kind"] == record.kind and asked["provider"] == record.provider
        good = good and isinstance(hits, list) and all(map(_is_hit, hits))
    except (ValueError, LookupError, TypeError, RecursionError):
        good = False
    if not good:
        raise ValueError(f"{name} is no request with a response as this program writes them")
    shown = {hit["picture"] for hit in hits if "picture" in hit}
    if shown != record.pictures.keys():
        raise ValueError(f"{name} shows {len(shown)} pictures and has {len(record.pictures)}")
    pictures, names = {}, {}
    for digest, data in record.pictures.items():
        if hashlib.sha256(data).hexdigest() != digest:
            raise ValueError(f"{name}: a picture of {len(data)} bytes is not {digest[:80]}")
        try:
            clean = data if _is_plain(data) else reencode(data, PictureLimits())
        except ToolError as error:
            raise ValueError(f"{name}: its picture {digest} is refused: {error}") from error
        names[digest] = hashlib.sha256(clean).hexdigest()
        pictures[names[digest]] = clean
    response = record.response
    if any(old != new for old, new in names.items()):
        hits = [
            hit | {"picture": names[hit["picture"]]} if "picture" in hit else hit for hit in hits
        ]
        response = json.dumps({"hits": hits}, ensure_ascii=True)
    return dataclasses.replace(
        record, response=response, pictures=pictures, paid=0.0,
        created=min(record.created, time.time()),
    )  # fmt: skip


def _is_hit(hit: object) -> bool:
    return isinstance(hit, dict) and all(
        name in FIELDS and isinstance(value, str) for name, value in hit.items()
    )


def _is_plain(data: bytes) -> bool:
    """Whether a picture is what `reencode` makes: a PNG or JPEG of bounded size, bare, whole."""
    reencode(data, PictureLimits())  # it decodes, within the limits
    image = Image.open(io.BytesIO(data), formats=web_formats())
    end = {"PNG": b"IEND\xaeB`\x82", "JPEG": b"\xff\xd9"}.get(image.format or "")
    bare = set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    small = max(image.size) <= PictureLimits().max_side
    return end is not None and data.endswith(end) and bare and small


def _row(record: Record) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in SCHEMA.names}
    return values | {"pictures": list(record.pictures.items())}
