"""Keys and values of the tokens seen so far, in pages that rows refer to by number.

A row is a table of pages: token s of row b lies in slot s % S of page tables[b, s // S]. Which page
belongs to whom is data, so nothing compiles anew when rows come, go, or share a page; and rows that
say different things after the same prompt hold that prompt once.

Letters: `L` layers, `P` pages of a layer, `S` slots a page, `K` key-value heads, `H` head size,
`B` rows, `M` pages a row at most, `T` new tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from mmsr_jax.parallel.rules import Placement

PAGE = 32  # slots a page, unless somebody says otherwise


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """A pool of pages, and the rows that read and write it now.

    One array holds all layers, page p of layer l at l * P + p, and a head's key and value next to
    each other: what `ragged_paged_attention` on TPU reads, without cutting a layer out of a stack.
    """

    kv: jax.Array  # [L * P, S, 2 * K, H], keys at even places, values at odd ones
    tables: jax.Array  # [B, M] int32 pages of each row; beyond its length any valid number
    lengths: jax.Array  # [B] int32 tokens of each row that are in the pool

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.tables.shape[1] * self.kv.shape[1]


def places(cache: Cache, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Page (within a layer) and slot of each new token, both [B, T].

    Padding (segment 0) and what is past a row's last slot get a negative page: see `write`.
    """
    size, total = cache.kv.shape[1], cache.slots
    at = cache.lengths[:, None] + jnp.arange(segments.shape[1], dtype=jnp.int32)
    page = jnp.take_along_axis(cache.tables, jnp.minimum(at, total - 1) // size, axis=1)
    return jnp.where((segments > 0) & (at < total), page, -1), at % size


def write(kv: jax.Array, first: jax.Array, page, slot, k: jax.Array, v: jax.Array) -> jax.Array:
    """Puts k, v [B, T, K, H] of the layer whose pages start at `first` to their `places`."""
    rows, length, heads, size = k.shape
    new = jnp.stack([k, v], axis=3).reshape(rows, length, 2 * heads, size).astype(kv.dtype)
    # A negative index would count from the end: past the end it is dropped.
    index = jnp.where(page < 0, kv.shape[0], first + page)
    return kv.at[index, slot].set(new, mode="drop", unique_indices=False)


def sharding(place: Placement, shape: tuple[int, ...]):
    """How a pool of `shape` [L * P, S, 2K, H] lies on a mesh: heads are split, pages are not.

    Any row may hold any page. A key and its value stay together: whole heads are split or nothing.
    """
    heads = (shape[0], shape[1], shape[2] // 2, shape[3])
    return place.of((None, "length", "kv_heads", "head"), heads)


def copy_pages(kv: jax.Array, layers: int, source: jax.Array, target: jax.Array) -> jax.Array:
    """Pages `target` [C] become copies of pages `source` [C] in every layer.

    A target of P (past the end) marks an entry that is not used.
    """
    pages = kv.shape[0] // layers
    first = pages * jnp.arange(layers, dtype=jnp.int32)[:, None]
    # Pages by number, as `write` does: with the layers as an axis the TPU compiler would turn the
    # pool around, a copy of all of it. One past the end of the pool is dropped.
    target = jnp.where(target < pages, first + target, kv.shape[0])
    moved = jnp.take(kv, first + source, axis=0, mode="clip")
    return kv.at[target].set(moved, mode="drop")
