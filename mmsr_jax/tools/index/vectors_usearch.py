"""Nearest vectors by usearch's graph (HNSW; extra `index`): for more than 100,000 of them."""

import pathlib

import numpy as np

from mmsr_jax.tools.base import ToolError
from mmsr_jax.tools.index import vectors_exact

FILE = "vectors.usearch"
CONNECTIVITY = 32  # links of a node; usearch's own default is 16
EXPANSION_ADD = 128
EXPANSION_SEARCH = 256  # nodes kept in view while searching: more finds more and takes longer
ROWS = 8192  # added at a time


def _usearch():
    try:
        from usearch import index
    except ImportError as error:
        raise ValueError(
            'a graph over vectors needs the extra "index": pip install "mmsr-jax[index]" '
            "(or --vectors exact)"
        ) from error
    return index


def require() -> None:
    """Raises ValueError where usearch is not installed."""
    _usearch()


def write(folder: pathlib.Path, count: int, size: int, advance=lambda rows: None) -> None:
    """Builds the graph over the vectors that lie in the folder already.

    Args:
        advance: called with the rows done since the last call.
    """
    made = _usearch().Index(
        ndim=size,
        metric="ip",
        dtype="f16",
        connectivity=CONNECTIVITY,
        expansion_add=EXPANSION_ADD,
        enable_key_lookups=False,
    )
    vectors = np.memmap(folder / vectors_exact.FILE, np.float32, "r", shape=(count, size))
    for at in range(0, count, ROWS):
        rows = vectors[at : at + ROWS]
        made.add(np.arange(at, at + len(rows)), np.ascontiguousarray(rows))
        advance(len(rows))
    made.save(str(folder / FILE))


class UsearchVectors:
    """Neighbours from the graph, then ranked by their exact inner products.

    Raises:
        ValueError: no graph in the folder, or one of another shape.
    """

    def __init__(self, folder: pathlib.Path, count: int, size: int):
        usearch, path = _usearch(), folder / FILE
        try:
            self._graph = usearch.Index.restore(str(path), view=True)
        except Exception as error:  # usearch raises RuntimeError and others
            raise ValueError(f"{path} is no graph: {error}") from error
        if self._graph is None or (len(self._graph), self._graph.ndim) != (count, size):
            found = "nothing" if self._graph is None else f"{len(self._graph)}, {self._graph.ndim}"
            raise ValueError(f"{path} holds {found}, the manifest {count} vectors of {size}")
        self._graph.expansion_search = EXPANSION_SEARCH
        self._vectors = np.memmap(folder / vectors_exact.FILE, np.float32, "r", shape=(count, size))

    def nearest(self, vector: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and inner products of (nearly always) the nearest, best first.

        Raises:
            ToolError: "failed", the graph is not of these vectors.
        """
        found = self._graph.search(vector, 2 * topk, threads=1)
        keys = np.asarray(found.keys)
        if len(keys) and not (keys < len(self._vectors)).all():  # unsigned: a stranger's graph
            raise ToolError(
                "failed",
                f"the index is damaged: its graph names vector {keys.max()} of "
                f"{len(self._vectors)}",
            )
        rows = np.sort(keys.astype(np.int64))  # ties by row, as in the exact index
        # The graph holds half the precision; these are what the exact index would say.
        scores = np.einsum("ij,j->i", self._vectors[rows], vector)
        order = np.argsort(-scores, kind="stable")[:topk]
        return rows[order], scores[order]
