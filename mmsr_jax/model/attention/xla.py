"""Attention in plain XLA, on any platform: the reference that the kernels are tested against."""

import jax
import jax.numpy as jnp
from jax.lax import dot_general


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention in float32 with grouped key-value heads.

    Args:
        q: [B, T, N, H].
        k, v: [B, S, K, H]; query head n reads key head n // (N / K).
        mask: [B, T, S] bool, True where attention is allowed. A row without any True gives a
            finite average, never NaN.

    Returns: [B, T, N, H] in q's dtype.
    """
    rows, queries, heads, size = q.shape
    slots, kv_heads = k.shape[1:3]
    group = heads // kv_heads
    # The queries of a group stand one under another, so that each key head is one plain product.
    # Products are spelt out because einsum swaps the operands when one is small, and then the
    # scores, by far the largest array here, are transposed twice (CPU: 4.6 ms against 2.8).
    q = q.reshape(rows, queries, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, group * queries, size)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    batch = ((0, 1), (0, 1))
    scores = dot_general(q, k, (((3,), (3,)), batch), preferred_element_type=jnp.float32)
    scores = scores.reshape(rows, kv_heads, group, queries, slots) * size**-0.5
    scores = jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    weights = weights.reshape(rows, kv_heads, group * queries, slots)
    out = dot_general(weights, v, (((3,), (2,)), batch))
    out = out.reshape(rows, kv_heads, group, queries, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, queries, heads, size)


def segment_mask(segments: jax.Array) -> jax.Array:
    """[B, T, T] bool: causal, and only within equal segment numbers [B, T]."""
    length = segments.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segments[:, :, None] == segments[:, None, :])


def attend_cached(q, kv, tables, first, own, reach):
    """Attention of new tokens to the cache, page by page with a running softmax.

    A page that a row does not reach adds exact zeros, so a row's result is the same, bit for bit,
    however many pages the longest row beside it needs: what is sampled does not depend on the
    neighbours. Pages beyond the longest row are not read, and reading is what decoding costs.

    Args:
        q: [B, T, N, H].
        kv: [L * P, S, 2K, H], tables: [B, M] int32 (see `cache.Cache`).
        first: scalar int32, the layer's first page in `kv`.
        own: [B, T] int32, slot of each query, the last one that it attends to.
        reach: scalar int32, slots in use by the longest row with a new token.

    Returns: [B, T, N, H] in q's dtype.
    """
    rows, queries, heads, size = q.shape
    block, kv_heads = kv.shape[1], kv.shape[2] // 2
    group = heads // kv_heads
    kind = q.dtype
    q = q.reshape(rows, queries, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, group * queries, size)
    own = jnp.tile(own, (1, group))[:, None, :, None]
    batch, lowest = ((0, 1), (0, 1)), jnp.finfo(jnp.float32).min

    def body(index, carry):
        top, total, out = carry
        page = jax.lax.dynamic_index_in_dim(tables, index, axis=1, keepdims=False)
        part = jnp.take(kv, first + page, axis=0, mode="clip")
        part = part.reshape(rows, block, kv_heads, 2, size).transpose(3, 0, 2, 1, 4)
        k, v = part[0], part[1]
        slot = index * block + jnp.arange(block, dtype=jnp.int32)
        seen = slot <= own
        scores = dot_general(q, k, (((3,), (3,)), batch), preferred_element_type=jnp.float32)
        scores = jnp.where(seen, scores * size**-0.5, lowest)
        higher = jnp.maximum(top, scores.max(-1, keepdims=True))
        shrink = jnp.exp(top - higher)
        weights = jnp.where(seen, jnp.exp(scores - higher), 0.0)
        part = dot_general(
            weights.astype(v.dtype), v, (((3,), (2,)), batch), preferred_element_type=jnp.float32
        )
        return higher, total * shrink + weights.sum(-1, keepdims=True), out * shrink + part

    shape = (rows, kv_heads, group * queries)
    zero = jnp.zeros((*shape, 1), jnp.float32)
    start = (zero + lowest, zero, jnp.zeros((*shape, size), jnp.float32))
    count = jnp.minimum(-(-reach // block), tables.shape[1])
    _, total, out = jax.lax.fori_loop(0, count, body, start)
    out = (out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)).astype(kind)
    out = out.reshape(rows, kv_heads, group, queries, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, queries, heads, size)
