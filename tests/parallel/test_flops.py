"""The count of products against hand counts, and against XLA's where it counts everything."""

import jax
import jax.numpy as jnp
import pytest

from mmsr_jax.model.attention import splash
from mmsr_jax.parallel import flops

W, X = jnp.ones((5, 16, 24)), jnp.ones((8, 16))
ONE = 2 * 8 * 16 * 24  # x @ w


def layers(w, x):
    @jax.checkpoint
    def body(x, w):
        return jnp.tanh(x @ w) @ w.T, None

    return jax.lax.scan(body, x, w)[0].sum()


def test_loops_count_as_often_as_they_turn():
    assert flops.of(layers, W, X) == 5 * 2 * ONE
    # Forward; then for each layer again its first product, and two gradients of each product.
    assert flops.of(jax.grad(layers), W, X) == 5 * (2 + 1 + 2 * 2) * ONE


def test_a_branch_counts_as_its_dearest_arm():
    def either(w, x):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ w[0] @ w[0].T).sum(), lambda: x.sum())

    assert flops.of(either, W, X) == 2 * ONE


def test_without_loops_it_is_what_xla_counts():
    def product(w, x):
        return jnp.einsum("bi,lio->lbo", x, w)

    counted = jax.jit(product).lower(W, X).compile().cost_analysis()["flops"]
    assert flops.of(product, W, X) == pytest.approx(counted, rel=0.01) == 5 * ONE


def test_kernels_count_by_their_grid():
    rows, length, heads, size = 2, 1024, 4, 128
    q = jax.ShapeDtypeStruct((rows, length, heads, size), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((rows, length), jnp.int32)

    def attention(q, segments):
        return splash.attend(q, q, q, segments, causal=False)

    assert flops.of(attention, q, segments) == 2 * 2 * rows * heads * length**2 * size


def test_what_every_device_does_counts_for_each():
    mesh = jax.make_mesh((1,), ("rows",), devices=jax.devices()[:1])
    spec = jax.sharding.PartitionSpec()
    abstract = jax.sharding.AbstractMesh((4,), ("rows",))

    def over(mesh):
        return jax.shard_map(
            lambda w, x: x @ w[0], mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )

    assert flops.of(over(mesh), W, X) == ONE
    assert flops.of(over(abstract), W, X) == 4 * ONE
