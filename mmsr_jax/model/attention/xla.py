"""Attention in plain XLA, on any platform: the reference that the kernels are tested against."""

import jax
import jax.numpy as jnp
from jax.lax import dot_general

from mmsr_jax.model.cache import read, sizes

SCORES = 2**20  # of one layer at a time, where that leaves blocks of QUERIES: what caches hold
QUERIES = 128  # a block, at least
SLOTS = 384  # of the cache at a time, at most
BATCH = ((0, 1), (0, 1))


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
    kv_heads = k.shape[2]
    q = q.reshape(rows, queries, kv_heads, heads // kv_heads, size).transpose(0, 2, 3, 1, 4)
    out = _attend(q, k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), mask)
    return out.transpose(0, 3, 1, 2, 4).reshape(rows, queries, heads, size)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """q [B, K, G, T, H], k and v [B, K, S, H], mask [B, T, S]: [B, K, G, T, H].

    The backward pass computes the scores anew and takes the softmax's inner sums from the output,
    [T, H] instead of [T, S] (both as in FlashAttention, arXiv 2205.14135). Left to itself, XLA on
    CPU keeps several arrays of scores and takes three times as long for the frames of the vision
    tower.
    """
    return _attend_forward(q, k, v, mask)[0]


def _attend_forward(q, k, v, mask):
    def part(q, mask):
        scores = _scores(q, k, mask)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out = _product(_flat(weights.astype(v.dtype)), v, 3, 2).reshape(q.shape)
        return (out / total).astype(q.dtype), top, total

    blocks, length = _blocks(q, k), q.shape[3]
    if blocks == 1:
        out, top, total = part(q, mask)
    else:
        parts = jax.lax.map(lambda x: part(*x), (_cut(q, 3, blocks), _cut(mask, 1, blocks)))
        out, top, total = (_join(x, length) for x in parts)
    return out, (q, k, v, mask, out, top, total)


def _attend_backward(kept, gradient):
    q, k, v, mask, out, top, total = kept
    scale, blocks = q.shape[-1] ** -0.5, _blocks(q, k)
    # Whatever can be done to arrays of [T, H] is not done to arrays of [T, S].
    gradient = gradient.astype(jnp.float32) / total
    mean = (gradient * out.astype(jnp.float32)).sum(-1, keepdims=True)
    gradient = gradient.astype(v.dtype)

    def part(q, mask, top, mean, gradient):
        weights = jnp.exp(_scores(q, k, mask) - top)
        inner = _product(_flat(gradient), v, 3, 3).reshape(weights.shape) - mean
        # A row without any True has weights where it has no scores to change.
        inner = jnp.where(mask[:, None, None], weights * inner, 0.0).astype(q.dtype)
        dq = (_product(_flat(inner), k, 3, 2) * scale).astype(q.dtype).reshape(q.shape)
        dk = _product(_flat(inner), _flat(q), 2, 2)
        return dq, dk, _product(_flat(weights.astype(v.dtype)), _flat(gradient), 2, 2)

    def body(sums, x):
        dq, dk, dv = part(*x)
        return (sums[0] + dk, sums[1] + dv), dq

    if blocks == 1:
        dq, dk, dv = part(q, mask, top, mean, gradient)
    else:
        masks, (q, top, mean, gradient) = (
            _cut(mask, 1, blocks),
            (_cut(x, 3, blocks) for x in (q, top, mean, gradient)),
        )
        zero = (jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32))
        (dk, dv), dq = jax.lax.scan(body, zero, (q, masks, top, mean, gradient))
        dq = _join(dq, out.shape[3])
    return dq, (dk * scale).astype(k.dtype), dv.astype(v.dtype), None


_attend.defvjp(_attend_forward, _attend_backward)


