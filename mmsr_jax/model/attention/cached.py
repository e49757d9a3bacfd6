"""Attention of new tokens to the pages of the cache: which implementation, and how over a mesh.

| name | runs on | serves | source |
|---|---|---|---|
| `xla` | everywhere | everything; gathers page by page | `xla.attend_cached` |
| `ragged` | TPU | heads of 128, one token a row or many | ops.tpu.ragged_paged_attention |
| `paged` | CUDA | powers of two; made for one token a row | ops.gpu.paged_attention |

`ModelConfig.cached_attention` names it. `auto` takes `ragged` on TPU and, for one token a row,
`paged` on GPU, in half precision; else `xla`.
"""

import dataclasses
import functools
import importlib
import logging
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmsr_jax.model.attention import choose
from mmsr_jax.model.attention.xla import attend_cached
from mmsr_jax.model.cache import Cache, sizes
from mmsr_jax.parallel.rules import Placement

# Of q [B, T, N, H], the pool [L * P, S, 2K, H] after this layer's keys and values were written,
# and the layer's first page.
CachedAttention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]

MOST_PAGE_BYTES = 2**15  # of one head's keys: a step of the Triton kernel reads at least a page

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CachedCase:
    """All that the choice depends on. Heads are those of one device."""

    platform: str  # "cpu", "gpu" or "tpu"
    dtype: str  # of q and the pool
    heads: int
    kv_heads: int
    head_dim: int
    length: int  # new tokens of a row
    page: int  # slots of a page
    capability: str = ""  # of a GPU, such as "9.0"; "" where there is none


def _xla(case: CachedCase) -> str | None:
    return None


def _ragged(case: CachedCase) -> str | None:
    if case.platform != "tpu":
        return f"it runs on TPU, and this program is for {case.platform}"
    if case.dtype not in ("bfloat16", "float32"):
        return f"it computes in bfloat16 or float32, the model's dtype is {case.dtype}"
    if case.head_dim != 128:
        return f"heads must be 128 wide, they are {case.head_dim}"
    # A slot's keys and values must fill whole tiles, or the compiler would pad and copy the pool.
    packed = 2 * case.kv_heads // (2 if case.dtype == "bfloat16" else 1)
    if packed not in (1, 2, 4) and packed % 8:
        return f"the {case.kv_heads} key-value heads of a device do not fill whole tiles"
    return None


def _paged(case: CachedCase) -> str | None:
    if reason := choose.no_cuda(case):
        return reason
    if case.head_dim & (case.head_dim - 1) or not 16 <= case.head_dim <= choose.MOST_HEAD_DIM:
        return (
            f"heads must be a power of two from 16 to {choose.MOST_HEAD_DIM} wide, "
            f"they are {case.head_dim}"
        )
    size = case.page * case.head_dim * jnp.dtype(case.dtype).itemsize
    if case.page & (case.page - 1) or size > MOST_PAGE_BYTES:
        return (
            f"a page must be a power of two and up to {MOST_PAGE_BYTES} bytes of a head, "
            f"it has {case.page} slots and {size} bytes"
        )
    return None


REFUSALS: dict[str, Callable[[CachedCase], str | None]] = {
    "xla": _xla,
    "ragged": _ragged,
    "paged": _paged,
}


@functools.lru_cache(maxsize=1024)
def choose_cached(wanted: str, case: CachedCase) -> str:
    """The name of the implementation; each new choice is logged once.

    Args:
        wanted: "auto", or a name from `REFUSALS` that is then taken or refused, never replaced.

    Raises:
        ValueError: the implementation asked for cannot serve this case.
    """
    if wanted == "auto":
        name = _auto(case)
    elif reason := REFUSALS[wanted](case):
        raise ValueError(
            f"cached_attention={wanted!r} cannot serve {case}: {reason}; "
            "take cached_attention='auto' (or 'xla', which serves everything)"
        )
    else:
        name = wanted
    log.info("cached attention %s (asked for: %s) for %s", name, wanted, case)
    return name


def _auto(case: CachedCase) -> str:
    # As in `choose`: whoever computes in float32 wants the exact numbers.
    if case.dtype == "float32":
        return "xla"
    if not _ragged(case):
        return "ragged"
    # Of several tokens a row each would read all pages for itself.
    if case.length == 1 and not _paged(case):
        return "paged"
    return "xla"


def bind_cached(
    wanted: str, cache: Cache, segments: jax.Array, *, heads: int, place: Placement
) -> CachedAttention:
    """Attention of the tokens that a call adds to `cache`, for every layer of the model.

    Args:
        wanted: `ModelConfig.cached_attention`.
        cache: as it was before the tokens were added.
        segments: [B, T] int32, 0 for padding, which stands behind a row's tokens. What padding
            gets is finite and means nothing.
        heads: query heads of the whole model.

    Raises:
        ValueError: `wanted` cannot serve this case (see `choose_cached`).
    """
    page, kv_heads, size = sizes(cache.kv)
    rows, length = segments.shape
    shape = (rows, length, kv_heads, size)
    own = place.of(("batch", None, "kv_heads", "head"), shape)
    split = 1 if own is None or own.spec[2] is None else place.mesh.shape[own.spec[2]]
    case = CachedCase(
        platform=choose.platform_of(place),
        dtype=cache.kv.dtype.name,
        heads=heads // split,
        kv_heads=kv_heads // split,
        head_dim=size,
        length=length,
        page=page,
        capability=choose.capability_of(place),
    )
    name = choose_cached(wanted, case)
    used = jnp.any(segments > 0, axis=1)
    if name == "xla":
        slots = cache.lengths[:, None] + jnp.arange(length, dtype=jnp.int32)
        grown = cache.lengths + jnp.sum(segments > 0, axis=1, dtype=jnp.int32)
        # Padding looks no further than the row's tokens: behind them anything may lie.
        slots = jnp.minimum(slots, jnp.maximum(grown - 1, 0)[:, None])
        # Rows without a new token (paused ones) do not count, however long they are.
        reach = jnp.max(jnp.where(used, grown, 0))
        return lambda q, kv, first: attend_cached(q, kv, cache.tables, first, slots, reach)
    # Nor do they here: they look at their first slots, whatever lies there.
    starts = jnp.where(used, cache.lengths, 0)
    # Imported by those who use it: Pallas takes its time, and jax 0.12 warns of Triton kernels.
    kernel = importlib.import_module(f"mmsr_jax.model.attention.{name}").attend
    if own is not None:
        # The compiler cannot cut a kernel. Where key-value heads do not divide over `tensor`,
        # every device holds all of them and looks with all query heads.
        by_row, by_head = PartitionSpec(own.spec[0]), PartitionSpec(None, None, own.spec[2])
        kernel = jax.shard_map(
            kernel,
            mesh=place.mesh,
            in_specs=(own.spec, by_head, by_row, by_row),
            out_specs=own.spec,
            check_vma=False,
        )
    return lambda q, kv, first: kernel(q, kv, first + cache.tables, starts)
