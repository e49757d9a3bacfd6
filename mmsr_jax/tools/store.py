"""The store: every call to a search service, kept in one SQLite file.

What is promised. A record is written in one transaction, its pictures with it: after a SIGKILL it
is there whole, or not at all. Several processes may use the file at the same time (write-ahead
log, https://sqlite.org/wal.html). A power cut can cost the last records, never the file
(synchronous = NORMAL). Keys of services are no part of a request, and so never in the file.
"""

import contextlib
import dataclasses
import hashlib
import logging
import pathlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from typing import Literal

from mmsr_jax.tools import store_file

log = logging.getLogger(__name__)

FLUSH_EVERY = 64  # uses that are counted in memory before they are written
EVICT_TO = 0.9  # of max_bytes
MAY_GO = "provider != 'fvqa'"  # that one cannot be asked again: its results are never evicted
COLUMNS = "key, kind, provider, request, response, seconds, cost, paid, created, complete"


@dataclasses.dataclass(frozen=True)
class StoreConfig:
    """Where calls are kept, and when the store is asked instead of the service.

    `live` asks the service and records; `cache` looks first; `replay` asks nobody: what was not
    recorded is the error `not_recorded`.
    """

    path: str = ""  # the SQLite file; empty: nothing is kept
    mode: Literal["live", "cache", "replay"] = "cache"
    ttl: float = 0.0  # seconds after which `cache` asks again; 0: never. `replay` knows no age
    # Of responses and pictures; the least recently used go first, FVQA's results never. A record
    # of more than 0.9 of it is not kept. 0: no limit.
    max_bytes: int = 0

    def __post_init__(self):
        if self.ttl < 0:
            raise ValueError(f"store.ttl must be at least 0 seconds, not {self.ttl}")
        if self.max_bytes < 0:
            raise ValueError(f"store.max_bytes must be at least 0, not {self.max_bytes}")
        if self.mode == "replay" and not self.path:
            raise ValueError("store.mode is 'replay', but store.path names no store")


@dataclasses.dataclass(frozen=True)
class Record:
    """One recorded call. `pictures` holds those that the response names, by sha256."""

    key: str
    kind: str
    provider: str
    request: str  # JSON
    response: str  # JSON
    seconds: float
    cost: float
    paid: float
    created: float
    complete: bool = True  # False: a part had failed for the moment
    pictures: dict[str, bytes] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> int:
        return len(self.request.encode()) + len(self.response.encode())


