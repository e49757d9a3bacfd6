"""Splash attention, JAX's flash attention for TPU: blocks above the diagonal are never visited.

Segment numbers mask what else is forbidden; they cost nothing and save nothing.
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as kernels,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)

LANES = 128  # a head narrower than the vector registers is padded to their width


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
        q: [B, T, N, H]; k, v: [B, T, K, H] with N a multiple of K.
        segments: [B, T] int32; padding (0) attends to padding.
        interpret: run in Python, for tests without a TPU.

    Returns: [B, T, N, H] in q's dtype.
    """
    rows, length, heads, size = q.shape
    long, block = tiles(length)
    q = q * size**-0.5  # the kernel does not scale
    # Zeros change no score, and the values' padding is cut off again. Rows added are of segment
    # 0: where every other row is a token they attend to one another.
    pad = ((0, 0), (0, long - length), (0, 0), (0, -size % LANES))
    q, k, v = (jnp.pad(x, pad).transpose(0, 2, 1, 3) for x in (q, k, v))
    segments = jnp.pad(segments, ((0, 0), (0, long - length)))
    kind = masks.CausalMask if causal else masks.FullMask
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([kind((long, long))] * heads),
        block_sizes=kernels.BlockSizes(
            block_q=block, block_kv=block, block_q_dkv=block, block_kv_dkv=block,
            block_q_dq=block, block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip
    out = jax.vmap(lambda q, k, v, s: kernel(q, k, v, kernels.SegmentIds(s, s)))(q, k, v, segments)
    return out.transpose(0, 2, 1, 3)[:, :length, :, :size].astype(v.dtype)


def tiles(length: int) -> tuple[int, int]:
    """The padded length, and the side of the blocks that it is cut into.

    Long rows are padded to a multiple of 512, the block that keeps the matrix units busy; short
    ones, of which that would be too large a part, to a multiple of 128.
    """
    unit = 128 if length <= 1024 else 512
    long = -(-length // unit) * unit
    return long, next(block for block in (512, 384, 256, 128) if long % block == 0)
