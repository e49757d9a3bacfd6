"""Attention to the pages of the cache on GPU: JAX's paged attention kernel (Triton).

Its public wrapper wants keys and values in arrays of their own, head by head, and our pool holds
them side by side. The kernel itself does not care: it is called here with the pool twice, each time
with the block of one head's keys or values, which is a matter of strides. Nothing is copied.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jax.experimental.pallas.ops.gpu import paged_attention as kernels

HEADS = 16  # query heads of a program: Triton's products have at least 16 rows
SPLITS = 16  # parts of a row at most that are read at the same time
BLOCK_BYTES = 2**14  # keys of a step


def attend(
    q: jax.Array,
    kv: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention of each row's tokens to all slots up to their own.

    The kernel is made for one token a row. More are as many rows with one table: right, but each
    reads the pages for itself.

    Args:
        q: [B, T, N, H]; kv: [X, S, 2K, H] as in `cache.Cache`, N a multiple of K.
        tables: [B, M] int32, pages of each row in `kv`, any valid ones beyond its length.
        starts: [B] int32, slot of each row's first token.
        interpret: run in Python, for tests without a GPU.

    Returns: [B, T, N, H] in q's dtype; what padding gets means nothing.
    """
    rows, length, heads, size = q.shape
    lengths = starts[:, None] + 1 + jnp.arange(length, dtype=jnp.int32)
    tables = jnp.repeat(tables, length, axis=0)
    q = q.reshape(rows * length, heads, size) * size**-0.5  # the kernel does not scale
    out = _one_token(q, kv, tables, lengths.reshape(-1, 1), interpret)
    return out.reshape(rows, length, heads, size).astype(q.dtype)


def _one_token(q, kv, tables, lengths, interpret):
    """q [B, N, H], lengths [B, 1] -> [B, N, H] float32."""
    count, heads, size = q.shape
    total, page, kv_heads = kv.shape[0], kv.shape[1], kv.shape[2] // 2
    step, splits, each = partition(page, size * kv.dtype.itemsize, tables.shape[1])
    tables = jnp.pad(tables, ((0, 0), (0, splits * each - tables.shape[1])))
    group = heads // kv_heads
    parts = -(-group // HEADS)
    padded = parts * HEADS
    q = q.reshape(count, kv_heads, group, size)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padded - group), (0, 0)))

    def pool(odd):
        """One head's keys (or values, the odd places) of all pages, wherever they lie."""
        return pl.BlockSpec(
            (total, page, None, size), lambda b, h, k: (0, 0, 2 * (h // parts) + odd, 0)
        )

    def place(b, h, k):
        return b, k, h // parts, h % parts

    # The kernel asks for its part of the row as the third number of a program.
    out, sums, tops = pl.pallas_call(
        functools.partial(
            _kernel,
            num_heads=group,
            pages_per_compute_block=step,
            mask_value=kernels.DEFAULT_MASK_VALUE,
            attn_logits_soft_cap=None,
        ),
        grid=(count, kv_heads * parts, splits),
        in_specs=[
            pl.BlockSpec((None, None, HEADS, size), lambda b, h, k: (b, h // parts, h % parts, 0)),
            pool(0),
            pool(1),
            pl.BlockSpec((None, None, each), lambda b, h, k: (b, k, 0)),
            pl.BlockSpec((None, 1), lambda b, h, k: (b, 0)),
        ],
        out_specs=[
            pl.BlockSpec((None, None, None, HEADS, size), lambda *at: (*place(*at), 0)),
            pl.BlockSpec((None, None, None, HEADS), place),
            pl.BlockSpec((None, None, None, HEADS), place),
        ],
        out_shape=[
            jax.ShapeDtypeStruct((count, splits, kv_heads, padded, size), jnp.float32),
            jax.ShapeDtypeStruct((count, splits, kv_heads, padded), jnp.float32),
            jax.ShapeDtypeStruct((count, splits, kv_heads, padded), jnp.float32),
        ],
        compiler_params=pltriton.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="paged_attention",
    )(q, kv, kv, tables.reshape(count, splits, each), lengths)
    # The parts of a row become one softmax; a part beyond its length weighs nothing.
    shrink = jnp.exp(tops - tops.max(axis=1, keepdims=True))
    out = (out * shrink[..., None]).sum(1) / (sums * shrink).sum(1)[..., None]
    return out[:, :, :group].reshape(count, heads, size)


def _kernel(q, k, v, tables, lengths, out, sums, tops, **options):
    """The kernel without the scales of quantized pages."""
    kernels.paged_attention_kernel(q, k, None, v, None, tables, lengths, out, sums, tops, **options)


def partition(page: int, token_bytes: int, pages: int) -> tuple[int, int, int]:
    """Pages of a step, parts of a row, and pages of a part (a multiple of a step).

    They depend on what a row may hold, not on what it holds: its result does not change with time.
    """
    step = max(1, BLOCK_BYTES // (page * token_bytes))
    steps = -(-pages // step)
    splits = min(SPLITS, steps)
    return step, splits, -(-steps // splits) * step