class Store:
    """One file of recorded calls. Safe from several threads and several processes.

    Args:
      path: created when it is not there, its folder too.
      max_bytes: of requests, responses and pictures; 0 for no limit.
      write: False opens what is there, and only to read; the file may be write-protected.

    Raises:
      ValueError: the file is no store, or one of another version, or cannot be opened.
    """

    def __init__(self, path: str | pathlib.Path, max_bytes: int = 0, write: bool = True):
        self.path = pathlib.Path(path)
        self._max_bytes, self._write = max_bytes, write
        self._lock = threading.RLock()
        self._uses: dict[str, list[float]] = {}  # key -> [last use, uses], not yet written
        self._counts: dict[str, float] = {}  # counters not yet written
        self._db = store_file.connect(self.path, write)
        self._waiting = store_file.BUSY_SECONDS  # what `connect` has set

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction that holds the write lock from its start; all of it, or nothing."""
        with self._lock:
            try:
                self._db.execute("BEGIN IMMEDIATE")
            except sqlite3.OperationalError:
                # Whoever holds the lock so long may hold it much longer, and all calls stand behind
                # this one: until a write works again none waits long.
                self._wait(store_file.BUSY_SECONDS / 100)
                raise
            self._wait(store_file.BUSY_SECONDS)
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:  # after a full disk sqlite has rolled back itself
                    self._db.execute("ROLLBACK")
                raise

    def _wait(self, seconds: float) -> None:
        """How long a writer waits for another process's lock from now on."""
        if seconds != self._waiting:
            self._db.execute(f"PRAGMA busy_timeout = {seconds * 1000:.0f}")
            self._waiting = seconds

    def get(self, key: str, max_age: float = 0.0, replay: bool = False) -> Record | None:
        """The record of a request; None when there is none.

        Args:
          max_age: seconds from which on a record counts as absent; 0 for any age.
          replay: incomplete records too, and nothing is counted: the file stays as it is.
        """
        now = time.time()
        with self._lock:
            # A connection's reads inside one transaction see one state of the file.
            self._db.execute("BEGIN")
            try:
                row = self._db.execute(
                    f"SELECT {COLUMNS} FROM calls WHERE key = ?", (key,)
                ).fetchone()
                pictures = self._pictures(key) if row else {}
            finally:
                self._db.execute("COMMIT")
            record = Record(*row[:-1], bool(row[-1]), pictures) if row else None
            if record is not None and not replay:
                old = max_age and now - record.created > max_age
                record = None if old or not record.complete else record
            if not replay and self._write:
                if record is None:
                    self._counts["misses"] = self._counts.get("misses", 0) + 1
                else:
                    self._counts["hits"] = self._counts.get("hits", 0) + 1
                    use = self._uses.setdefault(key, [now, 0])
                    use[0], use[1] = now, use[1] + 1
                if len(self._uses) + self._counts.get("misses", 0) >= FLUSH_EVERY:
                    try:
                        self.flush()
                    except sqlite3.Error as error:  # the record is there: a count can wait
                        log.warning("%s: uses are not written down: %s", self.path, error)
        return record

    def _pictures(self, key: str) -> dict[str, bytes]:
        return dict(
            self._db.execute(
                "SELECT pictures.digest, data FROM shown JOIN pictures USING (digest) "
                "WHERE key = ?",
                (key,),
            )
        )

    def put(self, record: Record) -> bool:
        """Writes a record, in the place of an older one; the least recently used make room.

        An incomplete record never takes the place of a complete one.

        Returns:
          Whether it was written: no record is that would fill the store alone.

        Raises:
          ValueError: a picture whose name is not its sha256.
        """
        size = record.size + sum(map(len, record.pictures.values()))
        if self._max_bytes and size > self._max_bytes * EVICT_TO:
            log.warning(
                "%s: a record of %d bytes is not kept, the store's max_bytes is %d",
                self.path, size, self._max_bytes,
            )  # fmt: skip
            return False
        for digest, data in record.pictures.items():
            if hashlib.sha256(data).hexdigest() != digest:
                raise ValueError(f"a picture of {len(data)} bytes is not {digest}")
        with self._writing():
            whole = "SELECT complete FROM calls WHERE key = ?"
            if not record.complete and self._db.execute(whole, (record.key,)).fetchone() == (1,):
                return False
            self._remove(record.key)
            grown = record.size
            for digest, data in record.pictures.items():
                grown += (
                    len(data)
                    * self._db.execute(
                        "INSERT OR IGNORE INTO pictures VALUES (?, ?)", (digest, data)
                    ).rowcount
                )
            self._db.executemany(
                "INSERT INTO shown VALUES (?, ?)", [(record.key, d) for d in record.pictures]
            )
            self._db.execute(
                f"INSERT INTO calls ({COLUMNS}, used, hits, size) VALUES ({'?, ' * 12}?)",
                (record.key, record.kind, record.provider, record.request, record.response,
                 record.seconds, record.cost, record.paid, record.created, record.complete,
                 time.time(), 0, record.size),
            )  # fmt: skip
            self._add("bytes", grown)
            self._add("paid", record.paid)
            self._write_uses()
            if self._max_bytes:
                self._evict(record.key)
        return True

    def _add(self, name: str, value: float) -> None:
        if value:
            self._db.execute(
                "INSERT INTO counters VALUES (?, ?) "
                "ON CONFLICT (name) DO UPDATE SET value = value + excluded.value",
                (name, value),
            )

    def _remove(self, key: str) -> None:
        """Takes a record away, and the pictures that no other record shows."""
        row = self._db.execute("SELECT size FROM calls WHERE key = ?", (key,)).fetchone()
        if row is None:
            return
        freed = row[0]
        digests = [d for (d,) in self._db.execute("SELECT digest FROM shown WHERE key=?", (key,))]
        self._db.execute("DELETE FROM shown WHERE key = ?", (key,))
        self._db.execute("DELETE FROM calls WHERE key = ?", (key,))
        for digest in digests:
            alone = self._db.execute(
                "SELECT length(data) FROM pictures WHERE digest = ? "
                "AND NOT EXISTS (SELECT 1 FROM shown WHERE digest = ?)",
                (digest, digest),
            ).fetchone()
            if alone is not None:
                self._db.execute("DELETE FROM pictures WHERE digest = ?", (digest,))
                freed += alone[0]
        self._add("bytes", -freed)

    def _evict(self, new: str) -> None:
        """Makes room; what has just been written (`new`) stays."""
        if self._counter("bytes") <= self._max_bytes:
            return
        evicted = 0
        while self._counter("bytes") > self._max_bytes * EVICT_TO:
            oldest = self._db.execute(
                f"SELECT key FROM calls WHERE key != ? AND {MAY_GO} ORDER BY used LIMIT 32", (new,)
            ).fetchall()
            if not oldest:
                break
            for (key,) in oldest:
                if self._counter("bytes") <= self._max_bytes * EVICT_TO:
                    break
                self._remove(key)
                evicted += 1
        self._add("evicted", evicted)

    def _counter(self, name: str) -> float:
        row = self._db.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
        return row[0] if row else 0.0

    def _write_uses(self) -> None:
        self._db.executemany(
            "UPDATE calls SET used = max(used, ?), hits = hits + ? WHERE key = ?",
            [(used, hits, key) for key, (used, hits) in self._uses.items()],
        )
        for name, value in self._counts.items():
            self._add(name, value)
        self._uses.clear()
        self._counts.clear()

    def flush(self) -> None:
        """Writes down the uses counted so far."""
        with self._lock:
            if self._uses or self._counts:
                with self._writing():
                    self._write_uses()

    def records(self) -> Iterator[Record]:
        """All records, in the order of their keys; others may write meanwhile."""
        last = ""
        while True:
            with self._lock:
                rows = self._db.execute(
                    f"SELECT {COLUMNS} FROM calls WHERE key > ? ORDER BY key LIMIT 64", (last,)
                ).fetchall()
                found = [Record(*r[:-1], bool(r[-1]), self._pictures(r[0])) for r in rows]
            if not found:
                return
            yield from found
            last = found[-1].key

    def summary(self) -> dict:
        """Counts, money and size: `kinds` by (kind, provider), and the totals."""
        self.flush()
        with self._lock:
            kinds = [
                dict(zip(("kind", "provider", "records", "hits", "paid", "saved", "bytes"),
                         row, strict=True))
                for row in self._db.execute(
                    "SELECT kind, provider, count(*), sum(hits), sum(paid), sum(cost * hits), "
                    "sum(size) FROM calls GROUP BY kind, provider ORDER BY kind, provider"
                )
            ]  # fmt: skip
            pictures, held = self._db.execute(
                "SELECT count(*), coalesce(sum(length(data)), 0) FROM pictures"
            ).fetchone()
            names = ("hits", "misses", "paid", "evicted", "bytes")
            counted = {name: self._counter(name) for name in names}
        files = [self.path, *(self.path.with_name(self.path.name + s) for s in ("-wal", "-shm"))]
        return {
            "kinds": kinds,
            "records": sum(kind["records"] for kind in kinds),
            "pictures": pictures,
            "picture_bytes": held,
            "file_bytes": sum(file.stat().st_size for file in files if file.exists()),
            "hits": int(counted["hits"]),
            "misses": int(counted["misses"]),
            "evicted": int(counted["evicted"]),
            "bytes": int(counted["bytes"]),
            "paid": counted["paid"],
        }

    def check(self) -> list[str]:
        """What is wrong with the file, in words; an empty list when nothing is."""
        with self._lock:
            wrong = [r for (r,) in self._db.execute("PRAGMA integrity_check") if r != "ok"]
            for digest, data in self._db.execute("SELECT digest, data FROM pictures"):
                if hashlib.sha256(data).hexdigest() != digest:
                    wrong.append(f"picture {digest} has other content")
            for sql, words in (
                ("SELECT digest FROM shown EXCEPT SELECT digest FROM pictures", "is missing"),
                ("SELECT digest FROM pictures EXCEPT SELECT digest FROM shown", "is nobody's"),
                ("SELECT key FROM shown EXCEPT SELECT key FROM calls", "shows pictures, is none"),
            ):
                wrong += [f"{name} {words}" for (name,) in self._db.execute(sql)]
            (held,) = self._db.execute(
                "SELECT coalesce((SELECT sum(size) FROM calls), 0) "
                "+ coalesce((SELECT sum(length(data)) FROM pictures), 0)"
            ).fetchone()
            if held != self._counter("bytes"):
                wrong.append(f"{held} bytes are there, {self._counter('bytes'):.0f} are counted")
        return wrong

    def close(self) -> None:
        """Writes what is counted and closes the file. May be called twice."""
        with self._lock:
            if self._db is None:
                return
            try:
                self.flush()
                if self._write:  # `execute` steps once, and so frees one page; a script runs on
                    self._db.executescript("PRAGMA incremental_vacuum")
            except sqlite3.Error as error:
                log.warning("%s: closed without its last counts: %s", self.path, error)
            self._db.close()
            self._db = None
