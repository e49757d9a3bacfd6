"""A store as parquet, and back: to share one, to look at one, to move between versions."""

import hashlib
import os
import pathlib
from typing import Any

import pyarrow
import pyarrow.parquet

from mmsr_jax.tools.store import Record, Store

SCHEMA = pyarrow.schema([
    ("key", pyarrow.string()), ("kind", pyarrow.string()), ("provider", pyarrow.string()),
    ("request", pyarrow.string()), ("response", pyarrow.string()),
    ("seconds", pyarrow.float64()), ("cost", pyarrow.float64()), ("paid", pyarrow.float64()),
    ("created", pyarrow.float64()), ("complete", pyarrow.bool_()),
    ("pictures", pyarrow.map_(pyarrow.string(), pyarrow.binary())),
])  # fmt: skip
AT_ONCE = 256  # records in memory


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

    Left out are those that the store has as new or newer.

    Raises:
      ValueError: another kind of file, or a record whose key or picture is not its hash.
    """
    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no parquet file: {str(error)[:100]}") from error
    missing = set(SCHEMA.names) - set(file.schema_arrow.names)
    if missing:
        raise ValueError(f"{path} has no column {sorted(missing)[0]!r}: is it an exported store?")
    taken = left = 0
    for batch in file.iter_batches(batch_size=AT_ONCE, columns=SCHEMA.names):
        for row in batch.to_pylist():
            record = Record(**row | {"pictures": dict(row["pictures"] or ())})
            if hashlib.sha256(record.request.encode()).hexdigest() != record.key:
                raise ValueError(f"{path}: the request of {record.key[:80]} has another hash")
            there = store.get(record.key, replay=True)
            if there is not None and there.created >= record.created:
                left += 1
                continue
            store.put(record)
            taken += 1
    return taken, left


def _row(record: Record) -> dict[str, Any]:
    values = {name: getattr(record, name) for name in SCHEMA.names}
    return values | {"pictures": list(record.pictures.items())}
