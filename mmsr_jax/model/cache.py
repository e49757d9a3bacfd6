"""Keys and values of the tokens seen so far, one line of slots per row."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Slot s of row b holds the row's s-th token; slots from `lengths[b]` on are free."""

    k: jax.Array  # [L, B, S, K, H]
    v: jax.Array  # [L, B, S, K, H]
    lengths: jax.Array  # [B] int32


def target_slots(lengths: jax.Array, segments: jax.Array, slots: int) -> jax.Array:
    """[B, T] slot of each new token; padding (segment 0) gets slots past the end: dropped."""
    steps = jnp.arange(segments.shape[1], dtype=jnp.int32)
    return jnp.where(segments > 0, lengths[:, None] + steps, slots + steps)


def write(store: jax.Array, layer: jax.Array, slots: jax.Array, new: jax.Array) -> jax.Array:
    """Put new [B, T, K, H] into store [L, B, S, K, H] at (layer, row, slots [B, T])."""
    rows = jnp.arange(new.shape[0])[:, None]
    return store.at[layer, rows, slots].set(
        new.astype(store.dtype), mode="drop", unique_indices=True
    )
