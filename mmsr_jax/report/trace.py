"""Finished conversations as lines of `traces/STEP.jsonl`: who said how much, and tools' seconds.

    {"version": 1, "group": "3/0", "sample": 0, "pieces": [
      {"author": "prompt", "tokens": 61, "pictures": [
        {"name": "5f0c...", "grid": [1, 4, 6], "at": 9, "tokens": 6}]},
      {"author": "model", "tokens": 14},
      {"author": "tool", "tokens": 40, "pictures": [], "seconds": 1.27},
      {"author": "model", "tokens": 11}]}

Enough for `mmsr bench engine --traces` to do the same work again, and no more: no text, no ids, no
pixels, no names of questions. So every trajectory of a step is kept, in whole groups.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mmsr_jax.types import Author, Tokens, Trajectory

VERSION = 1  # of a line
NAME = 16  # digits of a picture's content hash: equal names are equal pictures


def trace_records(groups: Iterable[Sequence[Trajectory]], step: int | str) -> list[dict[str, Any]]:
    """One record a trajectory. A group's name is made of the step and its number in it."""
    return [
        _record(f"{step}/{number}", trajectory)
        for number, group in enumerate(groups)
        for trajectory in group
    ]


def _record(group: str, trajectory: Trajectory) -> dict[str, Any]:
    tokens = trajectory.tokens
    # A result that did not fit any more ended the episode: nobody read it, and it has no piece.
    seconds = iter([turn.result.seconds for turn in trajectory.turns if turn.result is not None])
    cuts = (np.flatnonzero(np.diff(tokens.authors)) + 1).tolist()
    shown, pieces = _pictures(tokens), []
    for start, end in itertools.pairwise([0, *cuts, len(tokens)]):
        author = Author(int(tokens.authors[start]))
        piece: dict[str, Any] = {"author": author.name.lower(), "tokens": end - start}
        if author != Author.MODEL:
            piece["pictures"] = [
                picture | {"at": at - start} for at, picture in shown if start <= at < end
            ]
        if author == Author.TOOL:
            piece["seconds"] = next(seconds)
        pieces.append(piece)
    return {"version": VERSION, "group": group, "sample": trajectory.sample, "pieces": pieces}


def _pictures(tokens: Tokens) -> list[tuple[int, dict[str, Any]]]:
    """Each picture with its first token's place in the conversation."""
    places = np.flatnonzero(tokens.image_index >= 0)
    patches = [len(picture.patches) for picture in tokens.pictures]
    found, before = [], 0
    for picture, count in zip(tokens.pictures, patches, strict=True):
        merged = count * len(places) // sum(patches)  # all are merged alike
        name, grid = picture.digest[:NAME], [int(side) for side in picture.grid]
        found.append((int(places[before]), {"name": name, "grid": grid, "tokens": merged}))
        before += merged
    return found
