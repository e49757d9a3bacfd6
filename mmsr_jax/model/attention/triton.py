"""Flash attention for GPU written in Pallas (Triton): segments, any width, any dtype."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as kernels

BLOCK = 128


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array,
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """Softmax attention within equal segment numbers; has a gradient.

    Args:
        q: [B, T, N, H]; k, v: [B, T, K, H] with N a multiple of K. The kernel knows no groups:
            keys and values are repeated to N heads.
        segments: [B, T] int32; padding (0) attends to padding.
        interpret: run in Python, for tests without a GPU.

    Returns: [B, T, N, H] in q's dtype.
    """
    rows, length, heads, size = q.shape
    group = heads // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    pad = padded(length) - length
    # Rows added are of segment 0: they attend to themselves at least, so nothing divides by zero.
    q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, pad)))
    out = kernels.mha(q, k, v, segments, sm_scale=size**-0.5, causal=causal, interpret=interpret)
    return out[:, :length]


def padded(length: int) -> int:
    """A multiple of the block, or for a shorter row a power of two, as Triton's tiles must be."""
    if length > BLOCK:
        return -(-length // BLOCK) * BLOCK
    return max(32, 1 << (length - 1).bit_length())
