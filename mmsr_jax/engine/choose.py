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

    def noise(key, count):
        return jax.random.gumbel(jax.random.fold_in(key, count), (logits.shape[-1],))

    # Gumbel-max: argmax of logits + noise is a sample; without noise it is the greedy choice, and
    # drawing noise costs more than the rest of this.
    noisy = jax.lax.cond(greedy, lambda: scaled, lambda: scaled + jax.vmap(noise)(keys, counts))
    # The first of the largest. `jnp.argmax`, a reduction of pairs, takes XLA on CPU several times
    # as long as two of numbers. As there, what is no number counts as the largest.
    ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 1)
    largest = (noisy == noisy.max(axis=-1, keepdims=True)) | jnp.isnan(noisy)
    token = jnp.where(largest, ids, logits.shape[-1] - 1).min(axis=-1)
    # As `log_softmax` has it: the largest is subtracted first, and large logits lose no digits.
    top = scaled.max(axis=-1, keepdims=True)
    chosen = (jnp.take_along_axis(scaled, token[:, None], axis=-1) - top)[:, 0]
    return token, chosen - jnp.log(jnp.exp(scaled - top).sum(axis=-1))
