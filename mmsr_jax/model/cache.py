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


def read(store: jax.Array, layer: jax.Array, extent: int) -> jax.Array:
    """[B, extent, K, H]: the first `extent` slots of one layer."""
    size = (1, store.shape[1], extent, *store.shape[3:])
    return jax.lax.dynamic_slice(store, (layer, 0, 0, 0, 0), size)[0]


def extents(slots: int) -> tuple[int, ...]:
    """Numbers of leading slots that attention may be limited to: six at the most, 32 apart or more.

    Early in a conversation most slots are empty; reading them is what decoding spends its time on.
    """
    step = max(32, -(-slots // (6 * 32)) * 32)
    return (*range(step, slots, step), slots)
