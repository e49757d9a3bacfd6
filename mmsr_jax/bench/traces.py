"""Multi-turn conversations to replay: drawn from a seed, or read from a file.

A trace is what was said, by whom, in ids. A file has one JSON object a line:

    {"group": "q17", "sample": 0, "pieces": [
      {"author": "prompt", "ids": [...], "pictures": [{"name": "a", "grid": [1, 4, 6]}]},
      {"author": "model", "ids": [...]},
      {"author": "tool", "ids": [...], "pictures": []},
      {"author": "model", "ids": [...]}]}

Pixels are left out: a picture is noise drawn from its name, and equal names are equal pictures.
"""

import dataclasses
import hashlib
import json
import pathlib
from collections.abc import Iterable, Sequence

import numpy as np

from mmsr_jax.inputs import layout
from mmsr_jax.model.config import ModelConfig
from mmsr_jax.types import Author, Picture, Tokens

SAMPLES = 8  # of a prompt in drawn traces


@dataclasses.dataclass(frozen=True)
class Trace:
    """One trajectory."""

    group: str  # traces of one group begin with the same prompt
    sample: int
    pieces: tuple[Tokens, ...]  # prompt, said, tool, said, ...; the last one is said

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
    """Traces of a file (see the top of this file), those of a group one after another.

    Raises:
        ValueError: a line that is no trace, ids the model does not have, pictures that do not
            match the picture tokens, or two prompts in one group.
    """
    writer, groups = _Writer(config), {}
    for number, line in enumerate(pathlib.Path(file).read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            said = [
                (
                    piece["author"],
                    np.asarray(piece["ids"], np.int32),
                    [(p["name"], tuple(p["grid"])) for p in piece.get("pictures", ())],
                )
                for piece in record["pieces"]
            ]
            trace = writer.trace(str(record["group"]), int(record["sample"]), said)
        except (KeyError, TypeError, ValueError) as error:
            named = f"no {error}" if isinstance(error, KeyError) else str(error)
            raise ValueError(f"{file}, line {number} is no trace: {named}") from None
        group = groups.setdefault(trace.group, [])
        if group and not _equal(group[0].prompt, trace.prompt):
            raise ValueError(f"{file}, line {number}: group {trace.group} has two prompts")
        group.append(trace)
    if not groups:
        raise ValueError(f"{file} has no traces")
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
        lines.append(
            json.dumps({"group": trace.group, "sample": trace.sample, "pieces": pieces}) + "\n"
        )
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

    def trace(self, group: str, sample: int, said: list) -> Trace:
        """`said`: (author, ids, [(name, grid), ...]) of each piece."""
        authors = [author for author, *_ in said]
        right = len(said) >= 2 and len(said) % 2 == 0 and authors[0] == "prompt"
        wanted = ["model" if n % 2 else "tool" for n in range(1, len(said))]
        if not right or authors[1:] != wanted:
            raise ValueError(f"pieces by {', '.join(authors)}, not by prompt, model, tool, model")
        start, feature, pieces = 0, 0, []
        for author, ids, pictures in said:
            piece = self._piece(author, ids, pictures, start, feature)
            start = piece.next_position
            feature += int((piece.image_index >= 0).sum())
            pieces.append(piece)
        return Trace(group, sample, tuple(pieces))

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
            seed = int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")
            size = (int(np.prod(grid)), self.config.vision.patch_dim)
            noise = np.random.default_rng(seed).standard_normal(size, np.float32)
            self.known[key] = Picture(noise, grid)
        return self.known[key]


def _equal(left: Tokens, right: Tokens) -> bool:
    names = [[picture.digest for picture in side.pictures] for side in (left, right)]
    return np.array_equal(left.ids, right.ids) and names[0] == names[1]