def _scores(q: jax.Array, k: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, K, G, T, S] float32, lowest where not allowed."""
    scores = _product(_flat(q), k, 3, 3).reshape(q.shape[:4] + k.shape[2:3]) * q.shape[-1] ** -0.5
    return jnp.where(mask[:, None, None], scores, jnp.finfo(jnp.float32).min)


def _flat(x: jax.Array) -> jax.Array:
    """The queries of a group one under another: each key head is one plain product."""
    return x.reshape(x.shape[:2] + (x.shape[2] * x.shape[3], x.shape[4]))


def _product(a: jax.Array, b: jax.Array, of_a: int, of_b: int) -> jax.Array:
    """Summed over these axes, float32.

    Spelt out because einsum swaps the operands when one is small, and then the scores, by far the
    largest array here, are transposed twice (CPU: 4.6 ms against 2.8).
    """
    return dot_general(a, b, (((of_a,), (of_b,)), BATCH), preferred_element_type=jnp.float32)


def _blocks(q: jax.Array, k: jax.Array) -> int:
    """In how many blocks of queries the scores are computed."""
    queries = q.shape[3]
    few = q.size // q.shape[-1] * k.shape[2] <= SCORES
    return 1 if few else -(-queries // QUERIES)


def _cut(x: jax.Array, axis: int, blocks: int) -> jax.Array:
    """[..., T, ...] to [blocks, ..., T / blocks, ...], filled up with zeros."""
    each = -(-x.shape[axis] // blocks)
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, each * blocks - x.shape[axis])
    x = jnp.pad(x, fill)
    x = x.reshape(x.shape[:axis] + (blocks, each) + x.shape[axis + 1 :])
    return jnp.moveaxis(x, axis, 0)


def _join(x: jax.Array, length: int) -> jax.Array:
    """Undoes `_cut` at axis 3."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(x.shape[:3] + (-1,) + x.shape[5:])[:, :, :, :length]


def segment_mask(segments: jax.Array) -> jax.Array:
    """[B, T, T] bool: causal, and only within equal segment numbers [B, T]."""
    length = segments.shape[1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segments[:, :, None] == segments[:, None, :])


def attend_cached(q, kv, tables, first, own, reach):
    """Attention of new tokens to the cache, block by block of its slots with a running softmax.

    A block that a row does not reach adds exact zeros, so a row's result is the same, bit for bit,
    however many blocks the longest row beside it needs: what is sampled does not depend on the
    neighbours. Blocks beyond the longest row are not read, and reading is what decoding costs.

    Args:
        q: [B, T, N, H].
        kv: the pool in either order, tables: [B, M] int32 (see `cache.Cache`).
        first: scalar int32, the layer's first page in `kv`.
        own: [B, T] int32, slot of each query, the last one that it attends to.
        reach: scalar int32, slots in use by the longest row with a new token.

    Returns: [B, T, N, H] in q's dtype.
    """
    rows, queries, heads, size = q.shape
    page, kv_heads, _ = sizes(kv)
    group = heads // kv_heads
    kind = q.dtype
    q = q.reshape(rows, queries, kv_heads, group, size).transpose(0, 2, 3, 1, 4)
    q = q.reshape(rows, kv_heads, group * queries, size)
    last = own.max(axis=1, keepdims=True)
    own = jnp.tile(own, (1, group))[:, None, :, None]
    lowest = jnp.finfo(jnp.float32).min
    most = -(-tables.shape[1] * page // SLOTS)  # blocks of a full row, as equal as can be
    each = -(-tables.shape[1] // most)
    tables = jnp.pad(tables, ((0, 0), (0, most * each - tables.shape[1])))
    block = each * page

    def look(index):
        """Scores and values of a block."""
        pages = jax.lax.dynamic_slice_in_dim(tables, index * each, each, axis=1)
        k, v = read(kv, first + pages)
        slot = index * block + jnp.arange(block, dtype=jnp.int32)
        # What lies beyond a row is somebody else's: 0 times its infinities would be no number.
        v = jnp.where((slot <= last)[:, None, :, None], v, 0)
        return jnp.where(slot <= own, _product(q, k, 3, 3) * size**-0.5, lowest), v

    def weigh(scores, v, top):
        weights = jnp.exp(scores - top)
        return weights.sum(-1, keepdims=True), _product(weights.astype(v.dtype), v, 3, 2)

    def body(index, carry):
        top, total, out = carry
        scores, v = look(index)
        higher = jnp.maximum(top, scores.max(-1, keepdims=True))
        shrink = jnp.exp(top - higher)
        more, part = weigh(scores, v, higher)
        return higher, total * shrink + more, out * shrink + part

    # Every query sees a slot of the first block, so that masked scores weigh nothing from then on.
    scores, v = look(0)
    top = scores.max(-1, keepdims=True)
    total, out = weigh(scores, v, top)
    if most > 1:
        count = jnp.minimum(-(-reach // block), most)
        _, total, out = jax.lax.fori_loop(1, count, body, (top, total, out))
    out = (out / total).astype(kind)
    out = out.reshape(rows, kv_heads, group, queries, size).transpose(0, 3, 1, 2, 4)
    return out.reshape(rows, queries, heads, size)
