"""Log-probabilities of given tokens without holding [B, T, V] logits.

Letters: `B` rows, `T` tokens, `D` width, `V` vocabulary, `C` tokens a chunk.
"""

import jax
import jax.numpy as jnp

from mmsr_jax.model import qwen2_5_vl as qwen


def token_logprobs(graph, params, inputs: qwen.Inputs, targets, temperature=1.0, chunk=2048):
    """log softmax(token_logits / temperature) at `targets`, and the entropy, by chunks of tokens.

    A chunk's logits are made, used and thrown away, and made again in the backward pass:
    memory is chunk * V instead of B * T * V.

    Args:
      targets: [B, T] int32. One that is never sampled gets a huge negative number, finite.
      chunk: tokens a chunk at the most.

    Returns:
      logprobs [B, T] float32, entropy [B, T] float32 (no gradient flows through the latter).
    """
    hidden = qwen.forward(graph, params, inputs, logits=False).hidden
    rows, length, width = hidden.shape
    total = rows * length
    count = -(-total // chunk)
    chunk = -(-total // count)  # chunks of one size, with as little padding as there can be
    pad = count * chunk - total
    flat = jnp.pad(hidden.reshape(total, width), ((0, pad), (0, 0)))
    ids = jnp.pad(targets.reshape(total), (0, pad))

    @jax.checkpoint
    def one(piece):
        hidden, ids = piece
        logits = qwen.token_logits(graph, params, hidden) / temperature
        log_all = jax.nn.log_softmax(logits, axis=-1)
        chosen = jnp.take_along_axis(log_all, ids[:, None], axis=-1)[:, 0]
        constant = jax.lax.stop_gradient(log_all)
        return chosen, -(jnp.exp(constant) * constant).sum(-1)

    if count == 1:
        chosen, entropy = one((flat, ids))
    else:
        chosen, entropy = jax.lax.map(
            one, (flat.reshape(count, chunk, width), ids.reshape(count, chunk))
        )
    chosen = chosen.reshape(-1)[:total].reshape(rows, length)
    return chosen, entropy.reshape(-1)[:total].reshape(rows, length)
