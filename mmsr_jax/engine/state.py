"""What lives on the device between two calls of the engine's programs.

One invariant makes the rest simple: a row always has exactly one *pending* token, whose keys and
values are not in the cache yet. Prefill and extension feed all but the last token and leave that
one pending; a decoding step feeds the pending token and samples the next.

Letters: `B` rows, `N` tokens a turn at most, `M` rows of the picture-feature pool, `D` width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mmsr_jax.model import qwen2_5_vl as qwen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    cache: qwen.Cache
    pending: jax.Array  # [B] int32, token to feed next
    position: jax.Array  # [B] int32, its M-RoPE position (text: the same on all three axes)
    active: jax.Array  # [B] bool, the row is in the middle of a turn
    keys: jax.Array  # [B] typed PRNG keys, one stream a trajectory
    sampled: jax.Array  # [B] int32, tokens sampled so far in the trajectory
    budget: jax.Array  # [B] int32, tokens the row may sample in this turn
    turn_ids: jax.Array  # [B, N] int32, what the row sampled in this turn
    turn_logprobs: jax.Array  # [B, N] float32
    turn_length: jax.Array  # [B] int32
    features: jax.Array  # [M, D] float, pool of merged picture features


def empty(config, rows: int, slots: int, turn_tokens: int, features: int, mesh=None) -> State:
    """A state with no trajectory in it. `config` is the ModelConfig."""

    # One array a field: donated buffers must not be shared.
    def zeros(dtype=jnp.int32):
        return jnp.zeros((rows,), dtype)

    state = State(
        cache=qwen.init_cache(config, rows, slots, mesh=mesh),
        pending=zeros(),
        position=zeros(),
        active=zeros(bool),
        keys=jax.random.split(jax.random.key(0), rows),
        sampled=zeros(),
        budget=zeros(),
        turn_ids=jnp.zeros((rows, turn_tokens), jnp.int32),
        turn_logprobs=jnp.zeros((rows, turn_tokens), jnp.float32),
        turn_length=zeros(),
        features=jnp.zeros((features, config.text.hidden), jnp.dtype(config.dtype)),
    )
    # Committed like every later state: otherwise the second call of a program compiles it anew.
    if mesh is None:
        return jax.device_put(state, jax.local_devices()[0])
    everywhere = NamedSharding(mesh, PartitionSpec())
    rest = jax.device_put(dataclasses.replace(state, cache=None), everywhere)
    return dataclasses.replace(rest, cache=state.cache)
