"""Text on disk by SQLite's FTS5: no dependency.

FTS5 scores every passage that holds any word of the query, which a common word makes slow: at a
million passages "the" alone costs seconds. So the index knows how many passages each common word is
in, and a query uses its words from the rarest on, as long as they are expected in no more than
`MAX_CANDIDATES` passages together (the rarest always). What is left out weighs least in BM25, but
not nothing: the best answer stays, those far behind it may be others (docs/performance.md). Where
that matters, or there are millions of passages, take tantivy: it leaves nothing out.
"""

import itertools
import pathlib
import sqlite3
import threading
from collections.abc import Iterable, Sequence

from mmsr_jax.tools.index.sqlite_file import open_to_read
from mmsr_jax.tools.index.text import Scored, best_by_link, words
from mmsr_jax.tools.local import TITLE_WEIGHT, Passage

FILE = "text.sqlite"
MAX_CANDIDATES = 100_000  # passages that one query may score: about 0.05 s of one core
COMMON = 500  # a word in more passages than this is counted in the table `common`
BATCH = 10_000  # passages of one insert


class FtsWriter:
    """Writes `FILE` into a folder."""

    def __init__(self, folder: pathlib.Path):
        self._db = sqlite3.connect(folder / FILE, isolation_level=None)
        # The whole folder is thrown away when building fails: no journal is needed.
        self._db.execute("PRAGMA journal_mode=OFF")
        self._db.execute("PRAGMA synchronous=OFF")
        self._db.execute("PRAGMA cache_size=-65536")
        try:
            self._db.execute(
                "CREATE VIRTUAL TABLE passages USING fts5(title, link UNINDEXED, text, "
                "tokenize='unicode61 remove_diacritics 2')"
            )
        except sqlite3.OperationalError as error:
            raise ValueError(f"this Python's sqlite has no FTS5: {error}") from error
        self._db.execute("BEGIN")

    def add(self, passages: Iterable[Passage]) -> None:
        passages = iter(passages)
        while batch := list(itertools.islice(passages, BATCH)):
            self._db.executemany("INSERT INTO passages VALUES (?, ?, ?)", batch)

    def finish(self) -> None:
        self._db.execute("INSERT INTO passages(passages) VALUES ('optimize')")
        self._db.execute("CREATE VIRTUAL TABLE vocabulary USING fts5vocab('passages', 'row')")
        self._db.execute("CREATE TABLE common (term TEXT PRIMARY KEY, doc INTEGER) WITHOUT ROWID")
        self._db.execute(
            "INSERT INTO common SELECT term, doc FROM vocabulary WHERE doc > ?", (COMMON,)
        )
        self._db.execute("DROP TABLE vocabulary")
        self._db.execute("COMMIT")
        self._db.close()


class FtsIndex:
    """BM25 over title and passage (FTS5's own k1 and b), a title's words counting more.

    Each thread gets a connection of its own, so that threads search at the same time.

    Args:
        max_candidates: None scores every passage that holds any word of the query.
    """

    def __init__(self, folder: pathlib.Path, max_candidates: int | None = MAX_CANDIDATES):
        self._path = (folder / FILE).resolve()
        self._max_candidates = max_candidates
        self._local = threading.local()
        self._lock = threading.Lock()
        self._opened: list[tuple[sqlite3.Connection, threading.Lock]] = []
        try:
            self._rows("SELECT count(*) FROM common")
            ((self._count,),) = self._rows("SELECT count(*) FROM passages_docsize")
        except sqlite3.Error as error:
            raise ValueError(f"{self._path} is no text index: {error}") from error

    def __len__(self) -> int:
        return self._count

    def scored(self, query: str, topk: int) -> Scored:
        terms = self._chosen(words(query))
        if not terms:
            return []
        # No character of the query is an operator: each word is quoted.
        match = " OR ".join(f'"{term}"' for term in terms)
        return best_by_link(lambda limit: self._best(match, limit), topk)

    def search(self, query: str, topk: int) -> list[Passage]:
        return [passage for passage, _ in self.scored(query, topk)]

    def close(self) -> None:
        """Ends searches that are still under way (their callers have gone) and closes the file."""
        with self._lock:
            for db, busy in self._opened:
                db.interrupt()
                with busy:  # closed under a search, Python's sqlite3 takes the process along
                    db.close()
            self._opened.clear()

    def _best(self, match: str, limit: int) -> Scored:
        # The inner query sorts numbers only; texts are read for the few that are left.
        rows = self._rows(
            "SELECT p.title, p.link, p.text, best.score FROM (SELECT rowid AS row, "
            f"bm25(passages, {TITLE_WEIGHT}, 0.0, 1.0) AS score FROM passages "
            "WHERE passages MATCH ? ORDER BY score, row LIMIT ?) AS best "
            "JOIN passages AS p ON p.rowid = best.row ORDER BY best.score, best.row",
            (match, limit),
        )
        return [(Passage(*row[:3]), -row[3]) for row in rows]

    def _chosen(self, terms: list[str]) -> list[str]:
        if self._max_candidates is None or not terms:
            return terms
        marks = ", ".join("?" * len(terms))
        counts = dict(self._rows(f"SELECT term, doc FROM common WHERE term IN ({marks})", terms))
        chosen, candidates = [], 0
        for term in sorted(terms, key=lambda term: counts.get(term, 0)):
            candidates += counts.get(term, COMMON)
            if chosen and candidates > self._max_candidates:
                break
            chosen.append(term)
        return chosen

    def _rows(self, sql: str, values: Sequence = ()) -> list[tuple]:
        db, busy = self._connection()
        with busy:
            return db.execute(sql, values).fetchall()

    def _connection(self) -> tuple[sqlite3.Connection, threading.Lock]:
        """This thread's own, and a lock that it holds while it searches."""
        mine = getattr(self._local, "connection", None)
        if mine is None:
            db = open_to_read(self._path)
            # Not mapped into memory: it is no faster here, and a system that adds up what its
            # threads have mapped would see a multiple of the file.
            db.execute("PRAGMA cache_size=-16384")
            mine = self._local.connection = (db, threading.Lock())
            with self._lock:
                self._opened.append(mine)
        return mine
