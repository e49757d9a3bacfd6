"""Training of an adapter alone: the base stays as it was, the numbers are merged weights' own."""

import jax
import numpy as np
import pytest

from mmsr_jax.model import lora
from mmsr_jax.model import qwen2_5_vl as qwen
from mmsr_jax.parallel import compiles
from mmsr_jax.train import state as state_lib
from mmsr_jax.train import step
from mmsr_jax.train.assemble import assemble
from mmsr_jax.train.grpo import GRPOConfig, LossConfig
from mmsr_jax.train.update import Fixed, grpo_update, sft_update

LORA = lora.LoRAConfig(
    rank=4, alpha=6.0, targets=("q_proj", "o_proj", "down_proj", "qkv", "mlp.0"), vision=True
)
CONFIG = GRPOConfig(loss=LossConfig(kl_weight=0.1), updates=2)
ONE = np.float32(1)


@pytest.fixture(scope="module")
def made(tiny):
    """Graph and shapes of base and adapter."""
    return qwen.abstract(tiny.model, lora=LORA)


@pytest.fixture(scope="module")
def fixed(tiny, made):
    base = tiny.params()
    return Fixed(made[0], tiny.model, tiny.pack, tiny.transform, base, tiny.graph)


@pytest.fixture(scope="module")
def adapter(made):
    """An adapter without a zero in it."""
    rng = np.random.default_rng(1)
    shapes = lora.split(made[1])[1]
    drawn = jax.tree.map(lambda s: rng.normal(size=s.shape, scale=0.1).astype("f"), shapes)
    return jax.device_put(drawn, jax.devices()[0])  # committed, as in training


@pytest.fixture
def fresh(made, fixed):
    start = lora.init(lora.split(made[1])[1], jax.random.key(0))
    return state_lib.create(start, fixed.transform)


def test_the_state_is_the_adapters_alone(made, fresh):
    adapter = lora.split(made[1])[1]
    assert jax.tree.structure(fresh.params) == jax.tree.structure(adapter)
    size = sum(leaf.size for leaf in jax.tree.leaves(adapter))
    held = sorted(leaf.size for leaf in jax.tree.leaves(fresh.opt_state))
    # Two moments of every leaf, and counters.
    assert sum(n for n in held if n > 1) == 2 * size
    assert sum(n for n in held if n == 1) < 5


def test_training_learns_and_leaves_the_base_alone(fixed, fresh, pieces, groups):
    leaves = jax.tree.leaves(fixed.base)
    bits = [np.array(leaf) for leaf in leaves]
    state, losses = fresh, []
    for _ in range(8):
        state, values, _ = sft_update(fixed, state, pieces)
        losses.append(values["loss"])
    assert losses[-1] < 0.85 * losses[0]
    state, values, micro = grpo_update(fixed, CONFIG, state, fixed.base, groups)
    assert values["skipped"] == 0 and micro == 2 and int(state.step) == 10
    for leaf, bit in zip(leaves, bits, strict=True):
        assert not leaf.is_deleted()
        np.testing.assert_array_equal(leaf, bit)
    whole = state_lib.whole(state.params, fixed.base)
    kept = lora.split(whole)[0]
    assert all(a is b for a, b in zip(jax.tree.leaves(kept), leaves, strict=True))
    for new in jax.tree.leaves(state.params):
        assert np.any(new)  # every leaf, B included, was reached by a gradient
    before = compiles.count()
    state, _, _ = sft_update(fixed, state, pieces[2:3])
    grpo_update(fixed, CONFIG, state, fixed.base, groups[::-1])
    assert compiles.count() == before


def test_gradients_are_those_of_the_merged_kernels(tiny, fixed, adapter, pieces, close_trees):
    """dL/dA = s dL/dW B^T and dL/dB = s A^T dL/dW, with dL/dW of the model without adapters."""
    (batch,) = assemble(pieces, tiny.model, tiny.pack, aggregate="token")
    grads, measured = step.accumulate_sft(
        fixed.graph, adapter, step.zeros_like(adapter), batch, fixed.base
    )
    assert jax.tree.structure(grads) == jax.tree.structure(adapter)
    merged = lora.merge(lora.join(fixed.base, adapter), LORA)
    full, plain = step.accumulate_sft(tiny.graph, merged, step.zeros_like(merged), batch)
    assert float(measured["loss"]) == pytest.approx(float(plain["loss"]), rel=1e-5)
    for module in lora.targeted(tiny.model, LORA):
        own, found, kernel = adapter, grads, full
        for name in module.path:
            own, found, kernel = own[name], found[name], kernel[name]
        a, b, w = (np.asarray(x, np.float64) for x in (own[lora.A], own[lora.B], kernel["kernel"]))
        layers = a.shape[0] if module.stacked else 1
        rank = LORA.rank
        a, b = a.reshape(layers, -1, rank), b.reshape(layers, rank, -1)
        w = w.reshape(layers, a.shape[1], b.shape[2])
        wanted = {
            lora.A: LORA.scale * np.einsum("lio,lro->lir", w, b).reshape(own[lora.A].shape),
            lora.B: LORA.scale * np.einsum("lir,lio->lro", a, w).reshape(own[lora.B].shape),
        }
        close_trees(found, wanted, 1e-4)


def test_the_reference_is_the_base_without_adapters(tiny, fixed, adapter, fresh, pieces):
    """KL to the base, computed by the plain graph on the very arrays that the policy stands on."""
    (batch,) = assemble(pieces, tiny.model, tiny.pack, aggregate="token")

    def measured(params):
        now = state_lib.whole(params, fixed.base)
        return step.accumulate_grpo(
            fixed.graph, params, fixed.base, step.zeros_like(params),
            step.with_old(fixed.graph, now, batch, ONE), CONFIG.loss, ONE, fixed.base, tiny.graph,
        )[1]  # fmt: skip

    assert abs(measured(fresh.params)["kl"]) < 1e-9  # B is zero: policy and reference agree
    found = measured(adapter)
    merged = lora.merge(lora.join(fixed.base, adapter), LORA)
    batch = step.with_old(tiny.graph, merged, batch, ONE)
    _, wanted = step.accumulate_grpo(
        tiny.graph, merged, tiny.params(), step.zeros_like(merged), batch, CONFIG.loss, ONE
    )
    assert float(found["kl"]) > 0.01
    for name in wanted:
        assert float(found[name]) == pytest.approx(float(wanted[name]), rel=1e-4, abs=1e-5), name
