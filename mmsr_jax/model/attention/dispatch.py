"""From what a tower knows to a function of q, k, v: the choice, and the layout over a mesh."""

import importlib
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmsr_jax.model.attention import choose
from mmsr_jax.model.attention.xla import attend, segment_mask
from mmsr_jax.parallel.rules import Placement, spec

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def bind(
    wanted: str,
    segments: jax.Array,
    *,
    causal: bool,
    head_dim: int,
    dtype: str,
    place: Placement,
    rows: str = "batch",
) -> Attention:
    """Self-attention over rows or groups, as a function of q [B, T, N, H] and k, v [B, T, K, H].

    Args:
        wanted: `ModelConfig.attention`.
        segments: [B, T] int32 or bool: 0 for padding, else the number of the sequence within
            which a position may look. What padding sees is not defined, but finite.
        causal: positions look back only (a decoder's rows). Else a row is one group without
            order, whose members (number 1) stand first.
        rows: the logical axis that rows are laid out by.

    Raises:
        ValueError: `wanted` cannot serve this case (see `choose`).
    """
    case = choose.Case(
        platform=choose.platform_of(place),
        dtype=dtype,
        head_dim=head_dim,
        length=segments.shape[1],
        causal=causal,
        capability=choose.capability_of(place),
    )
    name = choose.choose(wanted, case)
    if name == "xla":
        # Made once, outside the layers' scan.
        mask = segment_mask(segments) if causal else _group_mask(segments)
        return lambda q, k, v: attend(q, k, v, mask)
    numbers = segments.astype(jnp.int32)
    # Imported by those who use it: Pallas takes its time, and jax 0.12 warns of the Triton kernel.
    module = importlib.import_module(f"mmsr_jax.model.attention.{name}")

    def kernel(q, k, v, numbers):
        return module.attend(q, k, v, numbers, causal=causal)

    return lambda q, k, v: _over_mesh(kernel, q, k, v, numbers, place, rows)


def _group_mask(members: jax.Array) -> jax.Array:
    """[B, T, T] bool: everyone looks at the members [B, T]."""
    members = members if members.dtype == bool else members > 0
    return jnp.broadcast_to(members[:, None, :], members.shape + members.shape[1:])


def _over_mesh(kernel, q, k, v, numbers, place: Placement, rows: str) -> jax.Array:
    """The compiler cannot cut a kernel, so each device is given its rows and heads by hand."""
    if place.mesh is None or place.mesh.size == 1:
        return kernel(q, k, v, numbers)
    # Rows that do not divide are filled up: left whole, every device would do all of them.
    axis, count = spec((rows,), place.rules)[0], q.shape[0]
    extra = 0 if axis is None else -count % place.mesh.shape[axis]
    if extra:
        q, k, v, numbers = (
            jnp.pad(x, ((0, extra),) + ((0, 0),) * (x.ndim - 1)) for x in (q, k, v, numbers)
        )
    own = place.of((rows, None, "heads", None), q.shape).spec
    copies = kv_copies(q.shape[2], k.shape[2], 1 if own[2] is None else place.mesh.shape[own[2]])
    if copies > 1:
        k, v = jnp.repeat(k, copies, axis=2), jnp.repeat(v, copies, axis=2)
    by_row = PartitionSpec(own[0], None)
    out = jax.shard_map(
        kernel, mesh=place.mesh, in_specs=(own, own, own, by_row), out_specs=own, check_vma=False
    )(q, k, v, numbers)
    return out[:count]


def kv_copies(heads: int, kv_heads: int, shards: int) -> int:
    """How often each key-value head is repeated so that `shards` devices each hold their own.

    With 2 key-value heads over 4 devices every head is held twice: query head n still finds its
    key head at n // (heads / (copies * kv_heads)). `shards` divides `heads`.
    """
    copies = shards // math.gcd(kv_heads, shards)
    return copies if heads % (kv_heads * copies) == 0 else heads // kv_heads
