"""The SQLite file of a store: its tables, and how it is opened, to write or only to read."""

import contextlib
import pathlib
import sqlite3
import time

APPLICATION = 0x4D4D5352  # "MMSR": tells our files from other databases
VERSION = 1
OPEN_SECONDS = 60.0  # how long opening waits for other processes
BUSY_SECONDS = 5.0  # how long a writer does, later: well below the deadline of a search

SCHEMA = """
CREATE TABLE calls (
    key TEXT PRIMARY KEY,    -- sha256 of the request
    kind TEXT NOT NULL,      -- text_search, image_search; or a stage: links, lens, page, summary
    provider TEXT NOT NULL,
    request TEXT NOT NULL,   -- JSON
    response TEXT NOT NULL,  -- JSON; its pictures by digest
    seconds REAL NOT NULL,   -- that the live call took
    cost REAL NOT NULL,      -- US dollars that asking again would cost
    paid REAL NOT NULL,      -- US dollars that this record was paid with, stages counted once
    created REAL NOT NULL,   -- seconds since 1970
    complete INTEGER NOT NULL, -- 0: a part had failed for the moment; for replays only
    used REAL NOT NULL,
    hits INTEGER NOT NULL,
    size INTEGER NOT NULL    -- bytes of request and response
) WITHOUT ROWID;
CREATE INDEX calls_used ON calls (used);
CREATE TABLE pictures (digest TEXT PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE shown (
    key TEXT NOT NULL, digest TEXT NOT NULL, PRIMARY KEY (key, digest)
) WITHOUT ROWID;
CREATE INDEX shown_digest ON shown (digest);
CREATE TABLE counters (name TEXT PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID;
"""


def connect(path: pathlib.Path, write: bool) -> sqlite3.Connection:
    """Opens a store's file; makes it when it is not there and `write` is set.

    Raises:
      ValueError: no store there, one of another version, or a file that cannot be opened.
    """
    if not write and not path.is_file():
        raise ValueError(f"{path}: there is no store; a run with store.path makes one")
    with contextlib.ExitStack() as failing:
        try:
            if write:
                path.parent.mkdir(parents=True, exist_ok=True)
                db = _connect(str(path))
                failing.callback(db.close)
                _make(db)
            else:
                db = _connect_to_read(path)
                failing.callback(db.close)
            _check_version(db, path)
            db.execute(f"PRAGMA busy_timeout = {BUSY_SECONDS * 1000:.0f}")
        except (sqlite3.OperationalError, OSError) as error:  # no rights, no room, or a lock
            cure = "; store.mode 'replay' needs to read only" if write else ""
            raise ValueError(f"{path} cannot be opened: {error}{cure}") from error
        except sqlite3.DatabaseError as error:
            raise ValueError(f"{path} is no store of search calls: {error}") from error
        failing.pop_all()
        return db


def _connect(name: str) -> sqlite3.Connection:
    uri = name.startswith("file:")
    return sqlite3.connect(
        name, timeout=OPEN_SECONDS, isolation_level=None, check_same_thread=False, uri=uri
    )


def _connect_to_read(path: pathlib.Path) -> sqlite3.Connection:
    name = f"{path.resolve().as_uri()}?mode=ro"
    db = _connect(name)
    try:
        db.execute("PRAGMA user_version").fetchone()
        return db
    except sqlite3.OperationalError:
        db.close()
        # Who reads beside a write-ahead log writes, too, into an index of it: forbidden here.
        # Where there is no log nobody is writing, and the file can be read as it stands.
        waiting = path.with_name(path.name + "-wal")
        if waiting.exists() and waiting.stat().st_size:
            raise
    return _connect(name + "&immutable=1")


def _make(db: sqlite3.Connection) -> None:
    """Switches to a write-ahead log, and makes the tables of a new file."""
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute("PRAGMA auto_vacuum = INCREMENTAL")
    until = time.monotonic() + OPEN_SECONDS
    while True:  # sqlite does not wait here when two processes make the file
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > until:
                raise
            time.sleep(0.01)
    db.execute("BEGIN IMMEDIATE")
    try:
        (made,) = db.execute("PRAGMA application_id").fetchone()
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if made == 0 and tables == 0:
            for statement in SCHEMA.split(";\n"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {APPLICATION}")
            db.execute(f"PRAGMA user_version = {VERSION}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def _check_version(db: sqlite3.Connection, path: pathlib.Path) -> None:
    (made,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if made != APPLICATION:
        raise ValueError(f"{path} is a database, but no store of search calls")
    if version != VERSION:
        raise ValueError(
            f"{path} is a store of version {version}, this program reads {VERSION}: "
            "export it to parquet with the program that wrote it, and import that"
        )
