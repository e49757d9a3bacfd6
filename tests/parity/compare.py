"""Ours beside the original, for one random model and its conversations."""

import dataclasses
import functools
import pathlib
import shutil

import jax
import numpy as np
import originals
import random_models
import random_talks
import torch
from safetensors.torch import save_file

from mmsr_jax.engine.engine import Engine, EngineConfig
from mmsr_jax.engine.requests import Request, Resume, stream
from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.train import sft
from mmsr_jax.train.assemble import PackConfig, Piece, assemble
from mmsr_jax.types import Author, Tokens
from mmsr_jax.weights import hf

PACK = PackConfig(rows=4, length=192, patches=640, pictures=12, picture_patches=80)
# What writes into the residual stream: with these at zero a layer passes its input on.
WRITERS = {
    "text": (("attention", "o"), ("mlp", "down")),
    "vision": (("proj",), ("mlp", "down")),
}


class Case:
    """One seed: a model in both worlds, and four conversations in both layouts.

    The original gets a row a conversation, padded. Ours are packed by the trainer's own code, so
    rows, places, shared pictures and segment numbers differ on purpose.
    """

    def __init__(self, seed: int, folder: pathlib.Path, tokenizer):
        self.folder, self.tokenizer = folder, tokenizer
        drawn = random_models.draw_config(seed, tokenizer)
        self.model = random_models.build(seed, drawn)
        self.model.save_pretrained(folder / "model")
        loaded = hf.load(folder / "model")
        self.graph, self.params, self.config = loaded.graph, loaded.params, loaded.config
        self.images = random_models.image_config(drawn)
        self.talks = random_talks.draw(seed, tokenizer, self.images)
        self.rows = [(talk.tokens, talk.images) for talk in self.talks]
        self.arguments = originals.batch(self.rows, self.images)
        # Every token is trained on, so that the loss reaches every parameter.
        weights = np.random.default_rng([3, seed]).uniform(0.5, 2, len(self.talks))
        pieces = [
            Piece(dataclasses.replace(t, authors=np.full(len(t), Author.MODEL)), weight=weight)
            for (t, _), weight in zip(self.rows, weights, strict=True)
        ]
        (self.batch,) = assemble(pieces, self.config, PACK, aggregate="token")
        self.places = [self._place(tokens.ids) for tokens, _ in self.rows]

    def _place(self, ids) -> tuple[int, slice]:
        """Row and tokens of a conversation in our batch."""
        batch, found = self.batch.inputs, []
        for row in range(PACK.rows):
            for number in range(1, batch.segments[row].max() + 1):
                at = np.flatnonzero(batch.segments[row] == number)
                if np.array_equal(batch.ids[row, at], ids):
                    found.append((row, slice(at[0], at[-1] + 1)))
        (place,) = found
        return place

    def ours(self, array) -> list[np.ndarray]:
        """The part [T, ...] of each conversation of an array [B, T, ...] of our batch."""
        return [np.asarray(array)[row, at] for row, at in self.places]

    def theirs(self, array) -> list[np.ndarray]:
        """The same of an array of the original's batch."""
        return [np.asarray(array)[n, : len(t)] for n, (t, _) in enumerate(self.rows)]

    @functools.cached_property
    def _forward(self):
        @jax.jit
        def run(params):
            inputs = self.batch.inputs
            features = qwen2_5_vl.encode_images(self.graph, params, inputs.vision)
            out = qwen2_5_vl.forward(self.graph, params, inputs, features=features)
            return features, out.hidden, out.logits

        return run

    @functools.cached_property
    def output(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Picture features [M, D], hidden states and logits [B, T, ...] of our batch."""
        return self._forward(self.params)

    def first_layers(self, tower: str, count: int):
        """`output` of the first `count` layers of a tower, by the same program."""
        layers = self.params[tower]["layers"]
        for path in WRITERS[tower]:
            layers = _replaced(layers, path, lambda leaf: leaf.at[count:].set(0))
        return self._forward(self.params | {tower: self.params[tower] | {"layers": layers}})

    def shown(self, features) -> np.ndarray:
        """Features [m, D] of all picture tokens, conversation by conversation."""
        rows = np.concatenate(self.ours(self.batch.inputs.image_index))
        return np.asarray(features)[rows[rows >= 0]]

    def gradients(self) -> tuple[dict, dict]:
        """Of the SFT loss, ours and the original's, both in our layout."""

        @jax.jit
        def run(params):
            return jax.grad(lambda params: sft.loss(params, self.graph, self.batch)[0])(params)

        length = self.arguments["input_ids"].shape[1]
        weights = torch.zeros((len(self.rows), length))
        for row, part in enumerate(self.ours(self.batch.weights)):
            weights[row, : len(part)] = torch.from_numpy(part)
        targets = self.arguments["input_ids"][:, 1:, None]

        def loss(logits):
            chosen = logits[:, :-1].log_softmax(-1).gather(2, targets)[..., 0]
            return -(weights[:, :-1] * chosen).sum()

        found = originals.gradients(self.model, self.arguments, loss)
        # Read like a checkpoint: the way from published names to our tree is the one of weights.
        folder = self.folder / "gradients"
        folder.mkdir()
        save_file(found, folder / "model.safetensors")
        shutil.copy(self.folder / "model" / "config.json", folder)
        return jax.device_get(run(self.params)), jax.device_get(hf.load(folder).params)

    def continued(self, first: int, second: int) -> list[list[tuple[np.ndarray, np.ndarray]]]:
        """Greedy decoding by our engine and by the original's `generate`.

        Every row says `first` tokens, reads a tool's message (with a picture, in some), and says
        `second` more.

        Returns: for each of the two turns and each row the engine's tokens, the original's, and
            the lead of the original's best logit at each token, all [n].
        """
        config = EngineConfig(
            rows=4, slots=384, turn_tokens=first, decode_steps=first, extend_rows=4,
            extend_tokens=96, patches=PACK.patches, pictures=PACK.pictures,
            picture_patches=PACK.picture_patches, feature_rows=2 * PACK.patches // 4,
        )  # fmt: skip
        engine = Engine(self.graph, self.config, config, ())
        engine.set_params(self.params)
        rows = [
            engine.submit(Request(t, (stream(n),), first))[0] for n, (t, _) in enumerate(self.rows)
        ]
        said = _said(engine, rows)
        turns = [self._beside(said, self.rows, first)]
        talks = []
        for row, talk, ids in zip(rows, self.talks, said, strict=True):
            reply, whole = random_talks.go_on(talk, ids, self.tokenizer)
            talks.append((whole, talk.images + talk.reply_images))
            engine.resume(Resume(row, reply, whole.pictures, second))
        turns.append(self._beside(_said(engine, rows), talks, second))
        return turns

    def _beside(self, said, talks: list[tuple[Tokens, tuple]], count: int):
        arguments = originals.batch(talks, self.images, left=True)
        expected, lead = originals.greedy(self.model, arguments, count)
        return list(zip(said, expected, lead, strict=True))


def _said(engine: Engine, rows: list[int]) -> list[np.ndarray]:
    """What each trajectory says until it pauses."""
    found = {}
    while engine.busy:
        found |= {turn.number: turn.ids for turn in engine.step(0.0)}
    return [found[row] for row in rows]


def _replaced(tree: dict, path: tuple[str, ...], change) -> dict:
    """The tree with every array under `path` changed."""
    below = tree[path[0]]
    inner = jax.tree.map(change, below) if len(path) == 1 else _replaced(below, path[1:], change)
    return tree | {path[0]: inner}


def leaves(tree: dict):
    """Name and array of every parameter; stacked layers one by one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = ".".join(key.key for key in path)
        if ".layers." in name:
            yield from ((f"{name}[{n}]", part) for n, part in enumerate(leaf))
        else:
            yield name, leaf
