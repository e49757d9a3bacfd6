"""Attention to the pages of the cache on TPU: JAX's ragged paged attention.

The kernel takes the tokens of many sequences one after another, each sequence with its own length
in the pool, and fetches its pages itself: nothing is gathered beforehand.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention

# Keys and values in flight at a time. Larger blocks keep the memory busier; but a block is always
# fetched whole, also for a row that needs less of it. Not yet measured on a TPU.
BLOCK_BYTES = 2**19


def attend(
    q: jax.Array,
    kv: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    *,
    kernel: Callable = ragged_paged_attention,
) -> jax.Array:
    """Softmax attention of each row's tokens to all slots up to their own.

    A row is a sequence of T tokens whether all of them are real or not: those of padding stand
    behind, so they count as tokens of the slots that follow, which no real token looks at. So the
    tokens need not be moved together, and each has a result that is finite.

    Args:
        q: [B, T, N, H]; kv: [X, S, 2K, H] as in `cache.Cache`, N a multiple of K.
        tables: [B, M] int32, pages of each row in `kv`, any valid ones beyond its length.
        starts: [B] int32, slot of each row's first token.
        kernel: another function of the same arguments, for tests without a TPU.

    Returns: [B, T, N, H] in q's dtype; what padding gets means nothing.
    """
    rows, length, heads, size = q.shape
    block, queries = blocks(kv, tables.shape[1], length)
    # Room for the padding of a full row.
    tables = jnp.pad(tables, ((0, 0), (0, -(-length // kv.shape[1]))))
    out = kernel(
        q.reshape(rows * length, heads, size),
        kv,
        starts + length,
        tables,
        jnp.arange(rows + 1, dtype=jnp.int32) * length,
        jnp.full((1,), rows, jnp.int32),
        sm_scale=size**-0.5,
        num_kv_pages_per_block=block,
        num_queries_per_block=min(queries, rows * length),
    )
    return out.reshape(q.shape)


def blocks(kv: jax.Array, pages: int, length: int) -> tuple[int, int]:
    """Pages and query tokens that are worked on at a time.

    Given to the kernel rather than left to its table of tuned sizes, which asks the devices of
    this process: a program compiled for another machine is then the one that runs there.
    """
    page = kv.shape[1] * kv.shape[2] * kv.shape[3] * kv.dtype.itemsize
    # A query block that holds several rows is computed whole for each of them.
    return max(1, min(pages, BLOCK_BYTES // page)), 8 if length < 8 else 32
