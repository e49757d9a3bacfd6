"""The engine's jitted programs: encode pictures, extend rows, copy rows, decode until a pause.

Nothing about a picture's grid or a text's length enters a program as a shape: the host pads to
the few sizes named in EngineConfig, so each program compiles once.

Letters: `B` rows of the engine, `R` rows of one extension, `T` tokens of one extension chunk,
`M` rows of the feature pool, `S` cache slots.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from mmsr_jax.engine.choose import choose
from mmsr_jax.engine.state import State
from mmsr_jax.model import qwen2_5_vl as qwen


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Extension:
    """Tokens to append to some rows. A row index of `B` (out of range) marks padding."""

    rows: jax.Array  # [R] int32
    ids: jax.Array  # [R, T] int32
    positions: jax.Array  # [3, R, T] int32
    segments: jax.Array  # [R, T] int32, 1 for a token, 0 for padding at the end
    image_index: jax.Array  # [R, T] int32, row of the feature pool, -1 for text
    fresh: jax.Array  # [R] bool, forget what the row's cache holds
    wake: jax.Array  # [R] bool, last chunk: the row starts a turn
    pending: jax.Array  # [R] int32, first token of the turn's input (used when waking)
    position: jax.Array  # [R] int32, its position
    budget: jax.Array  # [R] int32, tokens of the turn at most
    keys: jax.Array  # [R] typed PRNG keys
    sampled: jax.Array  # [R] int32, tokens the trajectory has sampled before


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def encode(graph, params, features, vision, offset):
    """Writes the features of a bucket of pictures into the pool at row `offset`."""
    encoded = qwen.encode_images(graph, params, vision)
    return jax.lax.dynamic_update_slice(features, encoded.astype(features.dtype), (offset, 0))


@functools.partial(jax.jit, static_argnums=(0,), donate_argnums=(2,))
def extend(graph, params, state: State, piece: Extension) -> State:
    """Feeds a chunk of tokens to the rows `piece.rows`; rows that wake become active."""
    rows = piece.rows
    lengths = jnp.where(piece.fresh, 0, jnp.take(state.cache.lengths, rows, mode="clip"))
    part = qwen.Cache(
        k=jnp.take(state.cache.k, rows, axis=1, mode="clip"),
        v=jnp.take(state.cache.v, rows, axis=1, mode="clip"),
        lengths=lengths,
    )
    inputs = qwen.Inputs(
        ids=piece.ids,
        positions=piece.positions,
        segments=piece.segments,
        image_index=piece.image_index,
        vision=None,
    )
    out = qwen.forward(graph, params, inputs, part, features=state.features, logits=False).cache

    def put(old, new):
        return old.at[rows].set(new, mode="drop")

    def wake(old, new):
        return old.at[jnp.where(piece.wake, rows, old.shape[0])].set(new, mode="drop")

    return dataclasses.replace(
        state,
        cache=qwen.Cache(
            k=state.cache.k.at[:, rows].set(out.k, mode="drop"),
            v=state.cache.v.at[:, rows].set(out.v, mode="drop"),
            lengths=put(state.cache.lengths, out.lengths),
        ),
        pending=wake(state.pending, piece.pending),
        position=wake(state.position, piece.position),
        active=wake(state.active, True),
        keys=wake(state.keys, piece.keys),
        sampled=wake(state.sampled, piece.sampled),
        budget=wake(state.budget, piece.budget),
        turn_length=wake(state.turn_length, 0),
    )


@functools.partial(jax.jit, donate_argnums=(0,))
def fork(state: State, source, keys) -> State:
    """Row b becomes a copy of row `source[b]` with the stream `keys[b]`: one prefill a group."""

    def copy(x):
        return jnp.take(x, source, axis=0)

    return dataclasses.replace(
        state,
        cache=qwen.Cache(
            k=jnp.take(state.cache.k, source, axis=1),
            v=jnp.take(state.cache.v, source, axis=1),
            lengths=copy(state.cache.lengths),
        ),
        pending=copy(state.pending),
        position=copy(state.position),
        active=copy(state.active),
        keys=keys,
        sampled=copy(state.sampled),
        budget=copy(state.budget),
        turn_length=copy(state.turn_length),
    )


@functools.partial(jax.jit, static_argnums=(0, 4, 5), donate_argnums=(2,))
def decode(graph, params, state: State, temperature, eos_ids: tuple[int, ...], steps: int):
    """Samples until every row has paused, or for `steps` tokens.

    A row pauses by itself when it samples one of `eos_ids`, has used its budget, or has filled
    its cache slots; the others go on.

    Returns: the new state and the number of steps taken (scalar int32).
    """
    rows, slots = state.pending.shape[0], state.cache.k.shape[2]
    every = jnp.arange(rows)
    stops = jnp.asarray(eos_ids, jnp.int32)

    def more(carry):
        step, state = carry
        return (step < steps) & state.active.any()

    def body(carry):
        step, state = carry
        active = state.active
        inputs = qwen.Inputs(
            ids=state.pending[:, None],
            positions=jnp.broadcast_to(state.position[None, :, None], (3, rows, 1)),
            segments=active[:, None].astype(jnp.int32),
            image_index=jnp.full((rows, 1), -1, jnp.int32),
            vision=None,
        )
        out = qwen.forward(graph, params, inputs, state.cache, logits=False)
        logits = qwen.token_logits(graph, params, out.hidden[:, 0])
        token, logprob = choose(logits, state.keys, state.sampled, temperature)
        # Rows that are not active write out of range, which JAX drops.
        slot = jnp.where(active, state.turn_length, state.turn_ids.shape[1])
        grow = active.astype(jnp.int32)
        length = state.turn_length + grow
        done = (token[:, None] == stops[None]).any(-1) | (length >= state.budget)
        state = dataclasses.replace(
            state,
            cache=out.cache,
            pending=jnp.where(active, token, state.pending),
            position=state.position + grow,
            active=active & ~done & (out.cache.lengths < slots),
            sampled=state.sampled + grow,
            turn_ids=state.turn_ids.at[every, slot].set(token, mode="drop"),
            turn_logprobs=state.turn_logprobs.at[every, slot].set(logprob, mode="drop"),
            turn_length=length,
        )
        return step + 1, state

    steps_taken, state = jax.lax.while_loop(more, body, (jnp.int32(0), state))
    return state, steps_taken
