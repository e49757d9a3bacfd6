"""Attention to the pages of the cache: every implementation against the gather in XLA."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import (
    dynamic_validate_inputs,
    ref_ragged_paged_attention,
)

from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.model.attention import cached, choose, paged, ragged
from mmsr_jax.model.attention.cached import bind_cached
from mmsr_jax.model.cache import Cache, heads_first, sharding
from mmsr_jax.model.config import preset
from mmsr_jax.parallel import topology
from mmsr_jax.parallel.mesh import MeshConfig
from mmsr_jax.parallel.rules import ROLLOUT_RULES, Placement

ON_GPU = jax.default_backend() == "gpu"
QUICK = {"xla_backend_optimization_level": 0}


def plain_kernel(q, kv, *plan, num_kv_pages_per_block, num_queries_per_block, **options):
    """The TPU kernel's own reference, which CPU can run; it and the checks need a known plan."""
    assert 0 < num_kv_pages_per_block <= plan[1].shape[1] and num_queries_per_block > 0
    plan = [np.asarray(part) for part in plan]
    dynamic_validate_inputs(q, kv, *plan, **options)
    run = jax.jit(
        lambda q, kv: ref_ragged_paged_attention(q, kv, *plan, **options),
        compiler_options=QUICK,
    )
    return run(q, kv)


RAGGED = functools.partial(ragged.attend, kernel=plain_kernel)
PAGED = functools.partial(paged.attend, interpret=True)


@dataclasses.dataclass(frozen=True)
class Example:
    """Two layers; rows: long, new, full, paused, and two parts of one conversation."""

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


