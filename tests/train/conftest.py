"""Conversations of unlike lengths with shared pictures, and weights to score them with."""

import jax
import numpy as np
import pytest

from mmsr_jax.inputs import layout
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.train.assemble import Piece
from mmsr_jax.types import Ending, Trajectory


@pytest.fixture(scope="session")
def params(tiny):
    return tiny.params()


@pytest.fixture(scope="session")
def pieces(tiny) -> list[Piece]:
    """Two groups of a kind: the same pictures, other words, advantages of both signs."""
    flag, small = tiny.picture(6, 10), tiny.picture(4, 6)
    thumb, other = tiny.picture(2, 4), tiny.picture(2, 4, seed=1)
    found, text = ("1. ", thumb, " Lisbon 2. ", other, " Porto"), ("Portugal: Lisbon",)
    talks = [
        tiny.conversation((flag, "What capital?"), found, text, seed=1, length=9),
        tiny.conversation((flag, "What capital?"), seed=2, length=3),
        tiny.conversation((flag, "What capital?"), text, seed=3, length=5),
        tiny.conversation((small, "Is it ", flag, "?"), ("Look: ", flag), seed=4, length=4),
        tiny.conversation(("Paris or Porto?",), seed=5, length=12),
        tiny.conversation((thumb, thumb, "Same?"), seed=6, length=1),
    ]
    signs = [1.5, -0.5, -0.75, 1.0, -1.0, 0.0]
    return [
        Piece(tokens, advantage=a, weight=w)
        for tokens, a, w in zip(talks, signs, [1, 1, 1, 2, 1, 0.5], strict=True)
    ]


@pytest.fixture(scope="session")
def groups(tiny, pieces):
    """The pieces as two groups of three trajectories, with rewards."""
    done = [
        Trajectory(tiny.example(f"e{n // 3}"), n % 3, p.tokens, (), (), Ending.ANSWERED)
        for n, p in enumerate(pieces)
    ]
    return [(done[:3], [1.0, 0.0, 0.1]), (done[3:], [0.91, 0.91, 0.0])]


@pytest.fixture(scope="session")
def alone(tiny):
    """alone(params, tokens) -> log-probs [T] of each token given those before it.

    One conversation, no packing, no padding of rows, float64 softmax on the host.
    """

    @jax.jit
    def forward(params, inputs):
        return qwen.forward(tiny.graph, params, inputs).logits[0]

    def run(params, tokens):
        length, n = tiny.pack.length, len(tokens)
        ids, index = np.zeros(length, np.int32), np.full(length, -1, np.int32)
        positions, segments = np.zeros((3, length), np.int32), np.zeros(length, np.int32)
        ids[:n], index[:n], segments[:n] = tokens.ids, tokens.image_index, 1
        positions[:, :n] = tokens.positions
        vision = layout.vision_inputs(
            tokens.pictures, tiny.model.vision, patches=192, pictures_bucket=6, frame=64
        )
        inputs = qwen.Inputs(ids[None], positions[:, None], segments[None], index[None], vision)
        logits = np.asarray(forward(params, inputs), np.float64)[: n - 1]
        logits -= logits.max(-1, keepdims=True)
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return np.concatenate([[0.0], logp[np.arange(n - 1), tokens.ids[1:]]]), logp

    return run


def assert_close_trees(left, right, tolerance):
    """Equal up to `tolerance` times the largest entry of each leaf (and of 1e-3 at the least)."""
    paths = jax.tree_util.tree_leaves_with_path(left)
    for (path, a), b in zip(paths, jax.tree.leaves(right), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        scale = max(float(np.abs(b).max()), 1e-3)
        gap = float(np.abs(a - b).max()) / scale
        assert gap < tolerance, f"{jax.tree_util.keystr(path)}: {gap:.1e}"


@pytest.fixture(scope="session")
def close_trees():
    return assert_close_trees
