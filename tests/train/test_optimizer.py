"""Schedules against published numbers; updates that skip what is not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmsr_jax.model import qwen2_5_vl
from mmsr_jax.model.config import preset
from mmsr_jax.train import state as state_lib
from mmsr_jax.train import step
from mmsr_jax.train.optimizer import OptimizerConfig, optimizer, schedule

# The table of MMSearch-R1's script: lr 2e-6, W 45, rho 0.95.
TABLE = {0: 2.00e-6, 20: 1.99e-6, 40: 1.53e-6, 45: 1.05e-6, 50: 5.7e-7, 60: 1.65e-7, 90: 1.00e-7}
SCRIPT = OptimizerConfig(
    learning_rate=2e-6, schedule="sigmoid_decay", decay_midpoint=45, decay_ratio=0.95
)


@pytest.mark.parametrize(("at", "rate"), TABLE.items())
def test_sigmoid_decay(at, rate):
    assert float(schedule(SCRIPT, 100)(at)) == pytest.approx(rate, rel=0.01)


def test_sigmoid_decay_of_the_follow_up():
    """August 2025: W 60, down to 90 % of the start."""
    late = dataclasses.replace(SCRIPT, decay_midpoint=60, decay_ratio=0.1)
    assert float(schedule(late, 200)(200)) == pytest.approx(1.8e-6, rel=1e-3)
    with pytest.raises(ValueError, match="decay_midpoint > 0, got 0"):
        schedule(dataclasses.replace(SCRIPT, decay_midpoint=0), 10)


def test_other_schedules():
    base = OptimizerConfig(learning_rate=1.0, warmup_steps=10, final_ratio=0.1)
    rates = {
        kind: schedule(dataclasses.replace(base, schedule=kind), 110)
        for kind in ("constant", "linear", "cosine")
    }
    for rate in rates.values():
        np.testing.assert_allclose([float(rate(t)) for t in (0, 5, 10)], [0, 0.5, 1.0], atol=1e-6)
    ends = {kind: float(rate(110)) for kind, rate in rates.items()}
    assert ends == pytest.approx({"constant": 1.0, "linear": 0.1, "cosine": 0.1}, abs=1e-6)
    assert float(rates["linear"](60)) == pytest.approx(0.55, abs=1e-6)
    assert float(rates["cosine"](60)) == pytest.approx(0.55, abs=1e-6)
    assert float(schedule(dataclasses.replace(base, warmup_steps=0), 5)(0)) == 1.0


def small():
    return {"kernel": jnp.asarray([[1.0, -2.0], [0.5, 4.0]]), "scale": jnp.asarray([1.0, 3.0])}


def start(config, steps=10):
    transform = optimizer(config, steps)
    return transform, state_lib.create(small(), transform)


def test_one_update_by_hand():
    """Adam's first step is lr * sign(g); decay on matrices only; the norm is clipped before."""
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, max_grad_norm=1.0)
    transform, state = start(config)
    grads = {"kernel": jnp.asarray([[3.0, 0.0], [0.0, 4.0]]), "scale": jnp.asarray([0.0, -12.0])}
    new, measured = step.apply(transform, state, grads)
    assert float(measured["grad_norm"]) == pytest.approx(13.0) and measured["skipped"] == 0
    signs = {"kernel": np.asarray([[1, 0], [0, 1]]), "scale": np.asarray([0, -1])}
    for name, p in small().items():
        decay = 0.5 if p.ndim > 1 else 0.0
        expected = p - 0.1 * (signs[name] + decay * p)
        np.testing.assert_allclose(new.params[name], expected, atol=1e-5)
    assert int(new.step) == 1
    # What Adam remembers is the gradient cut to norm 1.
    momentum = optax.tree_utils.tree_get(new.opt_state, "mu")
    np.testing.assert_allclose(momentum["scale"], [0, 0.1 * -12 / 13], rtol=1e-5)


def test_norms_and_biases_of_stacked_layers_do_not_decay():
    """They have an axis more than a lone one, as matrices have."""
    params = jax.tree.map(
        lambda s: jnp.ones(s.shape, s.dtype), qwen2_5_vl.abstract(preset("tiny"))[1]
    )
    transform = optimizer(OptimizerConfig(learning_rate=0.1, weight_decay=0.5), 9)
    still = jax.tree.map(jnp.zeros_like, params)
    moved, _ = transform.update(still, transform.init(params), params)
    for path, step_of in jax.tree_util.tree_leaves_with_path(moved):
        decays = path[-1].key in ("kernel", "table")
        assert decays == bool(np.any(np.asarray(step_of) != 0)), jax.tree_util.keystr(path)
    assert moved["text"]["layers"]["attention"]["q"]["bias"].ndim == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_is_skipped(bad):
    config = OptimizerConfig(learning_rate=0.1)
    grads = jax.tree.map(jnp.ones_like, small())
    transform, state = start(config)
    state, _ = step.apply(transform, state, grads)
    before = jax.tree.map(np.array, state)
    poisoned = {**grads, "scale": jnp.asarray([1.0, bad])}
    state, measured = step.apply(transform, state, poisoned)
    assert measured["skipped"] == 1 and not np.isfinite(measured["grad_norm"])
    moments = [optax.tree_utils.tree_get(s.opt_state, "ScaleByAdamState") for s in (before, state)]
    for old, new in zip(
        jax.tree.leaves((before.params, moments[0])),
        jax.tree.leaves((state.params, moments[1])),
        strict=True,
    ):
        np.testing.assert_array_equal(old, new)
    assert int(state.step) == 2
    # Training goes on as if the step had not been.
    state, measured = step.apply(transform, state, grads)
    _, clean = start(config)
    for _ in range(2):
        clean, _ = step.apply(transform, clean, grads)
    assert measured["skipped"] == 0
    for left, right in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(clean.params), strict=True
    ):
        np.testing.assert_array_equal(left, right)


def test_measurements_add_up():
    left = {"loss": jnp.float32(0.25), "logprob_gap_max": jnp.float32(3.0)}
    right = {"loss": jnp.float32(0.5), "logprob_gap_max": jnp.float32(2.0)}
    total = step.add(step.add(None, left), right)
    assert {k: float(v) for k, v in total.items()} == {"loss": 0.75, "logprob_gap_max": 3.0}
