"""Nearest vectors by looking at all of them, from a file mapped into memory."""

import pathlib

import numpy as np

FILE = "vectors.f32"  # [count, size] float32, one row after another


class ExactVectors:
    """Inner products with every row: right by construction, linear in their number.

    Args:
        folder: holds `FILE`.
        count, size: its shape.

    Raises:
        ValueError: no such file, or one of another size.
    """

    def __init__(self, folder: pathlib.Path, count: int, size: int):
        path = folder / FILE
        expected, there = count * size * 4, path.stat().st_size if path.is_file() else 0
        if there != expected:
            raise ValueError(
                f"{path} has {there} bytes, {count} vectors of {size} (manifest) need {expected}"
            )
        self._vectors = np.memmap(path, np.float32, "r", shape=(count, size)) if count else None

    def nearest(self, vector: np.ndarray, topk: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and inner products of the `topk` nearest, best first; ties by row."""
        if self._vectors is None:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        # Not by BLAS: the threads of many queries at once, each with as many of its own, get into
        # one another's way for seconds, and one core reads memory about as fast as two.
        scores = np.einsum("ij,j->i", self._vectors, vector)
        topk = min(topk, len(scores))
        # The k-th best score, then everything that reaches it: which of equals `argpartition`
        # takes is not said.
        least = np.partition(scores, len(scores) - topk)[len(scores) - topk]
        rows = np.flatnonzero(scores >= least)
        rows = rows[np.argsort(-scores[rows], kind="stable")][:topk]
        return rows, scores[rows]
