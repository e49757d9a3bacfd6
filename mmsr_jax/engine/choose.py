"""Logits to a token and its log-probability.

Letters: `B` rows, `V` vocabulary.
"""

import jax
import jax.numpy as jnp


def choose(logits, keys, counts, temperature):
    """Samples one token a row; at temperature 0 takes the likeliest.

    Every row has its own random stream: draw number `counts[b]` of `keys[b]`. What a row samples
    therefore does not depend on the rows beside it.

    Args:
      logits: [B, V] float32.
      keys: [B] typed PRNG keys.
      counts: [B] int32, tokens that the row has sampled so far.
      temperature: scalar float32 >= 0.

    Returns:
      token [B] int32, and its log-probability [B] float32 under softmax(logits / temperature)
      (under softmax(logits) at temperature 0): the quantity that the trainer computes as well.
    """
    greedy = temperature <= 0
    scaled = logits / jnp.where(greedy, 1.0, temperature)
    logprobs = jax.nn.log_softmax(scaled, axis=-1)

    def noise(key, count):
        return jax.random.gumbel(jax.random.fold_in(key, count), (logits.shape[-1],))

    # Gumbel-max: argmax of logits + noise is a sample; without noise it is the greedy choice, and
    # drawing noise costs more than the rest of this.
    noisy = jax.lax.cond(greedy, lambda: scaled, lambda: scaled + jax.vmap(noise)(keys, counts))
    token = jnp.argmax(noisy, axis=-1).astype(jnp.int32)
    return token, jnp.take_along_axis(logprobs, token[:, None], axis=-1)[:, 0]
