"""The engine's jitted programs: encode pictures, extend, copy pages, decode until a pause.

Nothing about a picture's grid, a text's length, or who sits in which row enters a program as a
shape: the host pads to the few sizes named in EngineConfig, so each program compiles once. The
host says everything anew at each call, in a few small arrays; only the pool of pages and the
features of pictures live on the device.

Letters: `B` rows of a decoding, `R` rows of an extension, `T` tokens a row of it, `N` tokens of a
look at most, `M` pages a row at most, `F` rows of the feature pool, `D` width.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mmsr_jax.engine.choose import choose
from mmsr_jax.model import cache as cache_lib
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.model import window as window_lib


class Graph:
    """The model's graph with its hash at hand.

    jit asks for the hash of a static argument in every call, and that of a graph walks over the
    whole model: as long as half a decoding step of a small one.
    """

    def __init__(self, graph):
        self.graph, self._hash = graph, hash(graph)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other) -> bool:
        if not isinstance(other, Graph):
            return NotImplemented
        return self.graph is other.graph or self.graph == other.graph


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extension:
    """Tokens to put into the pool. One trajectory may fill several rows, part by part."""

    ids: jax.Array  # [R, T] int32
    positions: jax.Array  # [3, R, T] int32
    segments: jax.Array  # [R, T] int32, 1 for a token, 0 for padding at the end
    feature: jax.Array  # [R, T] int32, row of the feature pool, -1 for text
    tables: jax.Array  # [R, M] int32 pages
    lengths: jax.Array  # [R] int32, slot of the row's first token


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of a decoding."""

    pending: jax.Array  # [B] int32, the last known token: fed next
    position: jax.Array  # [B] int32, its M-RoPE position (text: the same on all three axes)
    lengths: jax.Array  # [B] int32, tokens in the pool
    left: jax.Array  # [B] int32, tokens the row may sample; 0: nobody sits there
    sampled: jax.Array  # [B] int32, number of the next draw of its stream
    keys: jax.Array  # [B, 2] uint32, key data of its stream
    tables: jax.Array  # [B, M] int32 pages
    fresh: jax.Array  # [B] bool, the window does not hold the row's tokens


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampled:
    """What a decoding gave."""

    ids: jax.Array  # [B, N] int32
    logprobs: jax.Array  # [B, N] float32
    counts: jax.Array  # [B] int32, how many of them are real
    active: jax.Array  # [B] bool, the row has not paused
    steps: jax.Array  # scalar int32, steps taken


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def encode(graph: Graph, params, features, vision, offset):
    """Writes the features of a bucket of pictures into the pool [F, D] at row `offset`."""
    encoded = qwen.encode_images(graph.graph, params, vision)
    return jax.lax.dynamic_update_slice(features, encoded.astype(features.dtype), (offset, 0))


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def extend(graph: Graph, params, kv, features, piece: Extension):
    """Computes the keys and values of a piece; returns the pool."""
    inputs = qwen.Inputs(piece.ids, piece.positions, piece.segments, piece.feature)
    cache = qwen.Cache(kv=kv, tables=piece.tables, lengths=piece.lengths)
    return qwen.forward(
        graph.graph, params, inputs, cache, features=features, logits=False
    ).cache.kv


@functools.partial(jax.jit, static_argnums=(1,), donate_argnums=(0,))
def copy_pages(kv, layers: int, source, target):
    """Pages `target` [C] become copies of `source` [C]; a target past the end is not used."""
    return cache_lib.copy_pages(kv, layers, source, target)


@functools.partial(jax.jit, static_argnums=(0, 7, 8), donate_argnums=(2, 3))
def decode(
    graph: Graph,
    params,
    kv,
    window,
    rows: Rows,
    temperature,
    patience,
    eos_ids: tuple[int, ...],
    steps: int,
):
    """Samples until every row has paused, or `patience` of them have, or for `steps` tokens.

    A row pauses by itself when it samples one of `eos_ids`, has used what it had left, or has
    filled its slots; the others go on.

    Args:
        window: what `window.empty` gave, or () to read the pages where they lie.

    Returns: the pool, the window, and Sampled.
    """
    count = rows.pending.shape[0]
    slots = rows.tables.shape[1] * cache_lib.sizes(kv)[0]
    every = jnp.arange(count)
    stops = jnp.asarray(eos_ids, jnp.int32)
    keys = jax.random.wrap_key_data(rows.keys, impl="threefry2x32")
    began = rows.left > 0

    pages = cache = qwen.Cache(kv=kv, tables=rows.tables, lengths=rows.lengths)
    if window:
        cache = window_lib.load(window, pages, rows.fresh, steps)

    def more(carry):
        step, active = carry[0], carry[1]
        paused = (began & ~active).sum()
        return (step < steps) & active.any() & (paused < patience)

    def body(carry):
        step, active, cache, pending, counts, ids, logprobs = carry
        inputs = qwen.Inputs(
            ids=pending[:, None],
            positions=jnp.broadcast_to((rows.position + counts)[None, :, None], (3, count, 1)),
            segments=active[:, None].astype(jnp.int32),
            image_index=jnp.full((count, 1), -1, jnp.int32),
        )
        out = qwen.forward(graph.graph, params, inputs, cache, logits=False)
        logits = qwen.token_logits(graph.graph, params, out.hidden[:, 0])
        token, logprob = choose(logits, keys, rows.sampled + counts, temperature)
        # Rows that are not active write out of range, which JAX drops.
        slot = jnp.where(active, counts, steps)
        ids = ids.at[every, slot].set(token, mode="drop")
        logprobs = logprobs.at[every, slot].set(logprob, mode="drop")
        counts = counts + active
        done = (token[:, None] == stops[None]).any(-1) | (counts >= rows.left)
        done |= rows.lengths + counts >= slots
        pending = jnp.where(active, token, pending)
        return step + 1, active & ~done, out.cache, pending, counts, ids, logprobs

    zeros = jnp.zeros((count,), jnp.int32)
    ids = jnp.zeros((count, steps), jnp.int32)
    carry = (jnp.int32(0), began, cache, rows.pending, zeros, ids, ids.astype(jnp.float32))
    step, active, cache, _, counts, ids, logprobs = jax.lax.while_loop(more, body, carry)
    sampled = Sampled(ids, logprobs, counts, active, step)
    if window:
        return window_lib.scatter(pages, cache, counts), cache.layers, sampled
    return cache.kv, (), sampled
