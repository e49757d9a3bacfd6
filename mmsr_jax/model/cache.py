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

    One array holds all layers, page p of layer l at l * P + p. Within a page there are two orders:

    - slots first, [L * P, S, 2K, H], a head's key at an even place and its value behind it: what
      `ragged_paged_attention` on TPU reads, without cutting a layer out of a stack;
    - heads first, [L * P, 2, K, S, H], keys then values: on one CPU device, where a page's keys of
      a head are then copied as one line and multiplied as they lie.
    """

    kv: jax.Array  # [L * P, S, 2K, H], or [L * P, 2, K, S, H]
    tables: jax.Array  # [B, M] int32 pages of each row; beyond its length any valid number
    lengths: jax.Array  # [B] int32 tokens of each row that are in the pool

    @property
    def slots(self) -> int:
        """Tokens that a row can hold."""
        return self.tables.shape[1] * sizes(self.kv)[0]


def pool_shape(pages: int, page: int, kv_heads: int, head_dim: int, first: bool):
    """Of `pages` pages in all layers together."""
    if first:
        return (pages, 2, kv_heads, page, head_dim)
    return (pages, page, 2 * kv_heads, head_dim)


def heads_first(kv) -> bool:
    """Which of the two orders a pool is in."""
    return kv.ndim == 5


def sizes(kv) -> tuple[int, int, int]:
    """Slots of a page, key-value heads and their width of a pool in either order."""
    if heads_first(kv):
        return kv.shape[3], kv.shape[2], kv.shape[4]
    return kv.shape[1], kv.shape[2] // 2, kv.shape[3]


def places(cache: Cache, segments: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Page (within a layer) and slot of each new token, both [B, T].

    Padding (segment 0) and what is past a row's last slot get a negative page: see `write`.
    """
    size, total = sizes(cache.kv)[0], cache.slots
    at = cache.lengths[:, None] + jnp.arange(segments.shape[1], dtype=jnp.int32)
    page = jnp.take_along_axis(cache.tables, jnp.minimum(at, total - 1) // size, axis=1)
    return jnp.where((segments > 0) & (at < total), page, -1), at % size


def write(kv: jax.Array, first: jax.Array, page, slot, k: jax.Array, v: jax.Array) -> jax.Array:
    """Puts k, v [B, T, K, H] of the layer whose pages start at `first` to their `places`."""
    rows, length, heads, size = k.shape
    # A negative index would count from the end: past the end it is dropped.
    index = jnp.where(page < 0, kv.shape[0], first + page)
    if heads_first(kv):
        new = jnp.stack([k, v], axis=2).astype(kv.dtype)
        return kv.at[index, :, :, slot].set(new, mode="drop")
    new = jnp.stack([k, v], axis=3).reshape(rows, length, 2 * heads, size).astype(kv.dtype)
    return kv.at[index, slot].set(new, mode="drop")


def read(kv: jax.Array, pages: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Keys and values, both [B, K, M * S, H], of pages [B, M] of the whole pool."""
    (rows, count), (page, heads, size) = pages.shape, sizes(kv)
    shape = (rows, heads, count * page, size)
    if heads_first(kv):
        # By lines of a page's slots of one head: twice as fast as by pages that are turned around.
        lines = kv.reshape(-1, page * size)
        line = pages[:, None] * (2 * heads) + jnp.arange(heads, dtype=jnp.int32)[:, None]
        k, v = (jnp.take(lines, line + at, axis=0, mode="clip") for at in (0, heads))
        return k.reshape(shape), v.reshape(shape)
    part = jnp.take(kv, pages, axis=0, mode="clip").reshape(rows, count * page, heads, 2, size)
    part = part.transpose(3, 0, 2, 1, 4)
    return part[0], part[1]


def sharding(place: Placement, shape: tuple[int, ...]):
    """How a pool of `shape` lies on a mesh: heads are split, pages are not.

    Any row may hold any page. A key and its value stay together: whole heads are split or nothing.
    """
    if len(shape) == 5:
        return place.of((None, None, "kv_heads", "length", "head"), shape)
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
