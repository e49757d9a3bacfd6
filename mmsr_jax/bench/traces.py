"""Multi-turn conversations to replay: drawn from a seed, or read from a file.

A trace is what was said, by whom, in ids. `mmsr bench traces` makes a file of them out of a run
(`trace_file.py` has the format). There a piece is a number of tokens: its words are then drawn by
the names of group and sample, so that a run of a large model can be replayed by a small one.

Pixels are left out: a picture is noise drawn from its name, and equal names are equal pictures.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from mmsr_jax.bench import trace_file
from mmsr_jax.inputs import layout
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.report.trace import VERSION
from mmsr_jax.types import Author, Picture, Tokens

SAMPLES = 8  # of a prompt in drawn traces


@dataclasses.dataclass(frozen=True)
class Trace:
    """One trajectory."""

    group: str  # traces of one group begin with the same prompt
    sample: int
    pieces: tuple[Tokens, ...]  # prompt, said, tool, said, ...; the last one is said
    seconds: tuple[float, ...] = ()  # that each tool took when it was recorded; (): nobody knows

    @property
    def prompt(self) -> Tokens:
        return self.pieces[0]

    @property
    def turns(self) -> tuple[int, ...]:
        """Tokens that the model said, turn by turn."""
        return tuple(len(piece) for piece in self.pieces[1::2])

    @property
    def tools(self) -> tuple[Tokens, ...]:
        return self.pieces[2::2]

    @property
    def tokens(self) -> int:
        """Of the whole conversation."""
        return sum(len(piece) for piece in self.pieces)

    def pictures(self, pieces: int) -> tuple[Picture, ...]:
        """All pictures of the first so many pieces."""
        return tuple(picture for piece in self.pieces[:pieces] for picture in piece.pictures)


@dataclasses.dataclass(frozen=True)
class Shape:
    """What drawn traces look like: those of the flags world with rounds of search, on average."""

    prompt: tuple[int, int] = (40, 72)  # tokens of text around the picture, at least and at most
    turn: tuple[int, int] = (8, 40)  # tokens that the model says
    result: tuple[int, int] = (20, 56)  # tokens of text of a tool's result
    thumbnails: tuple[int, int] = (0, 2)  # pictures in a result
    rounds: tuple[int, ...] = (1, 2, 3)  # turns of the model, one as likely as the other
    picture: tuple[int, int, int] = (1, 4, 6)  # in patches
    thumbnail: tuple[int, int, int] = (1, 2, 4)
    catalogue: int = 200  # different thumbnails


def draw(groups: int, config: ModelConfig, seed: int = 0, shape: Shape = Shape()) -> list[Trace]:
    """`groups` prompts with SAMPLES traces each; the same for the same seed.

    Raises:
        ValueError: no groups.
    """
    if groups < 1:
        raise ValueError(f"{groups} groups: at least one is needed")
    rng = np.random.default_rng(seed)
    writer = _Writer(config)
    traces = []

    def some(span: tuple[int, int]) -> int:
        return int(rng.integers(span[0], span[1] + 1))

    for group in range(groups):
        first = writer.talk(rng, some(shape.prompt), [(f"question {group}", shape.picture)])
        for sample in range(SAMPLES):
            said = [("prompt", *first)]
            for turn in range(int(rng.choice(shape.rounds))):
                if turn:
                    thumbnails = [
                        (f"thumbnail {rng.integers(shape.catalogue)}", shape.thumbnail)
                        for _ in range(some(shape.thumbnails))
                    ]
                    said.append(("tool", *writer.talk(rng, some(shape.result), thumbnails)))
                said.append(("model", writer.words(rng, some(shape.turn)), []))
            traces.append(writer.trace(f"q{group}", sample, said))
    return traces


def load(file: pathlib.Path | str, config: ModelConfig) -> list[Trace]:
    """Traces of a file (see `trace_file.py`), those of a group one after another.

    Raises:
        ValueError: a line that is no trace, ids the model does not have, pictures that do not
            match the picture tokens, or two prompts in one group.
    """
    writer, groups = _Writer(config), {}
    for place, line in trace_file.read(file):
        with trace_file.explained(place):
            said = [
                writer.written(piece, (line.group, *((line.sample, n) if n else ())))
                for n, piece in enumerate(line.pieces)
            ]
            seconds = tuple(piece.seconds for piece in line.tools if piece.seconds is not None)
            trace = writer.trace(line.group, line.sample, said, seconds)
        group = groups.setdefault(trace.group, [])
        if group and not _equal(group[0].prompt, trace.prompt):
            raise ValueError(f"{place}: group {trace.group} has two prompts")
        group.append(trace)
    return [trace for group in groups.values() for trace in group]


def save(traces: Iterable[Trace], file: pathlib.Path | str) -> None:
    """Writes what `load` reads."""
    lines = []
    for trace in traces:
        pieces = [
            {
                "author": Author(int(piece.authors[0])).name.lower(),
                "ids": piece.ids.tolist(),
                "pictures": [{"name": p.digest, "grid": p.grid} for p in piece.pictures],
            }
            for piece in trace.pieces
        ]
        for piece, seconds in zip(pieces[2::2], trace.seconds, strict=bool(trace.seconds)):
            piece["seconds"] = seconds
        record = {"version": VERSION, "group": trace.group, "sample": trace.sample}
        lines.append(json.dumps(record | {"pieces": pieces}) + "\n")
    pathlib.Path(file).write_text("".join(lines))


def distinct_tokens(traces: Sequence[Trace]) -> int:
    """Tokens that somebody but the model said: a group's prompt once, every result."""
    prompts = {trace.group: len(trace.prompt) for trace in traces}
    results = sum(len(piece) for trace in traces for piece in trace.tools)
    return sum(prompts.values()) + results


