"""Sizes that repeat: whatever enters jit is padded to one of a few buckets."""

import math


def ladder(n: int, minimum: int = 64, growth: float = 1.5, multiple: int = 8) -> int:
    """The smallest step of a geometric ladder that holds n.

    Steps start at `minimum` and grow by `growth`, each rounded up to `multiple`
    (64, 96, 144, 216, 328, ...), so that at most `growth - 1` of a bucket is padding.

    Raises:
        ValueError: a negative n, or a ladder that does not rise.
    """
    if n < 0 or minimum < 1 or growth <= 1 or multiple < 1:
        raise ValueError(f"no ladder for {n=}, {minimum=}, {growth=}, {multiple=}")
    step = math.ceil(minimum / multiple) * multiple
    while step < n:
        step = math.ceil(step * growth / multiple) * multiple
    return step
