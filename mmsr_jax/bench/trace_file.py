"""Files of traces, one JSON object a line, and `mmsr bench traces`, which takes them out of a run.

A line is what `report/trace.py` writes: each piece's number of tokens and where its pictures stand.
Instead of `tokens` a piece may have its `ids`; its pictures then stand where the picture tokens
are, without `at`. `seconds` of tools may be missing. Checks that need no model are made here.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from mmsr_jax.report.trace import VERSION


@dataclasses.dataclass(frozen=True)
class Shown:
    """A picture in a piece."""

    name: str
    grid: tuple[int, int, int]  # (t, h, w) in patches
    at: int = -1  # its first token's place in the piece; -1: wherever the ids say
    tokens: int = -1  # merged; -1: whatever the model makes of the grid


@dataclasses.dataclass(frozen=True)
class Piece:
    author: str
    tokens: int
    ids: tuple[int, ...] | None  # as many as tokens; None: nobody knows
    pictures: tuple[Shown, ...]
    seconds: float | None  # of the tool


@dataclasses.dataclass(frozen=True)
class Line:
    """One trace of a file."""

    group: str
    sample: int
    pieces: tuple[Piece, ...]  # by prompt, model, tool, model, ...
    record: dict[str, Any] = dataclasses.field(repr=False)  # as it was read

    @property
    def turns(self) -> tuple[Piece, ...]:
        return self.pieces[1::2]

    @property
    def tools(self) -> tuple[Piece, ...]:
        return self.pieces[2::2]


def read(file: pathlib.Path | str) -> Iterator[tuple[str, Line]]:
    """Each line's place, for messages, and what stands there.

    Raises:
        ValueError: a file that is no text, has no traces, or a line that is no trace.
    """
    try:
        text = pathlib.Path(file).read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no file of traces: no text at byte {error.start}") from None
    found = False
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        place, found = f"{file}, line {number}", True
        with explained(place):
            parsed = _line(json.loads(line))
        yield place, parsed
    if not found:
        raise ValueError(f"{file} has no traces")


class explained:
    """Errors of what is read inside name the line."""

    def __init__(self, place: str):
        self.place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind, error, where) -> None:
        if isinstance(error, (KeyError, TypeError, ValueError, OverflowError, RecursionError)):
            named = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{self.place} is no trace: {named}") from None


def collect(run: str, out: str, steps: Sequence[str] = ()) -> dict:
    """Writes the traces of a run into one file; returns what is in it.

    Args:
        run: the run's folder.
        steps: names of files in its `traces/`, such as `3` or `eval-after-sampled`; without any,
            all steps of training.

    Raises:
        ValueError: no run, no such step, or a damaged file. Nothing is written then.
    """
    folder = pathlib.Path(run) / "traces"
    there = sorted((path.stem for path in folder.glob("*.jsonl")), key=_order)
    if not there:
        raise ValueError(
            f"{folder} holds no traces: `mmsr train` and `mmsr eval` write them into a run's "
            "folder, step by step (this one has done none, or is older than that)"
        )
    names = [str(step) for step in steps] or [name for name in there if name.isdecimal()]
    missing = [name for name in names if name not in there]
    if missing or not names:
        what = f"step {', '.join(missing)}" if missing else "step of training"
        raise ValueError(f"{folder} has no {what}; there are {', '.join(there)}")
    lines: list[Line] = []
    prompts: dict[str, Piece] = {}
    for name in dict.fromkeys(names):
        for place, line in read(folder / f"{name}.jsonl"):
            if prompts.setdefault(line.group, line.pieces[0]) != line.pieces[0]:
                raise ValueError(f"{place}: group {line.group} has two prompts")
            lines.append(line)
    target = pathlib.Path(out)
    draft = target.with_name(target.name + ".draft")
    draft.write_text("".join(json.dumps(line.record) + "\n" for line in lines))
    os.replace(draft, target)
    pictures = [shown for line in lines for piece in line.pieces for shown in piece.pictures]
    return {
        "bench": "traces",
        "run": str(run),
        "file": str(out),
        "steps": list(dict.fromkeys(names)),
        "traces": len(lines),
        "prompts": len(prompts),
        "turns": sum(len(line.turns) for line in lines),
        "tokens": sum(piece.tokens for line in lines for piece in line.turns),
        "prompt_tokens": sum(piece.tokens for piece in prompts.values()),
        "result_tokens": sum(piece.tokens for line in lines for piece in line.tools),
        "pictures": len(pictures),
        "distinct_pictures": len({(shown.name, shown.grid) for shown in pictures}),
        "latency": spread(
            piece.seconds for line in lines for piece in line.tools if piece.seconds is not None
        ),
    }


def table(record: dict) -> str:
    """What `collect` found, for a reader."""
    late = record["latency"]
    calls = f"{late['calls']} tool calls"
    if late["calls"]:
        calls += (
            f": median {late['median']:.3g} s, p99 {late['p99']:.3g} s, at most "
            f"{late['largest']:.3g} s"
        )
    return (
        f"{record['file']}: {record['traces']} conversations of {record['prompts']} prompts, "
        f"{record['turns']} turns, {record['tokens']} tokens said, "
        f"{record['prompt_tokens']} + {record['result_tokens']} read; {record['pictures']} "
        f"pictures, {record['distinct_pictures']} different\n{calls}\n"
        f"replay: mmsr bench engine --parts replay barrier --traces {record['file']} "
        "--latency recorded"
    )


def spread(seconds: Iterable[float]) -> dict:
    """Number, median, 99th percentile and largest of some latencies."""
    all_of_them = np.asarray(list(seconds))
    if not all_of_them.size:
        return {"calls": 0, "median": None, "p99": None, "largest": None}
    return {
        "calls": int(all_of_them.size),
        "median": float(np.median(all_of_them)),
        "p99": float(np.quantile(all_of_them, 0.99)),
        "largest": float(all_of_them.max()),
    }


def _order(name: str) -> tuple:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _line(record: dict) -> Line:
    if not isinstance(record, dict):
        raise ValueError("no object")
    if (version := record.get("version", VERSION)) != VERSION:
        raise ValueError(f"version {version!r}, and this mmsr reads {VERSION}")
    pieces = tuple(_piece(piece) for piece in record["pieces"])
    authors = [piece.author for piece in pieces]
    wanted = ["prompt", *("model" if n % 2 else "tool" for n in range(1, len(pieces)))]
    if len(pieces) < 2 or len(pieces) % 2 or authors != wanted:
        raise ValueError(f"pieces by {', '.join(authors)}, not by prompt, model, tool, model")
    if len({piece.seconds is None for piece in pieces[2::2]}) == 2:
        raise ValueError("seconds of some of its tools, but not of all")
    return Line(str(record["group"]), int(record["sample"]), pieces, record)


def _piece(record: dict) -> Piece:
    if not isinstance(record, dict):
        raise ValueError("a piece that is no object")
    author = str(record["author"])
    if ("ids" in record) == ("tokens" in record):
        raise ValueError(f"a piece by {author} needs either tokens or ids")
    ids = np.asarray(record["ids"], np.int32) if "ids" in record else None
    count = _whole(record["tokens"], "tokens") if ids is None else ids.size
    if ids is not None and (ids.ndim != 1 or not count or ids.min() < 0):
        raise ValueError("no ids, or some below 0")
    words = None if ids is None else tuple(ids.tolist())
    pictures, end = [], 0
    for picture in record.get("pictures", ()):
        shown = _shown(picture, placed=ids is None)
        if ids is None and (shown.at < end or shown.at + shown.tokens > count):
            raise ValueError(
                f"a picture at {shown.at} of {shown.tokens} tokens, where {end} to {count} of its "
                "piece are free"
            )
        end = shown.at + shown.tokens
        pictures.append(shown)
    if pictures and author == "model":
        raise ValueError("pictures in what the model says")
    seconds = record.get("seconds")
    if seconds is not None:
        seconds = float(seconds)
        if author != "tool" or not 0 <= seconds < math.inf:
            raise ValueError(f"a piece by {author} of {seconds} seconds")
    return Piece(author, count, words, tuple(pictures), seconds)


def _shown(record: dict, placed: bool) -> Shown:
    name, grid = str(record["name"]), tuple(_whole(side, "grid") for side in record["grid"])
    if len(grid) != 3:
        raise ValueError(f"a picture's grid of {len(grid)} sides, not (t, h, w)")
    if not placed:
        return Shown(name, grid)
    at, tokens = _whole(record["at"], "at", 0), _whole(record["tokens"], "tokens")
    if tokens > math.prod(grid):
        raise ValueError(f"a picture of {tokens} tokens, more than its grid {grid} has patches")
    return Shown(name, grid, at, tokens)


def _whole(value: object, name: str, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}, not a whole number from {least} on")
    return value
