"""Decoding on one CPU: rows' keys and values in arrays of their own, beside the pages.

Reading pages where they lie costs a copy of every key and value for every token, three times the
memory traffic of the attention itself. So a row's pages are copied when it is taken, in the order
in which they are multiplied; each new token is added to the copy, and brought to the pages when
the decoding ends. A row's numbers depend neither on when that was nor on the rows beside it.

Letters as in cache.py; `C` slots of a block, `G` query heads of a key head, `A` tokens that can be
added.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.lax import dot_general

from mmsr_jax.model.cache import Cache, places, read, sizes, write

SLOTS = 512  # of a block, at most: all of it is read when one row needs any of it
BATCH = ((0, 1), (0, 1))
LOWEST = float(jnp.finfo(jnp.float32).min)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer's keys and values of all rows, in blocks of slots."""

    keys: tuple[jax.Array, ...]  # [B, K, H, C] of each block: scores are twice as fast so
    values: tuple[jax.Array, ...]  # [B, K, C, H] of each block


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Window:
    """What `forward` takes in place of a Cache, for one token a row."""

    layers: tuple[Layer, ...]
    added: tuple[jax.Array, ...]  # of each layer [A, B, 2, K, H], by step
    steps: jax.Array  # scalar int32, tokens added to the longest row
    lengths: jax.Array  # [B] int32, tokens of each row


def empty(kv: jax.Array, layers: int, rows: int, table: int) -> tuple[Layer, ...]:
    """Room for rows of `table` pages of the pool `kv`."""
    page, heads, size = sizes(kv)
    blocks = -(-table // max(SLOTS // page, 1))
    length = -(-table // blocks) * page

    def room(*shape):  # each an array of its own: they are donated
        return tuple(jnp.zeros((rows, heads, *shape), kv.dtype) for _ in range(blocks))

    return tuple(Layer(room(size, length), room(length, size)) for _ in range(layers))


def load(layers: tuple[Layer, ...], cache: Cache, fresh: jax.Array, most: int) -> Window:
    """A window on the rows of `cache`, with room for `most` more tokens a row.

    Args:
        layers: where rows that are not `fresh` [B] have all their tokens already.
    """
    page, heads, size = sizes(cache.kv)
    rows, table = cache.tables.shape
    pages = cache.kv.shape[0] // len(layers)
    length = layers[0].values[0].shape[2]
    blocks, each = len(layers[0].values), length // page
    tables = jnp.pad(cache.tables, ((0, 0), (0, blocks * each - table)))
    order = jnp.nonzero(fresh, size=rows)[0]

    def take(index, layers):
        row, taken = order[index], []
        own = jax.lax.dynamic_index_in_dim(tables, row)
        for number, layer in enumerate(layers):
            keys, values = [], []
            for block, (old_keys, old_values) in enumerate(
                zip(layer.keys, layer.values, strict=True)
            ):
                at = number * pages + own[:, block * each : (block + 1) * each]
                k, v = read(cache.kv, at)
                # What lies beyond a row is somebody else's: 0 times its infinities is no number.
                slot = block * length + jnp.arange(length, dtype=jnp.int32)
                v = jnp.where((slot < cache.lengths[row])[:, None], v, 0)
                put = jax.lax.dynamic_update_slice_in_dim
                keys.append(put(old_keys, k.swapaxes(2, 3), row, 0))
                values.append(put(old_values, v, row, 0))
            taken.append(Layer(tuple(keys), tuple(values)))
        return tuple(taken)

    layers = jax.lax.fori_loop(0, fresh.sum(), take, layers)
    added = (jnp.zeros((most, rows, 2, heads, size), cache.kv.dtype),) * len(layers)
    return Window(layers, added, jnp.int32(0), cache.lengths)


def scatter(cache: Cache, window: Window, counts: jax.Array) -> jax.Array:
    """The pool of `cache`, which `window` came from, with the `counts` [B] tokens added since."""
    kv, pages = cache.kv, cache.kv.shape[0] // len(window.layers)
    new = jnp.arange(window.added[0].shape[0]) < counts[:, None]
    page, slot = places(cache, new.astype(jnp.int32))
    for index, added in enumerate(window.added):
        k, v = added.transpose(2, 1, 0, 3, 4)
        kv = write(kv, index * pages, page, slot, k, v)
    return kv


def attend(window: Window, index: int, q, k, v, active) -> tuple[jax.Array, Layer, jax.Array]:
    """Adds a token to the rows that are active, and attends to everything up to it.

    A block that no row reaches is not read; one that a row does not reach adds exact zeros to it.

    Args:
        index: of the layer.
        q: [B, 1, N, H]; k, v: [B, 1, K, H] of the new token.
        active: [B] bool; what the others get means nothing.

    Returns: [B, 1, N, H] in q's dtype; the layer, and what was added to it, as they are now.
    """
    layer = window.layers[index]
    rows, _, heads, size = q.shape
    kv_heads, kind = k.shape[2], q.dtype
    q = q.reshape(rows, kv_heads, heads // kv_heads, size)
    added = window.added[index]
    new = jnp.concatenate([k, v], axis=1).astype(added.dtype)
    added = jax.lax.dynamic_update_index_in_dim(added, new, window.steps, 0)
    last = jnp.max(jnp.where(active, window.lengths, -1))  # slot in use by the longest row
    every, start = jnp.arange(rows), 0
    keys, values, sums = [], [], None
    for own_keys, own_values in zip(layer.keys, layer.values, strict=True):
        length = own_values.shape[2]
        slot = window.lengths - start
        slot = jnp.where(active & (slot >= 0), slot, length)  # dropped where it lies elsewhere
        own_keys = own_keys.at[every, :, :, slot].set(new[:, 0], mode="drop")
        own_values = own_values.at[every, :, slot].set(new[:, 1], mode="drop")
        keys.append(own_keys)
        values.append(own_values)
        seen = start + jnp.arange(length, dtype=jnp.int32) <= window.lengths[:, None]
        block = (q, own_keys, own_values, seen[:, None, None])
        if sums is None:
            sums = _weigh(*block, LOWEST)
        else:
            sums = jax.lax.cond(last >= start, _add, lambda sums, *_: sums, sums, *block)
        start += length
    _, total, out = sums
    out = (out / total).astype(kind).reshape(rows, 1, heads, size)
    return out, Layer(tuple(keys), tuple(values)), added


def _weigh(q, keys, values, seen, top):
    """Highest score, sum of weights [B, K, G, 1] and weighted values [B, K, G, H] of a block."""
    scores = dot_general(q, keys, (((3,), (2,)), BATCH), preferred_element_type=jnp.float32)
    scores = jnp.where(seen, scores * q.shape[-1] ** -0.5, LOWEST)
    top = jnp.maximum(top, scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - top)
    out = dot_general(
        weights.astype(values.dtype),
        values,
        (((3,), (2,)), BATCH),
        preferred_element_type=jnp.float32,
    )
    return top, weights.sum(-1, keepdims=True), out


def _add(sums, q, keys, values, seen):
    """A block more, the sums so far shrunk to its highest score."""
    top, total, out = sums
    higher, new, part = _weigh(q, keys, values, seen, top)
    shrink = jnp.exp(top - higher)
    return higher, total * shrink + new, out * shrink + part