def by_group(traces: Sequence[Trace]) -> list[list[Trace]]:
    """In order of first appearance."""
    groups: dict[str, list[Trace]] = {}
    for trace in traces:
        groups.setdefault(trace.group, []).append(trace)
    return list(groups.values())


class _Writer:
    """Turns ids and pictures into Tokens, as `inputs.chat` would."""

    def __init__(self, config: ModelConfig):
        self.config = config
        special = {
            getattr(config, f.name) for f in dataclasses.fields(config) if "token_id" in f.name
        }
        self.plain = np.setdiff1d(np.arange(config.text.vocab_size), list(special))
        self.known: dict[tuple, Picture] = {}

    def words(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.choice(self.plain, count).astype(np.int32)

    def talk(self, rng: np.random.Generator, count: int, pictures: list):
        """Ids of `count` words, the pictures in front, and the pictures: (name, grid) each."""
        config, ids = self.config, []
        for _, grid in pictures:
            merged = int(np.prod(grid)) // config.vision.merge_size**2
            ids += [config.vision_start_token_id, *[config.image_token_id] * merged]
            ids.append(config.vision_end_token_id)
        return np.concatenate([np.asarray(ids, np.int32), self.words(rng, count)]), pictures

    def written(self, piece: trace_file.Piece, name: tuple) -> tuple:
        """Author, ids and pictures of a file's piece; words that it does not have are drawn.

        `name` names their random stream: equal prompts of a group need equal words.
        """
        pictures = [(shown.name, shown.grid) for shown in piece.pictures]
        if piece.ids is not None:
            ids = np.asarray(piece.ids, np.int32)
        else:
            ids = self.words(_rng(name), piece.tokens)
            for shown in piece.pictures:
                merged = int(np.prod(shown.grid)) // self.config.vision.merge_size**2
                if merged != shown.tokens:
                    raise ValueError(
                        f"a picture of {shown.tokens} tokens, but this model makes {merged} of its "
                        f"grid {shown.grid}"
                    )
                if shown.at:
                    ids[shown.at - 1] = self.config.vision_start_token_id
                ids[shown.at + merged : shown.at + merged + 1] = self.config.vision_end_token_id
            for shown in piece.pictures:  # last: nothing else may take a place of theirs
                ids[shown.at : shown.at + shown.tokens] = self.config.image_token_id
        return piece.author, ids, pictures

    def trace(self, group: str, sample: int, said: list, seconds: tuple[float, ...] = ()) -> Trace:
        """`said`: (author, ids, [(name, grid), ...]) of each piece."""
        start, feature, pieces = 0, 0, []
        for author, ids, pictures in said:
            piece = self._piece(author, ids, pictures, start, feature)
            start = piece.next_position
            feature += int((piece.image_index >= 0).sum())
            pieces.append(piece)
        return Trace(group, sample, tuple(pieces), seconds)

    def _piece(self, author, ids, pictures, start, feature) -> Tokens:
        config, count = self.config, len(ids)
        if not count or ids.min() < 0 or ids.max() >= config.text.vocab_size:
            raise ValueError(f"no ids, or some outside of 0 .. {config.text.vocab_size - 1}")
        index = np.full(count, -1, np.int32)
        grids = tuple(grid for _, grid in pictures)
        if author == "model":  # a picture token that it says is text like any other
            positions, delta = np.tile(np.arange(count, dtype=np.int32), (3, 1)), 0
        else:
            positions, delta = layout.positions(ids, grids, config)
            mine = ids == config.image_token_id
            index[mine] = feature + np.arange(mine.sum())
        return Tokens(
            ids=ids,
            authors=np.full(count, Author[author.upper()], np.int8),
            positions=positions + np.int32(start),
            image_index=index,
            logprobs=np.zeros(count, np.float32),
            versions=np.full(count, 0 if author == "model" else -1, np.int32),
            pictures=tuple(self._picture(*picture) for picture in pictures),
            next_position=start + count + delta,
        )

    def _picture(self, name: str, grid: tuple[int, int, int]) -> Picture:
        key = (name, grid)
        if key not in self.known:
            size = (int(np.prod(grid)), self.config.vision.patch_dim)
            self.known[key] = Picture(_rng(key).standard_normal(size, np.float32), grid)
        return self.known[key]


def _rng(name: tuple) -> np.random.Generator:
    digest = hashlib.sha256(repr(name).encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:8], "big"))


def _equal(left: Tokens, right: Tokens) -> bool:
    names = [[picture.digest for picture in side.pictures] for side in (left, right)]
    return np.array_equal(left.ids, right.ids) and names[0] == names[1]
