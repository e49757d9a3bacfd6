"""The SQLite files of an index folder, which may be a stranger's: only read, and only tables."""

import pathlib
import sqlite3


def open_to_read(path: pathlib.Path) -> sqlite3.Connection:
    """A connection that may be used from any thread, one at a time.

    Raises:
        sqlite3.Error: no such file, or no database; or one with views, which no index has: reading
            from a view runs the query of whoever wrote it, and that may never end.
    """
    db = sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True, check_same_thread=False)
    try:
        (views,) = db.execute(
            "SELECT count(*) FROM sqlite_master WHERE type NOT IN ('table', 'index')"
        ).fetchone()
        if views:
            raise sqlite3.DatabaseError("it holds views or triggers, an index has none")
    except sqlite3.Error:
        db.close()
        raise
    return db
