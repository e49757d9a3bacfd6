"""cuDNN's flash attention on GPU, for rows that hold one sequence each."""

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, *, causal: bool
) -> jax.Array:
    """Softmax attention within equal segment numbers; has a gradient.

    cuDNN takes a length per row, no segment numbers (jax keeps its packed layout private), and a
    mask would be as large as the scores. So a row's tokens must stand first and belong to one
    sequence. Whether they do is data: the device looks, and a causal batch with a packed row goes
    to the Triton kernel instead. A group without order (a window, a frame) is never packed.

    Args:
        q: [B, T, N, H] bfloat16 or float16; k, v: [B, T, K, H].
        segments: [B, T] int32, 0 for padding.

    Returns: [B, T, N, H] in q's dtype; padding is finite, and means nothing.
    """

    def whole(q, k, v, segments):
        # An empty row looks at its first zero: a softmax over nothing is not a number.
        lengths = jnp.maximum(jnp.sum(segments > 0, axis=1, dtype=jnp.int32), 1)
        return jax.nn.dot_product_attention(
            q, k, v, is_causal=causal, implementation="cudnn",
            query_seq_lengths=lengths, key_value_seq_lengths=lengths,
        )  # fmt: skip

    if not causal:
        return whole(q, k, v, segments)

    from mmsr_jax.model.attention import triton

    def packed(q, k, v, segments):
        return triton.attend(q, k, v, segments, causal=True)

    return jax.lax.cond(single(segments), whole, packed, q, k, v, segments)


def single(segments: jax.Array) -> jax.Array:
    """Scalar bool: in every row the tokens come first and are of one sequence."""
    tokens = segments > 0
    first = segments[:, :1]
    return jnp.all(~tokens | (segments == first)) & jnp.all(tokens[:, :-1] | ~tokens[:, 1:])
