"""The reference's own gradient, written by hand, against what JAX derives from the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmsr_jax.model.attention import attend, xla


def formula(q, k, v, mask):
    """Softmax attention as one writes it down."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None], scores * q.shape[-1] ** -0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bnts,bsnh->btnh", weights, v)


def out_and_gradients(function, *arrays):
    @jax.jit
    def run(q, k, v, mask, weight):
        out, backward = jax.vjp(lambda q, k, v: function(q, k, v, mask), q, k, v)
        return out, *backward(weight)

    return run(*arrays)


# (queries, keys, scores at a time, blocks that makes of them): the second has a filled-up end
CASES = [(37, 37, 2**20, 1), (130, 50, 1000, 2), (256, 40, 1000, 2), (40, 300, 1000, 1)]


@pytest.mark.parametrize(("queries", "keys", "scores", "blocks"), CASES)
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_gradients_by_hand_equal_derived_ones(
    monkeypatch, queries, keys, scores, blocks, dtype, tolerance
):
    monkeypatch.setattr(xla, "SCORES", scores)
    rng = np.random.default_rng(queries)

    def draw(length, heads):
        return jnp.asarray(rng.normal(size=(2, length, heads, 16)), dtype)

    mask = rng.random((2, queries, keys)) < 0.3
    mask[:, 3] = mask[0, -1] = False  # rows that see nothing have a gradient too
    arrays = draw(queries, 6), draw(keys, 2), draw(keys, 2), jnp.asarray(mask), draw(queries, 6)
    shape = jax.ShapeDtypeStruct((2, 2, 3, queries, 16), dtype)
    assert xla._blocks(shape, jax.ShapeDtypeStruct((2, 2, keys, 16), dtype)) == blocks
    found, wanted = (out_and_gradients(function, *arrays) for function in (attend, formula))
    for name, one, other in zip(("out", "dq", "dk", "dv"), found, wanted, strict=True):
        assert one.dtype == other.dtype == dtype
        one, other = np.asarray(one, np.float32), np.asarray(other, np.float32)
        np.testing.assert_allclose(one, other, atol=tolerance * np.abs(other).max(), err_msg=name)
