"""Attention to the pages of the cache: every implementation against the gather in XLA."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import (
    dynamic_validate_inputs,
    ref_ragged_paged_attention,
)

from mmsr_jax.model.attention import cached, choose, paged, ragged
from mmsr_jax.model.attention.cached import bind_cached
from mmsr_jax.model.cache import Cache
from mmsr_jax.parallel.rules import Placement

ON_GPU = jax.default_backend() == "gpu"


def plain_kernel(*arrays, num_kv_pages_per_block, num_queries_per_block, **options):
    """The TPU kernel's own reference, which CPU can run (outside of jit); its checks included."""
    assert 0 < num_kv_pages_per_block <= arrays[3].shape[1] and num_queries_per_block > 0
    dynamic_validate_inputs(*arrays, **options)
    return ref_ragged_paged_attention(*arrays, **options)


RAGGED = functools.partial(ragged.attend, kernel=plain_kernel)
PAGED = functools.partial(paged.attend, interpret=True)

# (new tokens, page, query heads, key-value heads, head width)
SHAPES = [(1, 8, 4, 2, 32), (1, 32, 14, 2, 16), (1, 16, 40, 2, 16), (7, 4, 6, 1, 16)]


@dataclasses.dataclass(frozen=True)
class Example:
    """Two layers of five rows: long, empty so far, full, paused, and one that goes on in `last`."""

    q: jax.Array
    cache: Cache
    segments: jax.Array
    first: int  # page of the second layer


def example(length, page, heads, kv_heads, size, dtype="float32", slots=96) -> Example:
    rng = np.random.default_rng(length)
    rows, each = 6, slots // page
    pages = rows * each + 3
    tables = rng.permutation(pages)[: rows * each].reshape(rows, each).astype(np.int32)
    tables[1, 0] = tables[0, 0]  # two rows share a page
    tables[5] = tables[4]  # the same conversation, its next part
    lengths = np.asarray([50, 0, slots - length, slots, 20, 20 + length], np.int32)
    new = np.asarray([length, max(1, length - 2), length, 0, length, max(1, length - 3)])
    kv = rng.normal(size=(2 * pages, page, 2 * kv_heads, size))
    q = rng.normal(size=(rows, length, heads, size))
    return Example(
        jnp.asarray(q, dtype),
        Cache(jnp.asarray(kv, dtype), jnp.asarray(tables), jnp.asarray(lengths)),
        jnp.asarray(np.arange(length) < new[:, None], jnp.int32),
        pages,
    )


NOWHERE = Placement()


def attended(name, case: Example, place=NOWHERE):
    """What the implementation gives for the example, as the model calls it."""
    bound = bind_cached(name, case.cache, case.segments, heads=case.q.shape[2], place=place)
    return bound(case.q, case.cache.kv, case.first)


def use(monkeypatch, platform, capability=""):
    monkeypatch.setattr(choose, "platform_of", lambda place: platform)
    monkeypatch.setattr(choose, "capability_of", lambda place: capability)
    monkeypatch.setattr(ragged, "attend", RAGGED)
    monkeypatch.setattr(paged, "attend", PAGED)


@pytest.mark.parametrize("kernel", ["ragged", "paged"])
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_gather(kernel, dtype, tolerance, shape, monkeypatch):
    use(monkeypatch, {"ragged": "tpu", "paged": "gpu"}[kernel])
    monkeypatch.setitem(cached.REFUSALS, "ragged", lambda case: None)  # heads of 128 only
    case = example(*shape, dtype)
    found = np.asarray(attended(kernel, case), np.float32)
    exact = dataclasses.replace(
        case,
        q=case.q.astype(jnp.float32),
        cache=dataclasses.replace(case.cache, kv=case.cache.kv.astype(jnp.float32)),
    )
    wanted = np.asarray(attended("xla", exact))
    assert found.dtype == np.float32 and np.isfinite(found).all()
    real = np.asarray(case.segments) > 0
    scale = np.abs(wanted[real]).max()
    np.testing.assert_allclose(found[real], wanted[real], atol=tolerance * scale)