def other_order(kv):
    """A pool [X, S, 2K, H] heads first: [X, 2, K, S, H]."""
    pages, page, both, size = kv.shape
    return kv.reshape(pages, page, both // 2, 2, size).transpose(0, 3, 2, 1, 4)


def attended(name, case: Example):
    """What the implementation gives for the example, as the model calls it."""

    def run(q, cache, segments):
        bound = bind_cached(name, cache, segments, heads=q.shape[2], place=Placement())
        return bound(q, cache.kv, case.first)

    if name != "ragged":  # its reference has to know the plan
        run = jax.jit(run, compiler_options=QUICK)
    return run(case.q, case.cache, case.segments)


def use(monkeypatch, platform, capability=""):
    monkeypatch.setattr(choose, "platform_of", lambda place: platform)
    monkeypatch.setattr(choose, "capability_of", lambda place: capability)
    monkeypatch.setattr(ragged, "attend", RAGGED)
    monkeypatch.setattr(paged, "attend", PAGED)


# New tokens, page, query heads, key-value heads, head width.
@pytest.mark.parametrize(
    "kernel, dtype, shape",
    [
        ("ragged", "float32", (1, 32, 14, 2, 16)),
        ("ragged", "float32", (7, 4, 6, 1, 16)),
        ("ragged", "bfloat16", (5, 8, 4, 2, 32)),
        ("paged", "float32", (1, 8, 4, 2, 32)),
        ("paged", "float32", (1, 16, 40, 2, 16)),  # groups of 20 heads: two programs each
        ("paged", "float32", (7, 4, 6, 1, 16)),
        ("paged", "bfloat16", (1, 32, 14, 2, 16)),
    ],
)
def test_kernels_equal_the_gather(kernel, dtype, shape, monkeypatch):
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
    np.testing.assert_allclose(
        found[real], wanted[real], atol={"float32": 2e-6, "bfloat16": 2e-2}[dtype] * scale
    )


def test_what_is_not_finite_behind_a_rows_tokens_stays_there():
    """Padding of a part stands before slots that were somebody else's."""
    case = example(7, 8, 4, 2, 32)
    pool = other_order(np.asarray(case.cache.kv)).copy()
    clean = dataclasses.replace(case.cache, kv=jnp.asarray(pool))
    for row, end in ((0, 57), (5, 31)):  # of row 5 four tokens are new: 3 of padding follow
        for slot in range(end, 96):
            pool[case.first + case.cache.tables[row, slot // 8], :, :, slot % 8] = np.nan
    spoilt = dataclasses.replace(clean, kv=jnp.asarray(pool))
    found, wanted = (
        attended("xla", dataclasses.replace(case, cache=cache)) for cache in (spoilt, clean)
    )
    real = np.asarray(case.segments) > 0
    np.testing.assert_array_equal(found[real], wanted[real])


def test_a_row_is_the_same_whoever_sits_beside_it(monkeypatch):
    use(monkeypatch, "gpu")
    case = example(1, 8, 4, 2, 32)
    together = attended("paged", case)
    fewer = dataclasses.replace(case.cache, tables=case.cache.tables[::-2])
    fewer = dataclasses.replace(fewer, lengths=case.cache.lengths[::-2])
    alone = dataclasses.replace(case, q=case.q[::-2], cache=fewer, segments=case.segments[::-2])
    np.testing.assert_array_equal(attended("paged", alone), together[::-2])


def test_blocks_hold_so_many_bytes_and_never_more_than_a_row():
    def pool(page, kv_heads, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct((100, page, 2 * kv_heads, 128), dtype)

    assert ragged.blocks(pool(32, 1), 128, 1) == (32, 8)
    assert ragged.blocks(pool(32, 1), 6, 128) == (6, 32)
    assert ragged.blocks(pool(32, 4), 128, 32) == (8, 32)
    assert ragged.blocks(pool(128, 8, jnp.float32), 128, 1) == (1, 8)
    # Steps of 64 tokens (bfloat16, heads of 128) in at most 16 parts that hold all pages.
    assert paged.partition(32, 256, 128) == (2, 16, 8)
    assert paged.partition(32, 256, 129) == (2, 16, 10)
    assert paged.partition(32, 256, 3) == (2, 2, 2)
    assert paged.partition(128, 256, 5) == (1, 5, 1)


def test_a_model_asks_for_its_platform(monkeypatch):
    """On this platform the kernels of another are refused by the model itself, not replaced."""
    wanted = "paged" if choose.platform_of(Placement()) == "tpu" else "ragged"
    graph, shapes = qwen2_5_vl.abstract(dataclasses.replace(TINY, cached_attention=wanted))
    inputs, cache = prompt(np.random.default_rng(0))
    with pytest.raises(ValueError, match="this program is for"):
        jax.eval_shape(functools.partial(qwen2_5_vl.forward, graph), shapes, inputs, cache)


TINY = dataclasses.replace(preset("tiny"), text=dataclasses.replace(preset("tiny").text, layers=2))


def prompt(rng):
    """Three rows of up to 9 new tokens onto caches of 0, 5 and 16 tokens."""
    new = np.arange(9) < np.asarray([[9], [4], [7]])
    cache = qwen2_5_vl.init_cache(TINY, 3, 32, page=8)
    kv = jnp.asarray(rng.normal(size=(24, 8, 4, 32)), jnp.float32)
    cache = dataclasses.replace(
        cache,
        kv=other_order(kv) if heads_first(cache.kv) else kv,
        lengths=jnp.asarray([0, 5, 16], jnp.int32),
    )
    at = np.asarray(cache.lengths)[:, None] + np.arange(9)
    inputs = qwen2_5_vl.Inputs(
        ids=rng.integers(20, 500, (3, 9)).astype(np.int32),
        positions=np.broadcast_to(at, (3, 3, 9)).astype(np.int32),
        segments=new.astype(np.int32),
        image_index=np.full((3, 9), -1, np.int32),
    )
    return inputs, cache


@pytest.mark.parametrize("wanted, platform", [("ragged", "tpu"), ("paged", "gpu")])
def test_a_model_with_a_kernel_equals_the_reference(wanted, platform, monkeypatch):
    """Each layer looks at its own pages, after what is new was written to them."""
    monkeypatch.setitem(cached.REFUSALS, "ragged", lambda case: None)  # heads of 128 only
    params = qwen2_5_vl.unstack(qwen2_5_vl.init(TINY, jax.random.key(0)))

    def run(name):
        graph, _ = qwen2_5_vl.abstract(dataclasses.replace(TINY, cached_attention=name))
        inputs, cache = prompt(np.random.default_rng(0))
        once = functools.partial(qwen2_5_vl.forward, graph)
        if name != "ragged":
            once = jax.jit(once, compiler_options=QUICK)
        out = once(params, inputs, cache)
        return np.asarray(out.logits)[np.asarray(inputs.segments) > 0], out

    expected, _ = run("xla")
    use(monkeypatch, platform)
    found, out = run(wanted)
    assert np.isfinite(out.logits).all()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(expected).max() > 0.1


def test_paged_lowers_for_cuda_and_reads_the_pool_where_it_lies(monkeypatch, abstract_gpu):
    use(monkeypatch, "gpu", "9.0")
    monkeypatch.setattr(paged, "attend", functools.partial(PAGED, interpret=False))
    case = example(1, 32, 28, 4, 128, "bfloat16")

    def run(q, cache, segments):
        bound = bind_cached("auto", cache, segments, heads=28, place=Placement())
        return bound(q, cache.kv, case.first)

    traced = jax.jit(run).trace(case.q, case.cache, case.segments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "xla.gpu.triton" in text
    pool = "x".join(map(str, case.cache.kv.shape)) + "xbf16"
    using = [line for line in text.splitlines() if pool in line and "func.func" not in line]
    # Nothing but the kernel touches it, twice: once for keys, once for values.
    calls = [line for line in using if "xla.gpu.triton" in line]
    assert len(calls) == 1 and calls[0].count(pool) == 2
    assert all("call @" in line for line in using if line not in calls), using


@pytest.mark.skipif(not ON_GPU, reason="compiled Triton needs a GPU")
@pytest.mark.parametrize("length", [1, 3])
def test_paged_on_gpu_equals_the_gather(length):
    case = example(length, 32, 28, 4, 128, "bfloat16")
    real = np.asarray(case.segments) > 0
    found, wanted = (np.asarray(attended(n, case), np.float32)[real] for n in ("paged", "xla"))
    np.testing.assert_allclose(found, wanted, atol=2e-2 * np.abs(wanted).max())


PROGRAM = """
import functools, jax, numpy as np
import test_cached_attention as t
from mmsr_jax.model.attention import bind_cached, choose, paged
from mmsr_jax.parallel.mesh import MeshConfig, make_mesh
from mmsr_jax.parallel.rules import Placement

choose.platform_of = lambda place: "gpu"
paged.attend = functools.partial(paged.attend, interpret=True)
case = t.example(1, 8, 8, 4, 16)

def run(name, place):
    def attended(q, cache, segments):
        return bind_cached(name, cache, segments, heads=8, place=place)(q, cache.kv, case.first)
    jitted = jax.jit(attended)
    arguments = case.q, case.cache, case.segments
    return np.asarray(jitted(*arguments)), jitted.lower(*arguments).as_text()

wanted, _ = run("xla", Placement())
real = np.asarray(case.segments)[:, 0] > 0
# Six rows over two devices; four key heads over four, and over eight, which cannot split them.
for fsdp, tensor, share in ((2, 4, "3x1x2x16xf32"), (1, 8, "6x1x8x16xf32")):
    found, text = run("paged", Placement(make_mesh(MeshConfig(fsdp=fsdp, tensor=tensor))))
    assert f"tensor<{share}>" in text, (tensor, "rows and query heads of a device")
    np.testing.assert_allclose(found[real], wanted[real], atol=1e-5)
print("same")
"""


def test_over_a_mesh_each_device_has_its_rows_and_heads():
    environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    here = os.path.dirname(__file__)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [here, *sys.path]))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "same" in done.stdout


@pytest.mark.skipif(
    not topology.has_libtpu(), reason='the TPU compiler needs libtpu: pip install "mmsr-jax[tpu]"'
)
@pytest.mark.parametrize(
    "chips, tensor, heads, kv_heads, length, dtype, wanted",
    [
        ("v5e:2x2", 4, 28, 4, 1, "bfloat16", "auto"),  # 7B
        ("v5p:2x2x1", 2, 28, 4, 64, "bfloat16", "auto"),
        ("v5p:2x2x1", 4, 16, 2, 1, "bfloat16", "auto"),  # 3B: key heads on every device
        ("v5e:2x2", 1, 28, 4, 1, "float32", "ragged"),
    ],
)
def test_ragged_compiles_for_tpu_and_reads_the_pool_where_it_lies(
    chips, tensor, heads, kv_heads, length, dtype, wanted
):
    mesh = topology.topology_mesh(chips, MeshConfig(-1, tensor))
    place = Placement(mesh, ROLLOUT_RULES)
    shape, rows = (28 * 512, 32, 2 * kv_heads, 128), 16

    def array(kind, *shape):
        return jax.ShapeDtypeStruct(shape, kind)

    kv = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(place, shape))
    cache = Cache(kv, array(jnp.int32, rows, 64), array(jnp.int32, rows))

    def run(q, cache, segments, first):
        return bind_cached(wanted, cache, segments, heads=heads, place=place)(q, cache.kv, first)

    q = array(dtype, rows, length, heads, 128)
    found = topology.compile_for(
        mesh, run, q, cache, array(jnp.int32, rows, length), array(jnp.int32)
    )
    assert found.fits, found.error
    pool = topology.shard_bytes(kv)
    assert pool < found.argument_bytes < 1.1 * pool and found.temporary_bytes < 0.05 * pool
